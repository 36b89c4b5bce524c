# The host: everything from teacher to bundle, on a CPU. About 6 GB; a GPU needs the same with a CUDA runtime underneath.
#
#   docker build -f docker/train.Dockerfile -t edgestill .
#   docker run --rm -v "$PWD/runs:/home/edgestill/runs" edgestill run recipes/quickstart.yaml
#
# BASE: any Debian or Ubuntu image with Python 3.11 or newer and venv.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
# g++ and ninja compile NNCF's fake-quantize kernels where a recipe asks for them.
RUN apt-get update && apt-get install -y --no-install-recommends make g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home edgestill
COPY --chown=edgestill . /home/edgestill
USER edgestill
WORKDIR /home/edgestill
RUN make .venv/installed && rm -rf .cache
ENV PATH=/home/edgestill/.venv/bin:$PATH
ENTRYPOINT ["edgestill"]
CMD ["--help"]
