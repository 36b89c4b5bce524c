import gc
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.device import measure
from benchmarks.device.evaluate import batch_of, padded
from benchmarks.device.measure import PRESETS, cool_down, synthetic_batch, warm_up
from benchmarks.device.timing import elapsed_ms, measure_latency_ns
from targets.base import Preprocessing, TensorSpec
from targets.errors import MeasurementError

SMOKE = PRESETS["smoke"]


class FakeQuery:
    """Takes the given seconds on a clock of its own; the last one for ever after."""

    def __init__(self, seconds: Iterable[float]) -> None:
        self.seconds = list(seconds)
        self.now, self.num_calls, self.collecting = 0, 0, True

    def __call__(self) -> None:
        self.now += round(self.seconds[min(self.num_calls, len(self.seconds) - 1)] * 1e9)
        self.num_calls += 1
        self.collecting = gc.isenabled()

    def now_ns(self) -> int:
        return self.now


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=200))
def test_samples_are_the_durations_in_call_order(seconds: list[float]) -> None:
    query = FakeQuery(seconds)

    samples_ns = measure_latency_ns(query, min_s=0.0, min_queries=len(seconds), clock_ns=query.now_ns)

    assert samples_ns.tolist() == [round(value * 1e9) for value in seconds]


def test_goes_on_until_both_the_time_and_the_count_are_reached() -> None:
    slow, quick = FakeQuery([0.5]), FakeQuery([0.001])

    slow_ns = measure_latency_ns(slow, min_s=1.0, min_queries=64, clock_ns=slow.now_ns)
    quick_ns = measure_latency_ns(quick, min_s=1.0, min_queries=64, clock_ns=quick.now_ns)

    assert (len(slow_ns), len(quick_ns)) == (64, 1000)


def test_a_slow_model_stops_at_the_limit_after_one_call_at_least() -> None:
    slow, endless = FakeQuery([3.0]), FakeQuery([100.0])

    assert len(measure_latency_ns(slow, min_s=1.0, min_queries=64, max_s=10.0, clock_ns=slow.now_ns)) == 4
    assert len(measure_latency_ns(endless, min_s=1.0, min_queries=64, max_s=0.0, clock_ns=endless.now_ns)) == 1


def test_the_collector_is_off_while_timing_and_back_afterwards() -> None:
    query = FakeQuery([0.001])
    measure_latency_ns(query, min_s=0.0, min_queries=3, clock_ns=query.now_ns)

    assert not query.collecting
    assert gc.isenabled()


