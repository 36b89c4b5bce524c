from benchmarks.hardware.page import render_hardware_report

__all__ = ["render_hardware_report"]
