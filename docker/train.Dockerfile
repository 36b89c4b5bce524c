# The host: everything from teacher to bundle, over SSH to boards, and signatures. About 6 GB, most of it CUDA, which torch's wheel
# brings along; training on a GPU (--gpus all) was not tried. See docs/images.md.
#
#   docker build -f docker/train.Dockerfile -t edgestill .
#   docker run --rm -v edgestill-runs:/home/edgestill/runs edgestill run recipes/quickstart.yaml
#
# BASE: any Debian or Ubuntu image with Python 3.11 or newer. BUILD_BASE: the same with pip and venv; its python3 has the same
# version and lies in the same place. Nothing of it is in the image. No compiler: with `quantize.kernels: extension` NNCF then
# falls back to torch's kernels and the report says so; take a BASE with g++ and Python's headers for the compiled ones.
ARG BASE=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
ENV UV_LINK_MODE=copy
WORKDIR /src
COPY docker/build.lock /src/docker/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv /opt/tools \
    && /opt/tools/bin/python -m pip install --no-cache-dir --no-deps --require-hashes -r docker/build.lock
COPY pyproject.toml requirements.lock /src/
# What pyproject.toml asks for, at the versions and hashes of the one lock of the repository, without its tools for development.
RUN --mount=type=secret,id=uv,target=/etc/uv/uv.toml --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=cache,target=/root/.cache/uv \
    python3 -m venv --without-pip /opt/edgestill \
    && /opt/tools/bin/uv pip install --python /opt/edgestill/bin/python --compile-bytecode --require-hashes \
      --constraints requirements.lock --requirements pyproject.toml --extra devices --extra sign
COPY README.md LICENSE edgestill.py /src/
COPY benchmarks /src/benchmarks
COPY pipeline /src/pipeline
COPY targets /src/targets
RUN /opt/tools/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
    && /opt/tools/bin/uv pip install --python /opt/edgestill/bin/python --compile-bytecode --offline --no-deps /tmp/wheel/*.whl \
    && mkdir -p /skeleton/edgestill/runs

FROM ${BASE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="edgestill" \
      org.opencontainers.image.description="From a trained teacher to small, fast, provably INT8 models on every target device." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/edgestill /opt/edgestill
COPY --from=build --chown=10001:10001 /skeleton/ /home/
COPY recipes /home/edgestill/recipes
ENV HOME=/home/edgestill USER=edgestill PATH=/opt/edgestill/bin:${PATH} PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/edgestill
# Python as process 1 leaves SIGTERM alone; after SIGINT a training goes on where it was. No HEALTHCHECK: each container is one
# command, and its exit code is its health.
STOPSIGNAL SIGINT
ENTRYPOINT ["edgestill"]
CMD ["--help"]
