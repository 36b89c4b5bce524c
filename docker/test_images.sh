#!/usr/bin/env bash
# Builds the CPU images over a base of our own making, without a Docker engine, and verifies and measures a bundle in the device image.
#
#   docker/test_images.sh BUNDLE [device|train]...
#
# Needs root, and Debian's buildah and debootstrap. What stands in build/images is kept: the base is made once.
set -euo pipefail
cd "$(dirname "$0")/.."

bundle=$(realpath "$1")
shift
images=("${@:-device}")
work=$PWD/build/images
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
# The host's certificates and pip settings, for a network that has a proxy of its own; what is not there is not mounted.
mounts=(--volume /etc/ssl/certs:/etc/ssl/certs:ro)
[ -f /etc/pip.conf ] && mounts+=(--volume /etc/pip.conf:/etc/pip.conf:ro)

if ! buildah inspect localhost/edgestill-base >/dev/null 2>&1; then
  mkdir -p "$work"
  rm -rf "$work/root"
  debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$work/root"
  rm -rf "$work/root"/var/cache/apt/archives/*.deb "$work/root"/var/lib/apt/lists/*
  container=$(buildah from scratch)
  buildah add -q "$container" "$work/root" /
  buildah commit -q --rm "$container" localhost/edgestill-base
  rm -rf "$work/root"
fi

for image in "${images[@]}"; do
  buildah bud -q "${mounts[@]}" --build-arg BASE=localhost/edgestill-base -f "docker/$image.Dockerfile" -t "edgestill-$image" .
done

run() { # IMAGE, then the command line in it; not as root
  local container
  container=$(buildah from "localhost/edgestill-$1")
  shift
  buildah run --volume "$bundle:/bundle:ro" "$container" -- "$@"
  buildah rm "$container" >/dev/null
}

if [[ " ${images[*]} " == *" device "* ]]; then
  program=(python3 /opt/edgestill/edgestill-device.pyz)
  run device sh -c 'test "$(id -u)" != 0 && ! command -v gcc'
  run device "${program[@]}" verify /bundle
  run device "${program[@]}" measure --compiled /bundle/model --out /tmp/samples.npy
fi
if [[ " ${images[*]} " == *" train "* ]]; then
  run train edgestill verify /bundle
fi
