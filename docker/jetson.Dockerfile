# A Jetson: the device program over the TensorRT that NVIDIA ships for a JetPack. See docs/images.md, also for what was never tried.
#
#   docker build -f docker/jetson.Dockerfile --platform linux/arm64 --build-arg BASE=IMAGE -t edgestill-jetson .    # needs no emulator
#   docker run --rm --runtime nvidia --user "$(id -u):$(id -g)" --group-add video --group-add "$(getent group render | cut -d: -f3)" \
#     -v "$PWD/kit:/kit:ro" -v "$PWD/out:/out" edgestill-jetson first-run /kit --out /out/result.json
#
# BASE: an image with the TensorRT of the JetPack that the board runs, Python 3.10 or newer and numpy. No default: engines of another
# TensorRT are refused by the board. BUILD_BASE: any image with Python 3.10 or newer, of the building machine.
ARG BASE
ARG BUILD_BASE=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM --platform=${BUILDPLATFORM} ${BUILD_BASE} AS build
COPY benchmarks /src/benchmarks
COPY targets /src/targets
RUN cd /src && python3 -m benchmarks.pack /opt/edgestill/edgestill-device.pyz && mkdir -p /skeleton/edgestill

FROM ${BASE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="edgestill-jetson" \
      org.opencontainers.image.description="Builds, verifies and measures edgestill's kits and bundles with a Jetson's own TensorRT." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/edgestill /opt/edgestill
COPY --from=build --chown=10001:10001 /skeleton/ /home/
# Nothing runs in this stage: it is made on x86 without an emulator. NVIDIA's entrypoint, where its image has one, is replaced.
ENV HOME=/home/edgestill USER=edgestill
# 44 is the group video of Debian and Ubuntu, which owns a Jetson's /dev/nvmap and /dev/nvhost*.
USER 10001:44
WORKDIR /home/edgestill
# Python as process 1 leaves SIGTERM alone. No HEALTHCHECK: each container is one command, and its exit code is its health.
STOPSIGNAL SIGINT
ENTRYPOINT ["python3", "/opt/edgestill/edgestill-device.pyz"]
CMD ["--help"]
