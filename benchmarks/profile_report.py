"""What a profile says: `to_json()` for machines, `text()` for people. Values and their arithmetic; nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.device.record import MAX_PSI_PERCENT
from benchmarks.peak import Peak, time_at_peak_us
from benchmarks.terminal import aligned
from targets.errors import EdgestillError

SCHEMA_VERSION = 1
NUM_TOP = 15
MAX_NAME = 56
MAX_PROFILED = 1.02  # layers that sum up to more than this share of the p50 are told to hold the profiler's own time


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One executed layer: `time_us` a run, the median over the blocks; `macs` 0 for a layer without products."""

    name: str
    op: str
    precision: str
    macs: int
    time_us: float
    min_us: float
    kernel: str = ""

    @property
    def gops(self) -> float | None:
        """2 x multiply-accumulates a second in 10^9; None without products, or where the time is below what is counted."""
        return 2 * self.macs / self.time_us / 1e3 if self.macs and self.time_us > 0 else None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Where the time of a run goes that the products would not need at the peak, in microseconds."""

    products_us: float  # layers with products, beyond their time at the peak (all of it where the peak is not known)
    moves_us: float  # layers without products
    outside_us: float  # in no layer: the runtime between layers, copies in and out


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One model on one machine. `total_us` sums up its layers under the profiler, `p50_us` is measured without it."""

    model: str
    model_sha256: str
    target: str
    precision: str
    toolchain: str
    options: Mapping[str, Any]
    cpu: str | None
    isa: Mapping[str, Any]
    utc: str
    source: str
    resolution_us: float
    batch: int
    num_runs: int
    num_blocks: int
    preset: str
    layers: tuple[Layer, ...]
    total_us: float
    p50_us: float
    profiled_p50_us: float
    psi_cpu: float | None
    peaks: tuple[Peak, ...]
    failure: EdgestillError | None = None
    num_top: int = NUM_TOP

    @property
    def busy(self) -> bool:
        """Whether other work waited for a CPU for longer than a measurement may have: the p50 then holds its time too."""
        return self.psi_cpu is not None and self.psi_cpu > MAX_PSI_PERCENT

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates a run by the precision that they ran in."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if layer.macs:
                found[layer.precision] = found.get(layer.precision, 0) + layer.macs
        return found

    @property
    def gops(self) -> float:
        """Of the whole model: 2 x multiply-accumulates over the p50."""
        return 2 * sum(self.macs.values()) / self.p50_us / 1e3

    @property
    def share_of_peak(self) -> float | None:
        """The time that the products would take at the measured peaks of their precisions, over the p50.

        For one precision this is the model's GOP/s over the peak. Memory is not modelled: a layer that waits for memory has
        a small share, and no better kernel would raise it. None where `why_no_share` says why.
        """
        return None if self.why_no_share else time_at_peak_us(self.macs, self.peaks) / self.p50_us

    @property
    def why_no_share(self) -> str:
        if not self.macs:
            return "no layer of the model multiplies (no convolution, no matrix product)"
        known = {peak.precision: peak for peak in self.peaks}
        for precision in self.macs:
            peak = known.get(precision)
            if peak is None or peak.gops is None:
                return f"the peak of {precision} is not known: {peak.why if peak else 'it was not measured'}"
        return ""

    def peak_us(self, layer: Layer) -> float | None:
        """What a layer's products would take at the peak of its precision; None where that is not known."""
        peak = next((one for one in self.peaks if one.precision == layer.precision and one.gops), None)
        return None if peak is None or not layer.macs else time_at_peak_us({layer.precision: layer.macs}, [peak])

    @property
    def loss(self) -> Loss:
        beyond = [max(layer.time_us - (self.peak_us(layer) or 0.0), 0.0) for layer in self.layers if layer.macs]
        return Loss(
            products_us=sum(beyond),
            moves_us=sum(layer.time_us for layer in self.layers if not layer.macs),
            outside_us=max(self.p50_us - self.total_us, 0.0),
        )

    def to_json(self) -> dict[str, Any]:
        derived = {"layers": [self._layer_json(layer) for layer in self.layers]}
        left_out = {"layers", "peaks", "failure", "num_top"}
        return {
            "schema_version": SCHEMA_VERSION,
            "verb": "profile",
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out},
            **derived,
            "peak": {peak.precision: asdict(peak) for peak in self.peaks},
            "macs": self.macs,
            "gops": self.gops,
            "share_of_peak": self.share_of_peak,
            "why_no_share": self.why_no_share or None,
            "loss": asdict(self.loss),
            "error": str(self.failure) if self.failure else None,
            "exit_code": self.failure.exit_code if self.failure else 0,
        }

    def text(self) -> str:
        threads = self.options.get("num_threads")
        head = f"{self.model} on {self.target}: {self.precision}, {self.toolchain}"
        lines = [
            head + (f", {threads} thread{'s' if threads != 1 else ''}" if threads else "") + f", batch {self.batch}",
            f"{self.cpu or 'CPU'}: {self.isa['words']}",
            "",
            *(aligned([self._cells(layer) for layer in self._slowest()]) or ["no layer was timed"]),
            *self._rest_lines(),
            "",
            *self._op_lines(),
            "",
            *self._time_lines(),
            *map(_peak_line, self.peaks),
            *self._share_lines(),
            *self._doubt_lines(),
        ]
        return "\n".join(lines)

    def _layer_json(self, layer: Layer) -> dict[str, Any]:
        peak_us = self.peak_us(layer)
        share = peak_us / layer.time_us if peak_us is not None and layer.time_us > 0 else None
        return {**asdict(layer), "gops": layer.gops, "share_of_peak": share}

    def _slowest(self) -> list[Layer]:
        return sorted(self.layers, key=lambda layer: -layer.time_us)[: self.num_top]

    def _share(self, time_us: float) -> str:
        return f"{time_us / self.total_us:.1%}" if self.total_us > 0 else "-"

    def _cells(self, layer: Layer) -> dict[str, str]:
        peak_us = self.peak_us(layer)
        return {
            "layer": shortened(layer.name),
            "op": layer.op,
            "runs in": layer.precision,
            "us": f"{layer.time_us:.0f}",
            "share": self._share(layer.time_us),
            "M MACs": f"{layer.macs / 1e6:.2f}" if layer.macs else "-",
            "GOP/s": "-" if layer.gops is None else f"{layer.gops:.1f}",
            "of peak": f"{peak_us / layer.time_us:.0%}" if peak_us is not None and layer.time_us > 0 else "-",
        }

    def _rest_lines(self) -> list[str]:
        rest = sorted(self.layers, key=lambda layer: -layer.time_us)[self.num_top :]
        if not rest:
            return []
        return [f"and {len(rest)} more: {self._share(sum(layer.time_us for layer in rest))}"]

    def _op_lines(self) -> list[str]:
        return [
            f"{op} {precision}: {self._share(time_us)} in {count} layer{'s' if count != 1 else ''}"
            for (op, precision), (time_us, count) in by_op(self.layers).items()
        ]

    def _time_lines(self) -> list[str]:
        counted = f", each up to {self.resolution_us:g} us off" if self.resolution_us else ""
        return [
            f"time   {self.p50_us / 1e3:.3f} ms p50 without the profiler, {self.profiled_p50_us / 1e3:.3f} ms with it; "
            f"its {len(self.layers)} layers sum up to {self.total_us / 1e3:.3f} ms{counted}",
            f"       {self.source}; {self.num_runs} runs each way in {self.num_blocks} blocks, seeded synthetic input",
        ]

    def _share_lines(self) -> list[str]:
        share = self.share_of_peak
        if share is None:
            return [f"share of peak compute: not known, for {self.why_no_share}", self._advice()]
        at_peak_ms = time_at_peak_us(self.macs, self.peaks) / 1e3
        return [
            f"share of peak compute: {share:.1%} ({2 * sum(self.macs.values()) / 1e9:.3f} GOP would take {at_peak_ms:.3f} ms at "
            f"the peak and take {self.p50_us / 1e3:.3f} ms; {self.gops:.1f} GOP/s)",
            self._advice(),
        ]

    def _advice(self) -> str:
        """One sentence: the largest of the three losses, and what it is made of.

        On a busy machine the time outside of layers is the other work's, so it is not looked at.
        """
        loss = self.loss
        outside_us = 0.0 if self.busy else loss.outside_us
        largest = max(loss.products_us, loss.moves_us, outside_us)
        if largest <= 0:
            return "look at nothing: no time is lost that can be told."
        if largest == outside_us:
            return (
                f"look at the number of layers first: {loss.outside_us / self.p50_us:.0%} of the time is in none of the "
                f"{len(self.layers)}, but between them and in copies. Fewer and larger layers, or a larger batch, would help."
            )
        if largest == loss.moves_us:
            (op, _), (time_us, count) = next(iter(by_op([one for one in self.layers if not one.macs]).items()))
            return (
                f"look at what does not multiply first: {self._share(loss.moves_us)} of the layers' time, most of it {op} "
                f"({self._share(time_us)} in {count} layer{'s' if count != 1 else ''})."
            )
        return self._advice_on_products()

    def _advice_on_products(self) -> str:
        lost = {layer: layer.time_us - (self.peak_us(layer) or 0.0) for layer in self.layers if layer.macs}
        worst = max(lost, key=lambda layer: lost[layer])
        told = f"{shortened(worst.name)}, {worst.op} in {worst.precision}"
        if self.peak_us(worst) is None:
            return (
                f"look at the products first, most of all at {told}: {self._share(worst.time_us)} of the layers' time."
            )
        return (
            f"look at the products first: {self._share(self.loss.products_us)} of the layers' time is beyond what they would "
            f"take at the peak, the most of it in {told} ({self._share(lost[worst])})."
        )

    def _doubt_lines(self) -> list[str]:
        lines = []
        if self.layers and self.total_us > MAX_PROFILED * self.p50_us:
            added_us = (self.total_us - self.p50_us) / len(self.layers)
            lines.append(
                f"note: the profiler adds about {added_us:.1f} us to each layer, so short ones are faster than they look here."
            )
        if self.busy:
            lines.append(
                f"note: other work waited for a CPU in {self.psi_cpu:.0f} % of the time. Profile again when it is quiet."
            )
        if (self.share_of_peak or 0.0) > 1:
            lines.append(
                "note: more than the peak: that was measured on a busier machine. Measure it anew with --fresh-peak."
            )
        if self.preset == "smoke":
            lines.append("note: smoke is a short look. Quote figures of --preset ci or release.")
        return lines


def by_op(layers: Sequence[Layer]) -> dict[tuple[str, str], tuple[float, int]]:
    """(op, precision) -> (microseconds, number of layers), the longest first."""
    found: dict[tuple[str, str], tuple[float, int]] = {}
    for layer in layers:
        time_us, count = found.get((layer.op, layer.precision), (0.0, 0))
        found[layer.op, layer.precision] = (time_us + layer.time_us, count + 1)
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def shortened(name: str, limit: int = MAX_NAME) -> str:
    """Without its middle: exporters write the path of modules in front and the kind of layer behind."""
    if len(name) <= limit:
        return name
    head = (limit - 3) // 2
    return f"{name[:head]}...{name[len(name) - (limit - 3 - head) :]}"


def _peak_line(peak: Peak) -> str:
    if peak.gops is None:
        return f"peak   {peak.precision}: not known: {peak.why}"
    when = f"measured {peak.utc}" + (", kept since" if peak.cached else " just now")
    busy = "" if peak.quiet else f", while other work waited for a CPU in {peak.psi_cpu:.0f} % of the time"
    return f"peak   {peak.precision}: {peak.gops:.1f} GOP/s ({peak.layer}; {when}{busy})" + (
        f"; {peak.note}" if peak.note else ""
    )
