"""The program that a device runs: `targets/` and `benchmarks/device/` in one zip that any python3 >= 3.10 starts.

Reads this installation's source files, writes one .pyz. The bytes depend on the sources alone: sorted names, one date,
nothing compressed (what a deflate writes differs between zlib builds).

`python3 -m benchmarks.pack OUT` writes it with a Python that has nothing installed: where an image is built there is no numpy.
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]  # where both packages lie; importing `targets` would need numpy
PROGRAM = "edgestill-device.pyz"
FIRST_RUN = f"python3 {PROGRAM} first-run kit --out result.json"  # what a person types beside a kit
HOST_ONLY = "targets/lint/"  # needs onnx, and the host has linted before anything is sent

# Speaks every Python 3 and no numpy, so that an old or bare device gets a sentence in place of a traceback.
MAIN = """\
import json
import sys


def refuse(message):
    print(json.dumps({"error": message, "exit_code": 5}))
    sys.exit(5)


if sys.version_info < (3, 10):
    refuse("This is Python %d.%d: edgestill-device needs 3.10 or newer. Name a newer one." % sys.version_info[:2])
try:
    import numpy
except ImportError:
    refuse("numpy is not installed for " + sys.executable + ". Run: pip install numpy.")

from benchmarks.device.__main__ import run

sys.exit(run())
"""


def pack_device_program(out_path: Path) -> Path:
    """Write the device program, executable; the file is the old one or the whole new one. Returns `out_path`."""
    out_path.parent.mkdir(parents=True, exist_ok=True)
    partial = out_path.with_name(f".{out_path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in sorted(_sources().items()):
                archive.writestr(_entry(name), data)
    partial.chmod(0o755)
    return partial.replace(out_path)


def _sources() -> dict[str, bytes]:
    """Name in the zip -> content."""
    device, targets = (ROOT / "benchmarks" / "device").glob("*.py"), (ROOT / "targets").rglob("*.py")
    names = [path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks" / "__init__.py", *device, *targets)]
    packed = {name: (ROOT / name).read_bytes() for name in names if not name.startswith(HOST_ONLY)}
    return {"__main__.py": MAIN.encode(), **packed}


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix, wherever it is packed
    entry.external_attr = 0o644 << 16
    return entry


if __name__ == "__main__":
    pack_device_program(Path(sys.argv[1]))
