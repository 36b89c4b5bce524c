"""What the page's figures are drawn from: quantiles of the raw samples, shares of the arithmetic, the layers that take longest.

Reads the .npy samples that a record names, its placement and its profile. The page draws, since its figures follow the
filter; what is kept here for each row is small enough for hundreds of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.device.disturbances import positive
from benchmarks.hardware.rows import HardwareRow, is_number
from targets.base import Array

MAX_QUANTILES, MIN_QUANTILES, QUANTILES_IN_ALL = 200, 40, 20_000
MAX_LAYERS, MIN_LAYERS, LAYERS_IN_ALL = 25, 8, 2_400
MAX_NAME = 80


def curve_of(row: HardwareRow, num_rows: int) -> tuple[list[float], list[str]]:
    """(quantiles in ms, evenly spaced in probability up to the slowest call; what is missing), over all launches.

    At most 200 points, fewer where many rows share the page. A file that is absent, unreadable, outside of the record's
    directory or without a time above zero is told and left out.
    """
    samples, missing = [], []
    for launch in row.stored.record.launches:
        try:
            samples.append(_samples_ns(row.stored.directory, launch.samples_file))
        except (OSError, ValueError, EOFError) as error:
            missing.append(f"{launch.samples_file}: {_why(error)}")
    if not samples:
        return [], missing
    pooled_ms = np.concatenate(samples) / 1e6
    num = min(_share(QUANTILES_IN_ALL, num_rows, MIN_QUANTILES, MAX_QUANTILES), pooled_ms.size)
    quantiles = np.quantile(pooled_ms, np.arange(1, num + 1) / num, method="inverted_cdf")
    return [float(f"{value:.4g}") for value in quantiles], missing


def layers_of(profile: Mapping[str, Any] | None, num_rows: int) -> dict[str, Any] | None:
    """The layers that take longest, [name, op, precision, MACs, microseconds] each, and the time of all others together.

    None without a profile, or where none of its layers has a time.
    """
    timed = [layer for layer in (profile or {}).get("layers") or () if _is_time(layer)]
    if profile is None or not timed:
        return None
    timed.sort(key=lambda layer: -float(layer["time_us"]))
    top = timed[: _share(LAYERS_IN_ALL, num_rows, MIN_LAYERS, MAX_LAYERS)]
    rest_us = sum(float(layer["time_us"]) for layer in timed[len(top) :])
    return {
        "source": str(profile.get("source") or "the runtime's profiler"),
        "total_us": _rounded(sum(float(layer["time_us"]) for layer in timed)),
        "top": [_layer(layer) for layer in top],
        "rest": {"num": len(timed) - len(top), "us": _rounded(rest_us)},
    }


def history_of(history: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> list[dict[str, Any]]:
    """A line a series, oldest first: times, p50 in ms, and what is marked at a point (a text, or None)."""
    lines = []
    for name, points in (history or {}).items():
        known = sorted((one for one in points if is_number(one.get("p50_ms"))), key=lambda one: str(one["utc"]))
        if known:
            lines.append(
                {
                    "name": str(name),
                    "utc": [str(one["utc"]) for one in known],
                    "ms": [_rounded(float(one["p50_ms"])) for one in known],
                    "mark": [_mark(one.get("mark")) for one in known],
                }
            )
    return lines


def _samples_ns(directory: Path, name: str) -> Array:
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ValueError("outside of the record's directory")
    samples = np.load(path, allow_pickle=False)
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.size == 0 or samples.dtype.kind not in "iuf":
        raise ValueError("no list of numbers")
    kept = positive(samples[np.isfinite(samples)])
    if kept.size == 0:
        raise ValueError("no time above zero")
    return kept


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "absent"
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def _share(in_all: int, num_rows: int, least: int, most: int) -> int:
    return max(least, min(most, in_all // max(num_rows, 1)))


def _is_time(layer: Any) -> bool:
    return isinstance(layer, Mapping) and is_number(layer.get("time_us")) and layer["time_us"] >= 0


def _layer(layer: Mapping[str, Any]) -> list[Any]:
    name = str(layer.get("name", ""))
    shown = name if len(name) <= MAX_NAME else f"…{name[-MAX_NAME:]}"  # the end of a path tells layers apart
    precision, op = (str(layer.get(key) or "") for key in ("precision", "op"))
    return [shown, op, precision, _macs(layer.get("macs")), _rounded(float(layer["time_us"]))]


def _macs(value: Any) -> int:
    return int(value) if is_number(value) else 0


def _mark(mark: Any) -> str | None:
    if mark is None or mark is False or mark == "":
        return None
    return "change" if mark is True else str(mark)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
