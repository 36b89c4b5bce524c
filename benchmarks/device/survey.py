"""What a machine is and what is installed on it, asked by its own python3 (3.8 or newer, stdlib only): one JSON document.

Sent to a board as it is and run there, so that one that cannot run the device program yet can be told what it lacks. Starts no
runtime, imports no package: a version is what its installer wrote down.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import sysconfig
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Module -> the distributions that may have brought it.
PACKAGES = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "executorch": ("executorch",),
    "PIL": ("pillow",),
    "cryptography": ("cryptography",),
}
UNKNOWN = "?"


def survey(root: Path = Path("/")) -> dict[str, Any]:
    """`packages`: module -> version, UNKNOWN where it is there without one, None where it is not there."""
    return {
        "board": _first(root, "proc/device-tree/model", "sys/class/dmi/id/product_name"),
        "os": os_name(root),
        "l4t": _l4t(root),
        "kernel": platform.release(),
        "arch": platform.machine(),
        "cpus": os.cpu_count(),
        "ram_mib": _ram_mib(root),
        "free_mib": shutil.disk_usage(Path("~").expanduser()).free // 2**20,
        "python": platform.python_version(),
        "executable": sys.executable,
        "externally_managed": (Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED").exists()
        and sys.prefix == sys.base_prefix,
        "packages": {module: _version(module, names) for module, names in PACKAGES.items()},
    }


def os_name(root: Path = Path("/")) -> str | None:
    """As the system calls itself, with its version."""
    for line in (_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip().strip('"')
    return None


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    if find_spec(module) is None:
        return None
    for distribution in distributions:
        with suppress(PackageNotFoundError):
            return version(distribution)
    return UNKNOWN


def _l4t(root: Path) -> str | None:
    """Jetson Linux as R36.4.3."""
    words = (_text(root / "etc/nv_tegra_release") or "").replace(",", " ").split()
    return f"{words[1]}.{words[4]}" if len(words) > 4 and words[0] == "#" else None


def _ram_mib(root: Path) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return None


def _first(root: Path, *names: str) -> str | None:
    return next((text for name in names if (text := _text(root / name))), None)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\x00\n ") or None
    except OSError:
        return None


if __name__ == "__main__":
    print(json.dumps(survey()))
