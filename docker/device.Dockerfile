# A CPU device, linux/amd64 or linux/arm64: Python, numpy, ONNX Runtime, OpenVINO and the device program; nothing that builds.
#
#   docker build -f docker/device.Dockerfile -t edgestill-device .
#   docker run --rm -v "$PWD/runs/quickstart/bundles/onnxruntime-cpu:/bundle:ro" edgestill-device verify /bundle
#
# BASE: any Debian or Ubuntu image with Python 3.11 or newer (ONNX Runtime 1.32 needs it) and pip.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ENV PYTHONPATH=/opt/edgestill/lib
COPY docker/device.lock /tmp/
# All of openvino's requirements but its usage reports: --no-deps, the lock lists what is needed.
RUN python3 -m pip install --no-cache-dir --no-deps --require-hashes --target /opt/edgestill/lib -r /tmp/device.lock
COPY targets /src/targets
COPY benchmarks /src/benchmarks
RUN cd /src && python3 -c 'from pathlib import Path; from benchmarks.pack import *; pack_device_program(Path("/opt/edgestill") / PROGRAM)'

FROM ${BASE}
ENV PYTHONPATH=/opt/edgestill/lib PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt/edgestill /opt/edgestill
RUN useradd --uid 10001 --create-home edgestill
USER edgestill
WORKDIR /home/edgestill
ENTRYPOINT ["python3", "/opt/edgestill/edgestill-device.pyz"]
CMD ["--help"]