def test_the_collector_comes_back_when_the_query_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        measure_latency_ns(lambda: 1 // 0, min_s=0.0, min_queries=1)

    assert gc.isenabled()


class FakeClock:
    """Steps by the given seconds at each look, in turn for ever."""

    def __init__(self, *steps_s: float) -> None:
        self.steps, self.now, self.num_looks = itertools.cycle(steps_s), 10**12, 0

    def __call__(self) -> int:
        self.now += round(next(self.steps) * 1e9)
        self.num_looks += 1
        return self.now


@pytest.mark.parametrize("min_queries", [1, 64, 5000])
def test_a_clock_that_stands_still_ends_the_loop(min_queries: int) -> None:
    samples_ns = measure_latency_ns(lambda: None, min_s=1.0, min_queries=min_queries, clock_ns=FakeClock(0.0))

    assert set(samples_ns) == {0}
    assert len(samples_ns) <= 8192


def test_a_clock_that_runs_backwards_ends_the_loop_at_once() -> None:
    assert measure_latency_ns(lambda: None, min_s=1.0, min_queries=64, clock_ns=FakeClock(-0.001)).tolist() == [
        -1_000_000
    ]


def test_a_clock_that_goes_back_once_by_an_hour_does_not_add_an_hour() -> None:
    steps = [0.001] * 20 + [-3600.0] + [0.001] * 100_000
    clock = FakeClock(*steps)

    samples_ns = measure_latency_ns(lambda: None, min_s=1.0, min_queries=64, clock_ns=clock)

    assert len(samples_ns) <= 11
    assert min(samples_ns) < 0


def test_a_clock_that_goes_back_between_two_calls_ends_the_loop_too() -> None:
    clock = FakeClock(*[0.001] * 21, -3600.0, *[0.001] * 100_000)

    assert len(measure_latency_ns(lambda: None, min_s=1.0, min_queries=64, clock_ns=clock)) <= 12


def test_a_leap_of_the_clock_is_one_sample_that_stays_what_it_is() -> None:
    samples_ns = measure_latency_ns(
        lambda: None, min_s=1.0, min_queries=4, max_s=10.0, clock_ns=FakeClock(0.001, 0.001, 0.001, 0.001, 3600.0)
    )

    assert samples_ns.tolist() == [1_000_000, 3_600_000_000_000]


@pytest.mark.parametrize("step_s", [0.0, -0.001])
@pytest.mark.parametrize("preset", ["smoke", "ci"])
def test_warm_up_ends_unsettled_on_a_clock_that_does_not_move_on(preset: str, step_s: float) -> None:
    warmup_s, settled = warm_up(lambda: None, PRESETS[preset], FakeClock(step_s))

    assert (warmup_s, settled) == (0.0, False)


@pytest.mark.parametrize("end_ns", [5, 4])
def test_no_time_between_two_stamps_is_refused_by_what_was_timed(end_ns: int) -> None:
    assert elapsed_ms(0, 2_000_000, "loading the model") == 2.0
    with pytest.raises(MeasurementError, match="loading the model took"):
        elapsed_ms(5, end_ns, "loading the model")


def test_smoke_warms_up_for_half_a_second_whatever_the_medians_do() -> None:
    query = FakeQuery(itertools.islice(itertools.cycle([0.01, 0.04]), 1000))

    warmup_s, settled = warm_up(query, SMOKE, query.now_ns)

    assert settled
    assert 0.5 <= warmup_s < 0.6


def test_warm_up_goes_on_until_two_blocks_agree() -> None:
    cooling = FakeQuery([0.1] * 5 + [0.05] * 10 + [0.025] * 20 + [0.01] * 10_000)

    warmup_s, settled = warm_up(cooling, replace(PRESETS["ci"], warmup_s=0.5), cooling.now_ns)

    assert settled
    assert warmup_s == pytest.approx(2.5)  # four blocks that differ and one that repeats the fourth


def test_warm_up_that_never_settles_ends_at_the_cap_and_says_so() -> None:
    slowing = FakeQuery(0.001 * 1.05**i for i in range(400))

    warmup_s, settled = warm_up(slowing, PRESETS["ci"], slowing.now_ns)

    assert not settled
    assert warmup_s >= 30.0


@pytest.mark.parametrize(
    ("name", "warmup_s", "min_s", "min_queries", "launches", "cool_down_s", "retries"),
    [
        ("smoke", 0.5, 1.0, 64, 3, 0.0, 0),
        ("ci", 2.0, 10.0, 662, 10, 60.0, 2),
        ("release", 2.0, 60.0, 6636, 20, 300.0, 2),
    ],
)
def test_presets_hold_the_agreed_figures(
    name: str, warmup_s: float, min_s: float, min_queries: int, launches: int, cool_down_s: float, retries: int
) -> None:
    preset = PRESETS[name]

    assert (preset.warmup_s, preset.min_s, preset.min_queries) == (warmup_s, min_s, min_queries)
    assert (preset.launches, preset.cool_down_s, preset.retries) == (launches, cool_down_s, retries)


def test_cool_down_waits_for_the_first_launchs_temperature() -> None:
    temperatures, waited = iter([60.0, 55.0, 51.9]), list[float]()

    cool_down(50.0, 60.0, [], read_c=lambda _: next(temperatures), sleep=waited.append)

    assert waited == [1.0, 1.0]


def test_cool_down_gives_up_at_its_cap_with_a_flag() -> None:
    flags, waited = list[str](), list[float]()

    cool_down(50.0, 3.0, flags, read_c=lambda _: 90.0, sleep=waited.append)

    assert len(waited) == 3
    assert flags == ["cool-down: still 90 C after 3 s, the first launch began at 50 C"]


@given(st.sampled_from(["uint8", "float32", "float16", "int64", "int32", "bool"]), st.integers(1, 4), st.integers(0, 9))
def test_synthetic_values_fit_the_graph_and_follow_from_the_seed(dtype: str, batch: int, seed: int) -> None:
    spec = TensorSpec(name="image", shape=(None, 3, 4), dtype=dtype)

    first, again = synthetic_batch([spec], batch, seed), synthetic_batch([spec], batch, seed)

    assert first["image"].shape == (batch, 3, 4)
    assert first["image"].dtype == np.dtype(dtype)
    assert np.array_equal(first["image"], again["image"])


def test_synthetic_pixels_differ_between_seeds_and_use_the_whole_range() -> None:
    spec = TensorSpec(name="image", shape=(None, 3, 64, 64), dtype="uint8")

    x, other = (synthetic_batch([spec], 1, seed)["image"] for seed in (0, 1))

    assert (x.min(), x.max()) == (0, 255)
    assert not np.array_equal(x, other)


def test_a_fixed_batch_wins_over_the_wanted_one() -> None:
    free = TensorSpec(name="x", shape=(None, 3), dtype="float32")

    assert batch_of([free], 32) == 32
    assert batch_of([free, replace(free, name="y", shape=(4, 3))], 32) == 4


def test_padding_repeats_the_last_sample() -> None:
    assert padded(np.array([[1], [2]]), 4).tolist() == [[1], [2], [2], [2]]
    assert padded(np.array([[1], [2]]), 2).tolist() == [[1], [2]]


class EchoSession:
    """Answers with a logit at the class that the first pixel names."""

    inputs = (TensorSpec(name="image", shape=(1, 1, 2, 2), dtype="uint8"),)
    outputs = (TensorSpec(name="logits", shape=(1, 10), dtype="float32"),)

    def run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": np.eye(10, dtype=np.float32)[batch["image"].reshape(1, -1)[:, 0]]}


def test_host_e2e_goes_from_encoded_bytes_to_the_label_image_after_image(tmp_path: Path) -> None:
    from PIL import Image

    encoded = []
    for label in (3, 7):
        Image.fromarray(np.full((2, 2), label, dtype=np.uint8)).save(tmp_path / "image.png")
        encoded.append((tmp_path / "image.png").read_bytes())
    query = measure.EncodedToLabel(EchoSession(), itertools.cycle(encoded), Preprocessing(mode="L"))

    assert [query(), query(), query()] == [3, 7, 3]
