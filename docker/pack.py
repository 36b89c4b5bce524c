"""Write the device program: `python3 docker/pack.py OUT`, with a Python that has no numpy.

`benchmarks.pack` asks the package `targets` nothing but where it lies. Importing it needs numpy, which an image for another
architecture has and the machine that builds it cannot load: an empty package stands in for it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def main(out_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    stand_in = ModuleType("targets")
    stand_in.__file__ = str(ROOT / "targets" / "__init__.py")
    sys.modules["targets"] = stand_in
    from benchmarks.pack import pack_device_program

    pack_device_program(out_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
