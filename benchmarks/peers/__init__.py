"""Other quantizers on the same float ONNX file and the same images, measured as ours is: `python -m benchmarks.peers`."""
