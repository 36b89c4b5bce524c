"""The program on the device: one command, one JSON document on stdout, one exit code.

Run as `python3 edgestill-device.pyz COMMAND`. Failures are {"error", "exit_code"} and that exit code, never a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from targets.errors import DeviceError, EdgestillError, RecipeError, first_line

PR_SET_PDEATHSIG = 1


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line as every other failure."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{self.prog}: {message}. See: {self.prog} --help.")


def main(argv: Sequence[str]) -> int:
    """Run one command and print its JSON; returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], dict[str, Any]] = arguments.command
        document, exit_code = command(arguments), 0
    except EdgestillError as error:
        document, exit_code = {"error": str(error), "exit_code": error.exit_code}, error.exit_code
    except Exception as error:
        said, exit_code = f"{type(error).__name__}: {error}", 1
        if _disk_is_full(error):
            said = f"no space is left on the device's disk ({first_line(error)}). Make room there, then run the same again."
            exit_code = DeviceError.exit_code
        document = {"error": said, "exit_code": exit_code}
    print(json.dumps(document), flush=True)
    return exit_code


def _disk_is_full(error: Exception) -> bool:
    """As the system says it, a runtime from C++, or numpy, whose OSError of a write that fell short has no number."""
    fell_short = isinstance(error, OSError) and str(error).endswith(" written")
    return fell_short or any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def run() -> int:
    """`main` for a process of its own: what runtimes print to stdout, from C++ too, goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answer, "w", encoding="utf-8")
    return main(sys.argv[1:])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="edgestill-device", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = _command(commands, "verify", _verify, "check every byte of a bundle and replay its golden input")
    verify.add_argument("bundle", type=Path)
    verify.add_argument(
        "--public-key", type=Path, help="the bundle must be signed with this key (PEM; needs cryptography)"
    )

    probe = _command(commands, "probe", _probe, "what a target lacks and offers on this machine")
    compile_ = _command(commands, "compile", _compile, "compile an exported graph on this machine")
    for command in (probe, compile_):
        command.add_argument("--target", required=True)
        command.add_argument("--options", type=_json_object, default={})
    compile_.add_argument("--exported", type=Path, required=True)
    compile_.add_argument("--precision", required=True)
    compile_.add_argument("--out", type=Path, required=True)

    evaluate = _command(commands, "evaluate", _evaluate, "save what a model answers on an evaluation set")
    evaluate.add_argument("--evaluation", type=Path, required=True)
    evaluate.add_argument("--out", type=Path, required=True)
    evaluate.add_argument("--batch", type=_count, default=1)
    evaluate.add_argument("--source", choices=("shards", "encoded"), default="shards")

    answer = _command(commands, "answer", _answer, "save what a model of any inputs answers to given samples")
    answer.add_argument("--inputs", type=Path, required=True, help="an .npz of i_s: input i of sample s")
    answer.add_argument("--out", type=Path, required=True, help="the .npz of answers")

    placement = _command(commands, "placement", _placement, "what the runtime's executed graph says")
    _turns(commands)
    for command in (evaluate, answer, placement, *_measuring(commands), _taking(commands)):
        command.add_argument("--compiled", type=Path, required=True)
    _command(commands, "environment", _environment, "the fingerprint of this machine")
    first = _command(commands, "first-run", _first_run, "build, check and measure a kit; one file to send back")
    first.add_argument("kit", type=Path)
    first.add_argument("--out", type=Path, required=True, help="the result: one JSON file")
    first.add_argument("--target", help="another target than the kit's")
    first.add_argument("--preset", choices=("smoke", "ci", "release"), default="smoke")
    first.add_argument("--launches", type=_count, help="how often each precision is measured (default: the preset's)")
    first.add_argument("--work", type=Path, help="keep engines, answers and raw samples in this new directory")
    return parser


def _measuring(commands: Any) -> list[argparse.ArgumentParser]:
    """The commands that look how a compiled model runs."""
    measure = _command(commands, "measure", _measure, "one launch: load, warm up, time")
    measure.add_argument("--evaluation", type=Path)
    measure.add_argument("--boundary", choices=("runtime", "host_e2e"), default="runtime")
    measure.add_argument("--out", type=Path, required=True, help="the raw samples: .npy, int64 nanoseconds")
    measure.add_argument("--device-out", type=Path, help="the runtime's own times, of a pass of its own: .npy")
    measure.add_argument("--start-temp-c", type=float)
    measure.add_argument("--inject-us", type=_wait_us, help="busy-wait so long in each timed call: slower on purpose")
    throughput = _command(commands, "throughput", _throughput, "samples a second, back to back")
    profile = _command(commands, "profile", _profile, "what each layer takes, by the runtime's own profiler")
    memory = _command(commands, "memory", _memory, "the peak of a process that loads and runs a model, nothing timed")
    memory.add_argument("--options", type=_json_object, default={}, help="of the target, other than those compiled for")
    for command in (measure, throughput):
        command.add_argument("--short", action="store_true", help="a quarter of the preset's window")
    for command in (measure, throughput, profile):
        command.add_argument("--preset", choices=("smoke", "ci", "release"), default="smoke")
    for command in (measure, throughput, profile, memory):
        command.add_argument("--seed", type=int, default=0)
    return [measure, throughput, profile, memory]


def _turns(commands: Any) -> None:
    turns = _command(commands, "turns", _measure_duet, "one launch each of two models, whose processes take turns")
    turns.add_argument("--compiled", type=Path, nargs=2, required=True, metavar=("A", "B"))
    turns.add_argument("--out", type=Path, nargs=2, required=True, help="the raw samples of either", metavar=("A", "B"))
    turns.add_argument("--evaluation", type=Path, nargs=2, metavar=("A", "B"))
    turns.add_argument(
        "--inject-us", type=_wait_us, nargs=2, default=(0.0, 0.0), help="busy waits; 0: none", metavar=("A", "B")
    )
    turns.add_argument("--preset", choices=("smoke", "ci", "release"), default="smoke")
    turns.add_argument("--seed", type=int, default=0, help="of the inputs")
    turns.add_argument("--chance", default="", help="the seed of who is first, who begins a round, and of the CPUs")
    turns.add_argument("--any-cpus", action="store_true", help="do not hold both to the same CPUs")
    turns.add_argument("--start-temp-c", type=float)


def _taking(commands: Any) -> argparse.ArgumentParser:
    take = _command(commands, "take-turns", _take_turns, "one of the two, told what to do on standard input")
    take.add_argument("--out", type=Path, required=True)
    take.add_argument("--evaluation", type=Path)
    take.add_argument("--inject-us", type=_wait_us)
    take.add_argument("--preset", choices=("smoke", "ci", "release"), default="smoke")
    take.add_argument("--seed", type=int, default=0)
    take.add_argument("--cpus", type=_cpus)
    return take


def _command(commands: Any, name: str, function: Callable[..., dict[str, Any]], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("not 1 or more")
    return value


def _wait_us(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1e6:
        raise ValueError("not a wait of 0 to 1 s")
    return value


def _cpus(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


# A command imports what it needs and no more: `environment` and `verify` of a broken bundle start no runtime.


def _verify(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.verify import verify_bundle

    return verify_bundle(arguments.bundle, public_key=arguments.public_key)


def _probe(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.verify import runtime_facts
    from targets import make_target

    target = make_target(arguments.target, arguments.options)
    missing = target.missing()
    offered = list(target.float_precisions()) if missing is None else []
    runtime = runtime_facts(target) if missing is None else {}
    told = {"missing": missing, "float_precisions": offered, "runtime": runtime}
    return {**told, "scheme": target.scheme, "dialect": target.dialect}


def _compile(arguments: argparse.Namespace) -> dict[str, Any]:
    from targets import make_target
    from targets.base import Exported

    target = make_target(arguments.target, arguments.options)
    arguments.out.mkdir(parents=True, exist_ok=True)
    compiled = target.compile(Exported.load(arguments.exported), arguments.out, arguments.precision)
    return {"compiled": str(arguments.out), "files": dict(compiled.files), "toolchain": compiled.toolchain}


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.evaluate import evaluate

    return evaluate(
        arguments.compiled, arguments.evaluation, arguments.out, batch=arguments.batch, source=arguments.source
    )


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.answer import answer

    return answer(arguments.compiled, arguments.inputs, arguments.out)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.measure import PRESETS, measure_launch

    preset = PRESETS[arguments.preset]
    return measure_launch(
        arguments.compiled,
        preset.shortened() if arguments.short else preset,
        boundary=arguments.boundary,
        samples_path=arguments.out,
        evaluation_dir=arguments.evaluation,
        device_samples_path=arguments.device_out,
        start_temp_c=arguments.start_temp_c,
        seed=arguments.seed,
        injected_us=arguments.inject_us,
    )


def _measure_duet(arguments: argparse.Namespace) -> dict[str, Any]:
    import random

    from benchmarks.device.duet import in_turns, measure_duet

    options = [["--out", str(out), "--seed", str(arguments.seed)] for out in arguments.out]
    for own, wait_us in zip(options, arguments.inject_us, strict=True):
        own += ["--inject-us", str(wait_us)] if wait_us else []
    for own, evaluation in zip(options, arguments.evaluation or (None, None), strict=True):
        own += ["--evaluation", str(evaluation)] if evaluation else []
    return measure_duet(
        arguments.compiled,
        in_turns(arguments.preset),
        options=options,
        start_temp_c=arguments.start_temp_c,
        chance=random.Random(arguments.chance),
        same_cpus=not arguments.any_cpus,
    )


def _take_turns(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.duet import in_turns
    from benchmarks.device.turns import Conductor, take_turns

    _end_with_parent()
    return take_turns(
        arguments.compiled,
        in_turns(arguments.preset),
        Conductor(sys.stdin, sys.stdout),
        samples_path=arguments.out,
        cpus=arguments.cpus,
        evaluation_dir=arguments.evaluation,
        seed=arguments.seed,
        injected_us=arguments.inject_us,
    )


def _end_with_parent() -> None:
    """On Linux; elsewhere a process notices at its next turn that nobody is there to tell it."""
    import ctypes
    import signal

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.measure import PRESETS, measure_throughput

    preset = PRESETS[arguments.preset]
    return measure_throughput(
        arguments.compiled, preset.shortened() if arguments.short else preset, seed=arguments.seed
    )


def _memory(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.measure import measure_memory

    return measure_memory(arguments.compiled, arguments.options, seed=arguments.seed)


def _placement(arguments: argparse.Namespace) -> dict[str, Any]:
    from targets import make_target
    from targets.base import CompiledModel

    compiled = CompiledModel.load(arguments.compiled)
    return make_target(compiled.target, compiled.options).placement(compiled).to_json()


def _profile(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.profile import DEPTHS, profile

    return profile(arguments.compiled, DEPTHS[arguments.preset], seed=arguments.seed)


def _first_run(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.first_run import first_run

    return first_run(
        arguments.kit,
        arguments.out,
        target=arguments.target,
        preset=arguments.preset,
        launches=arguments.launches,
        work_dir=arguments.work,
    )


def _environment(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.device.environment import environment

    return asdict(environment())


if __name__ == "__main__":
    sys.exit(run())
