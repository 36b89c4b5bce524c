# A CPU device, linux/amd64 or linux/arm64: Python, numpy, ONNX Runtime, OpenVINO and the device program. See docs/images.md.
#
#   docker build -f docker/device.Dockerfile -t edgestill-device .
#   docker build -f docker/device.Dockerfile --platform linux/arm64 -t edgestill-device .    # needs no emulator
#   docker run --rm -v "$PWD/BUNDLE:/bundle:ro" edgestill-device verify /bundle
#
# BASE: any Debian or Ubuntu image with Python 3.11 or newer (ONNX Runtime 1.32 needs it). BUILD_BASE: the same with pip and venv;
# its python3 has the same version and lies in the same place. Nothing of it is in the image.
ARG BASE=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1
ARG BUILD_BASE=${BASE}

FROM --platform=${BUILDPLATFORM} ${BUILD_BASE} AS build
ARG TARGETARCH
COPY docker/device.lock /src/docker/
# Wheels for the target, whatever this machine is. The lock holds all that openvino needs but its usage reports, hence --no-deps.
# Its GPU and NPU plugins, a sixth of all, find nothing to drive here.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    case "${TARGETARCH}" in \
      amd64) machine=x86_64 ;; \
      arm64) machine=aarch64 ;; \
      *) echo "TARGETARCH='${TARGETARCH}': there is a device image for amd64 and for arm64. Pass --platform linux/arm64." >&2; exit 1 ;; \
    esac \
    && python3 -m venv --without-pip /opt/edgestill \
    && packages=$(/opt/edgestill/bin/python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && python3 -m pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: --target "${packages}" \
      --platform "manylinux2014_${machine}" $(seq 17 36 | sed "s/.*/--platform manylinux_2_&_${machine}/") -r /src/docker/device.lock \
    && cd "${packages}/openvino/libs" && rm -f libopenvino_intel_gpu_plugin.so libopenvino_intel_npu_plugin.so cache.json
COPY benchmarks /src/benchmarks
COPY targets /src/targets
RUN cd /src && python3 -m benchmarks.pack /opt/edgestill/edgestill-device.pyz && mkdir -p /skeleton/edgestill

FROM ${BASE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="edgestill-device" \
      org.opencontainers.image.description="Verifies, compiles, evaluates and measures edgestill's bundles on a CPU." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/edgestill /opt/edgestill
COPY --from=build --chown=10001:10001 /skeleton/ /home/
# Nothing runs in this stage, so that an image for arm64 is made on x86 without an emulator; the user needs no entry in /etc/passwd.
ENV HOME=/home/edgestill USER=edgestill PATH=/opt/edgestill/bin:${PATH}
USER 10001:10001
WORKDIR /home/edgestill
# Python as process 1 leaves SIGTERM alone. No HEALTHCHECK: each container is one command, and its exit code is its health.
STOPSIGNAL SIGINT
ENTRYPOINT ["python3", "/opt/edgestill/edgestill-device.pyz"]
CMD ["--help"]
