#!/usr/bin/env bash
# An ARM64 board as a folder: Debian's python3 and sshd, numpy and onnxruntime, unpacked from their packages. Nothing of it is
# installed, and no package's script runs: a bootstrap would do the same in six minutes.
#
#   tests/arm/build_root.sh build/arm
#
# Takes the mirrors and keys of this machine's apt; its lists, its caches and its installed packages are not touched.
set -euo pipefail
work=$(realpath -m "$1")
here=$(realpath "$(dirname "$0")")
root=$work/root
packages=(dash libpython3-stdlib libstdc++6 openssh-server python3-minimal)
unneeded='^(adduser|debconf|dpkg|init-system-helpers|lsb-base|perl|procps|sysvinit-utils|tar|ucf|usrmerge|.*perl)_'

rm -rf "$work"
mkdir -p "$work"/apt/{state/lists/partial,cache/archives/partial} "$root"/{dev,etc/ssh,proc,root,run/sshd,sys,tmp,usr/{bin,lib,sbin}}
: > "$work/apt/status"
for folder in bin lib sbin; do ln -s "usr/$folder" "$root/$folder"; done

apt=(apt-get -qq -o Dir::State="$work/apt/state" -o Dir::State::status="$work/apt/status" -o Dir::Cache="$work/apt/cache"
  -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o Acquire::Languages=none)
"${apt[@]}" update
"${apt[@]}" install -y --download-only --no-install-recommends "${packages[@]}" >/dev/null
for package in "$work"/apt/cache/archives/*.deb; do
  [[ $(basename "$package") =~ $unneeded ]] && continue
  dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
done
rm -rf "$work/apt"

python=$(readlink "$root/usr/bin/python3")
uv pip install --quiet --python-platform aarch64-manylinux_2_28 --python-version "${python#python}" --only-binary :all: --no-deps \
  --require-hashes --target "$root/usr/lib/python3/dist-packages" -r "$here/wheels.txt"

ln -sf dash "$root/bin/sh"
printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'sshd:x:100:65534::/run/sshd:/usr/sbin/nologin' > "$root/etc/passwd"
printf '%s\n' 'root:x:0:' 'nogroup:x:65534:' > "$root/etc/group"
printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
printf 'PRETTY_NAME="Debian, emulated ARM64"\nID=debian\n' > "$root/etc/os-release"
chmod 700 "$root/root"
chmod 1777 "$root/tmp"
