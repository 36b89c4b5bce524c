"""The environments that the peers live in: some need other releases of our own dependencies, so each has one of its own.

`install` makes them with uv from the pinned, hashed lock files beside this module (`uv pip compile --universal
--generate-hashes`); nothing of ours is installed there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from targets.errors import RecipeError, TargetError

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A quantizer of another project, by its function in quantizers.py; `environment` None is our own interpreter."""

    name: str  # as the tables call it
    quantizer: str
    environment: str | None = None


PEERS = {
    peer.quantizer: peer
    for peer in (
        Peer(name="ONNX Runtime, defaults", quantizer="onnxruntime_defaults"),
        Peer(name="ONNX Runtime, every operator, u8", quantizer="onnxruntime_every_op"),
        Peer(name="Olive", quantizer="olive", environment="olive"),
        Peer(name="NVIDIA ModelOpt", quantizer="modelopt", environment="modelopt"),
        Peer(name="NNCF on ONNX", quantizer="nncf_onnx"),
        Peer(name="NNCF on OpenVINO", quantizer="nncf_openvino"),
    )
}
COMPARED = ("onnxruntime_defaults", "onnxruntime_every_op", "olive", "modelopt", "nncf_onnx")


def python_of(peer: Peer, root: Path | None) -> Path:
    """The interpreter that has the peer. Raises TargetError with the command that makes its environment."""
    if peer.environment is None:
        return Path(sys.executable)
    python = (root or Path("build/peers")) / peer.environment / "bin" / "python"
    if not python.is_file():
        raise TargetError(
            f"{peer.name} is not installed: there is no {python}. Run: python -m benchmarks.peers --install {root or 'build/peers'}."
        )
    return python.absolute()


def install(root: Path) -> dict[str, str | None]:
    """Make every environment under `root`; returns what went wrong, None where nothing did. An old one is replaced."""
    uv = _uv()
    names = sorted({peer.environment for peer in PEERS.values() if peer.environment is not None})
    return {name: _install(uv, root / name, HERE / f"{name}.lock") for name in names}


def _install(uv: str, directory: Path, lock: Path) -> str | None:
    create = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(directory)]
    fill = [uv, "pip", "install", "--quiet", "--python", str(directory / "bin" / "python")]
    for argv in (create, [*fill, "--require-hashes", "-r", str(lock)]):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            return " ".join(done.stderr.split())[-400:]
    return None


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise RecipeError("--install: uv is not there. Run: python -m pip install uv.")
    return found
