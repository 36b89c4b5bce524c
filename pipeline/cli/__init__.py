"""The command line: verbs only. Each picks its arguments, calls one public function and prints what came back.

Heavy imports happen inside the verbs, so that `edgestill --help` answers at once.
"""

from pipeline.cli.main import main

__all__ = ["main"]
