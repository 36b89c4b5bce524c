"""The arithmetic of a profile and what it tells a person."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.peak import Peak, time_at_peak_us
from benchmarks.profile_report import Layer, Profile, by_op, shortened

INT8 = Peak(precision="int8", gops=400.0, layer="conv_3x3_128_at_28", utc="2026-11-25T08:00:00+00:00")
FP32 = Peak(precision="fp32", gops=100.0, layer="matmul_512", utc="2026-11-25T08:00:00+00:00", cached=True)


def layer(
    name: str = "conv", *, macs: int = 0, time_us: float = 1.0, precision: str = "int8", op: str = "Conv"
) -> Layer:
    return Layer(name=name, op=op, precision=precision, macs=macs, time_us=time_us, min_us=time_us)


def made(*layers: Layer, peaks: tuple[Peak, ...] = (INT8, FP32), p50_us: float = 100.0, **changed: Any) -> Profile:
    values: dict[str, Any] = {
        "model": "net",
        "model_sha256": "0" * 64,
        "target": "onnxruntime-cpu",
        "precision": "int8",
        "toolchain": "onnxruntime 1.32.0",
        "options": {"num_threads": 2},
        "cpu": "a CPU",
        "isa": {"words": "AVX-512; INT8 by AVX-512 VNNI", "int8": "AVX-512 VNNI", "bf16": ""},
        "utc": "2026-11-25T08:00:00+00:00",
        "source": "a profiler",
        "resolution_us": 1.0,
        "batch": 1,
        "num_runs": 30,
        "num_blocks": 3,
        "preset": "ci",
        "layers": layers,
        "total_us": sum(one.time_us for one in layers),
        "p50_us": p50_us,
        "profiled_p50_us": p50_us * 1.1,
        "psi_cpu": None,
        "peaks": peaks,
    }
    return Profile(**{**values, **changed})


def test_the_share_of_one_precision_is_the_models_speed_over_the_peak() -> None:
    # 10 M MACs in 100 us are 200 GOP/s; the peak is 400.
    profile = made(layer(macs=10_000_000, time_us=90.0))

    assert profile.gops == 200.0
    assert profile.share_of_peak == 0.5


def test_the_share_of_two_precisions_is_their_time_at_their_peaks_over_the_p50() -> None:
    # 10 M MACs at 400 GOP/s take 50 us, 2 M at 100 GOP/s take 40 us: 90 of 180 us.
    profile = made(layer("a", macs=10_000_000), layer("b", macs=2_000_000, precision="fp32"), p50_us=180.0)

    assert profile.share_of_peak == pytest.approx(0.5)


def test_a_model_that_multiplies_nothing_has_no_share_and_says_why() -> None:
    profile = made(layer(op="Relu", time_us=50.0))

    assert profile.share_of_peak is None
    assert profile.gops == 0.0
    assert "no layer of the model multiplies" in profile.to_json()["why_no_share"]
    assert "not known" in profile.text()


def test_a_model_without_layers_is_told_as_such() -> None:
    profile = made()

    assert profile.share_of_peak is None
    assert "no layer was timed" in profile.text()


def test_without_the_peak_of_one_precision_there_is_no_share_of_the_rest() -> None:
    refused = Peak(precision="fp32", gops=None, why="dense layers that were built for fp32 ran in bf16")
    profile = made(layer("a", macs=10), layer("b", macs=10, precision="fp32"), peaks=(INT8, refused))

    assert profile.share_of_peak is None
    assert "ran in bf16" in profile.text()


def test_a_layer_quicker_than_the_profiler_counts_has_no_speed() -> None:
    profile = made(layer(macs=10, time_us=0.0))

    assert profile.layers[0].gops is None
    assert profile.to_json()["layers"][0]["share_of_peak"] is None
    assert profile.text()


def test_what_is_lost_is_split_into_products_moves_and_the_rest() -> None:
    profile = made(layer("conv", macs=10_000_000, time_us=60.0), layer("t", op="Transpose", time_us=25.0), p50_us=100.0)

    assert (profile.loss.products_us, profile.loss.moves_us, profile.loss.outside_us) == (10.0, 25.0, 15.0)


@pytest.mark.parametrize(
    ("layers", "p50_us", "told"),
    [
        ((layer("slow/conv", macs=1_000_000, time_us=80.0), layer(op="Relu")), 85.0, "look at the products first"),
        ((layer(macs=10_000_000, time_us=50.0), layer(op="Transpose", time_us=40.0)), 90.0, "most of it Transpose"),
        ((layer(macs=10_000_000, time_us=50.0), layer(op="Relu")), 200.0, "look at the number of layers first"),
    ],
)
def test_the_last_sentence_names_the_largest_loss(layers: tuple[Layer, ...], p50_us: float, told: str) -> None:
    assert told in made(*layers, p50_us=p50_us).text()


def test_the_time_of_other_work_is_not_blamed_on_the_model() -> None:
    profile = made(layer(macs=10_000_000, time_us=60.0), p50_us=900.0, psi_cpu=80.0)

    assert "number of layers" not in profile.text()
    assert "other work waited for a CPU in 80 %" in profile.text()


def test_more_than_the_peak_is_told_and_not_cut_off() -> None:
    profile = made(layer(macs=40_000_000, time_us=90.0))

    assert profile.share_of_peak == 2.0
    assert "--fresh-peak" in profile.text()


def test_layers_that_sum_up_to_more_than_the_plain_run_tell_of_the_profiler() -> None:
    assert "the profiler adds about 20.0 us to each layer" in made(layer(time_us=70.0), layer(time_us=70.0)).text()
    assert "the profiler adds" not in made(layer(time_us=99.0)).text()


def test_the_table_shows_the_slowest_and_sums_up_the_rest() -> None:
    profile = made(*(layer(f"l{i}", time_us=float(i + 1)) for i in range(5)), num_top=2)

    lines = profile.text().splitlines()

    header = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["l4", "l3"]
    assert lines[header + 3] == "and 3 more: 40.0%"


def test_the_kinds_of_layers_are_summed_up_the_longest_first() -> None:
    layers = [layer(op="Conv", time_us=2.0), layer(op="Relu", time_us=9.0), layer(op="Conv", time_us=3.0)]

    assert by_op(layers) == {("Relu", "int8"): (9.0, 1), ("Conv", "int8"): (5.0, 2)}
    assert list(by_op(layers)) == [("Relu", "int8"), ("Conv", "int8")]


def test_a_long_name_keeps_its_two_ends() -> None:
    name = "/features/" + "x" * 80 + "/conv/Conv"

    assert len(shortened(name, 40)) == 40
    assert shortened(name, 40).startswith("/features/")
    assert shortened(name, 40).endswith("/conv/Conv")
    assert shortened("conv", 40) == "conv"


def test_the_peak_is_always_told_with_when_it_was_measured() -> None:
    text = made(layer(macs=10)).text()

    assert "int8: 400.0 GOP/s (conv_3x3_128_at_28; measured 2026-11-25T08:00:00+00:00 just now)" in text
    assert "fp32: 100.0 GOP/s (matmul_512; measured 2026-11-25T08:00:00+00:00, kept since)" in text


def test_the_document_is_json_and_holds_what_the_hardware_report_reads() -> None:
    document = json.loads(json.dumps(made(layer("conv", macs=10_000_000, time_us=60.0)).to_json(), allow_nan=False))

    assert {"source", "layers", "total_us", "p50_us", "peak", "share_of_peak"} <= document.keys()
    assert {"name", "op", "precision", "macs", "time_us"} <= document["layers"][0].keys()
    assert document["peak"]["int8"]["gops"] == 400.0
    assert document["exit_code"] == 0


def test_time_at_the_peak_wants_the_peak_of_every_precision() -> None:
    assert time_at_peak_us({"int8": 1_000_000, "fp32": 0}, [INT8]) == 5.0
    with pytest.raises(KeyError):
        time_at_peak_us({"fp32": 1}, [INT8])
