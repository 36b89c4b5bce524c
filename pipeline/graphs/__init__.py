"""ONNX graphs: reading and checking files, exact rewrites, and the dialects that the targets' runtimes want."""
