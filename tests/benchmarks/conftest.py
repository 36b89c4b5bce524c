"""A compiled model and an evaluation set, small enough to be made anew for a test session, and a browser for the pages."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.device.record import validate
from benchmarks.records import Stored
from targets import make_target
from targets.base import CompiledModel, Exported, LayerPlacement, Placement, Preprocessing, TensorSpec, write_json

SIDE, NUM_CLASSES = 4, 3
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """logits = pixels @ weights, any batch of uint8 images of 4 x 4."""
    directory = tmp_path_factory.mktemp("exported")
    weights_PK = np.random.default_rng(0).standard_normal((SIDE * SIDE, NUM_CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", NUM_CLASSES])],
        [numpy_helper.from_array(weights_PK, "weights")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), directory / "model.onnx"
    )
    described = Exported(
        name="linear",
        onnx_path="model.onnx",
        inputs=(TensorSpec(name="image", shape=(None, 1, SIDE, SIDE), dtype="uint8", layout="NCHW"),),
        outputs=(TensorSpec(name="logits", shape=(None, NUM_CLASSES), dtype="float32"),),
        preprocessing=Preprocessing(mode="L"),
        directory=directory,
    )
    described.save()
    return described


@pytest.fixture(scope="session")
def compiled(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return make_target("onnxruntime-cpu", {}).compile(exported, tmp_path_factory.mktemp("compiled"), "fp32")


@pytest.fixture(scope="session")
def evaluation_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples, of which the first two are there as PNG too."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("evaluation")
    x_NCHW = np.random.default_rng(1).integers(0, 256, (7, 1, SIDE, SIDE), dtype=np.uint8)
    np.save(directory / "x-000.npy", x_NCHW)
    np.save(directory / "y.npy", np.zeros(7, dtype=np.int64))
    encoded = [f"encoded/{i:04}.png" for i in range(2)]
    (directory / "encoded").mkdir()
    for i, name in enumerate(encoded):
        Image.fromarray(x_NCHW[i, 0]).save(directory / name)
    spec = {
        "num_samples": 7,
        "classes": ["a", "b", "c"],
        "preprocessing": {"mode": "L", "resize": None, "crop": None, "mean": None, "std": None},
        "shards": ["x-000.npy"],
        "encoded": encoded,
        "encoded_index": [0, 1],
    }
    write_json(directory / "spec.json", spec)
    return directory


class Browser:
    """One Chromium. `run` evaluates JavaScript, `cdp` speaks the DevTools protocol."""

    def __init__(self, driver_url: str, profile_dir: Path) -> None:
        self._open = build_opener(ProxyHandler({})).open  # a proxy is no way to this machine
        options = {"binary": "/usr/bin/chromium", "args": [*FLAGS, f"--user-data-dir={profile_dir}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", f"{driver_url}/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url = f"{driver_url}/session/{session['sessionId']}"

    def open(self, page_path: Path, *, width: int = 1280, scheme: str = "light") -> float:
        """Open the page; returns the seconds from the start of navigation until all is drawn."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.prefer(scheme)
        self._call("POST", f"{self._url}/url", {"url": page_path.as_uri()})
        return float(self.run("return performance.getEntriesByType('navigation')[0].loadEventEnd")) / 1000

    def prefer(self, scheme: str) -> None:
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def run(self, script: str) -> Any:
        return self._call("POST", f"{self._url}/execute/sync", {"script": script, "args": []})

    def cdp(self, command: str, **params: Any) -> Any:
        return self._call("POST", f"{self._url}/goog/cdp/execute", {"cmd": command, "params": params})

    def press(self, *keys: str) -> None:
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", f"{self._url}/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def complaints(self) -> list[str]:
        """What the console holds since the last look: errors, and whatever the page's policy refused."""
        return [entry["message"] for entry in self._call("POST", f"{self._url}/se/log", {"type": "browser"})]

    def close(self) -> None:
        self._call("DELETE", self._url)

    def _call(self, method: str, url: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
        with self._open(request, timeout=30) as response:
            return json.load(response)["value"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    command = ["/usr/bin/chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        try:
            browser = Browser(f"http://127.0.0.1:{line.split()[-1].rstrip('.')}", tmp_path_factory.mktemp("profile"))
            yield browser
            browser.close()
        finally:
            driver.terminate()


DISTURBED = "other work waited for a CPU in 22.9 % of the time"
NO_RAPL = "energy: this machine shows no RAPL package counter"


@pytest.fixture(scope="session")
def make_stored() -> Callable[..., Stored]:
    return stored_of


def stored_of(
    directory: Path,
    *,
    model: str = "resnet18",
    precision: str = "fp32",
    runtime: str = "openvino-cpu",
    threads: int = 1,
    cpu: str = "CPU One",
    hard: dict[str, Any] | None = None,
    p50_ms: float = 2.0,
    size_mib: float = 10.0,
    accuracy: dict[str, Any] | None = None,
    gross_mj: float | None = None,
    macs: dict[str, int] | None = None,
    fallback_ops: tuple[str, ...] | None = None,
    valid: bool = True,
    utc: str = "2026-11-20T10:00:00+00:00",
    run_id: str | None = None,
    num_launches: int = 6,
    num_samples: int = 0,
    profile: dict[str, Any] | None = None,
) -> Stored:
    """A record as `edgestill bench` writes it, of one configuration; `num_samples` raw samples a launch are written."""
    arm = f"{model} {precision} {runtime} {threads} {cpu}"
    run_id = run_id or hashlib.sha256(f"{arm} {hard} {utc}".encode()).hexdigest()[:32]
    state = {
        "memory": {"vmhwm_mib": 90 + size_mib, "baseline_mib": 30.0, "pss_mib": None, "cgroup_peak_mib": None},
        "energy": {"source": "rapl package" if gross_mj else None, "rails": {}, "gross_mj": gross_mj}
        | {"idle_w": None, "net_mj": None},
        "telemetry": {"temp_c": None, "clk_mhz": None, "throttle_delta": None, "psi_cpu": 1.0},
    }
    launches = [
        {"i": i, "arm": arm, "order": i, "samples_file": f"samples/{run_id}-{i}.npy", **_timed(p50_ms), **state}
        | {"disturbances": [] if valid else [DISTURBED], "flags": []}
        for i in range(num_launches)
    ]
    machine = {"arch": "x86_64", "cpu": cpu, "cpus_allowed": [0, 1], "governor": None, **(hard or {})}
    record = {
        "schema_version": 1,
        "run_id": run_id,
        "utc": utc,
        "git": {"sha": None, "dirty": None},
        "model": {"name": f"{model}-int8" if precision == "int8" else model, "sha256": "a" * 64, "precision": precision}
        | {"bytes": round(size_mib * 2**20), "inputs": [{"name": "image", "shape": [None, 3, 224, 224]}]},
        "runtime": {"name": runtime, "version": f"{runtime} 1.0", "provider": "cpu", "flags": {"num_threads": threads}}
        | {"fallback_ops": fallback_ops, "ops_per_unit": macs},
        "scenario": {"kind": "single_stream", "preset": "ci", "batch": 1, "boundary": "runtime"}
        | {"warmup_s": 2.0, "min_s": 10.0, "min_q": 662, "seed": 0},
        "launches": launches,
        "summary": _summed(p50_ms, num_launches),
        "host_e2e": None,
        "throughput": None,
        **state,
        "accuracy": accuracy,
        "env": {"hard": machine, "soft": {}, "hard_sha256": "b" * 64, "flags": [NO_RAPL]},
        "validity": {"ok": valid, "flags": [NO_RAPL] if valid else [f"launch 0: {DISTURBED}", NO_RAPL]},
    }
    if num_samples:
        _write_samples(directory, [str(launch["samples_file"]) for launch in launches], p50_ms, num_samples)
    placement = None if macs is None else Placement(layers=_placed(macs), source="the executed graph")
    return Stored(
        arm=arm, record=validate(record), file=directory / "records.json", placement=placement, profile=profile
    )


def _timed(p50_ms: float) -> dict[str, Any]:
    us = 1e3 * p50_ms
    latency = {"min": 0.9 * us, "p25": 0.98 * us, "p50": us, "p90": 1.1 * us, "p99": None, "p999": None}
    times = {
        "load_ms": 80.0,
        "first_ms": 3 * p50_ms,
        "warmup_s": 0.5,
        "wall_s": 1.0,
        "cpu_s": 0.99,
        "overhead_us": 0.06,
    }
    return {"n": 700, "lat_us": {**latency, "mean": us, "sd": 1.0}, "nivcsw": 2, "majflt": 0, **times}


def _summed(p50_ms: float, num_launches: int) -> dict[str, Any]:
    """Six launches have an interval and, here, enough queries for a p99."""
    us, enough = 1e3 * p50_ms, num_launches >= 6
    latency = {"p25_us": 0.98 * us, "p50_us": us, "ci95": [0.97 * us, 1.04 * us] if enough else None}
    tails = {"es_p90_us": 1.1 * us, "es_p99_us": 1.3 * us if enough else None}
    return {**latency, **tails, "fps": 1e6 / us, "load_ms": 80.0, "first_ms": 3 * p50_ms}


def _placed(macs: dict[str, int]) -> tuple[LayerPlacement, ...]:
    return tuple(LayerPlacement(name=f"conv {one}", op="Conv", precision=one, macs=n) for one, n in macs.items())


def _write_samples(directory: Path, names: list[str], p50_ms: float, num_samples: int) -> None:
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        spread = np.random.default_rng(seed).gamma(80, 1 / 80, num_samples)
        np.save(directory / name, (1e6 * p50_ms * spread).astype(np.int64))
