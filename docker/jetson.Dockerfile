# A Jetson: the device program over the TensorRT that NVIDIA ships for a JetPack. Built on the board or with its architecture;
# not built by us, for want of a board.
#
#   docker build -f docker/jetson.Dockerfile --build-arg BASE=IMAGE -t edgestill-jetson .
#   docker run --rm --runtime nvidia -v "$PWD/kit:/kit:ro" -v "$PWD/out:/out" edgestill-jetson first-run /kit --out /out/result.json
#
# BASE: NVIDIA's L4T TensorRT runtime image of the JetPack that the board runs (JetPack 6: l4t-tensorrt r10.3). It has Python 3.10,
# numpy and tensorrt; the host's driver is mounted by the nvidia runtime. No default: an image of another JetPack builds engines
# that the board refuses.
ARG BASE
FROM ${BASE}
COPY targets /src/targets
COPY benchmarks /src/benchmarks
RUN cd /src && mkdir -p /opt/edgestill \
    && python3 -c 'from pathlib import Path; from benchmarks.pack import *; pack_device_program(Path("/opt/edgestill") / PROGRAM)' \
    && rm -rf /src && useradd --uid 10001 --groups video --create-home edgestill
ENV PYTHONDONTWRITEBYTECODE=1
USER edgestill
WORKDIR /home/edgestill
ENTRYPOINT ["python3", "/opt/edgestill/edgestill-device.pyz"]
CMD ["--help"]
