"""What runs on the device: Python 3.10, the standard library, numpy and one runtime."""
