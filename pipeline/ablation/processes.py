"""The trainings of an ablation, one after another in this process or several processes at once.

A process a training: it gets its share of the cores, ends when this one does, however this one ends, and takes none of the
others with it when it fails. The workspace's lock is this process's; a training writes its own stages and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.ablation.steps import AblationSteps, Training
from pipeline.progress import Progress
from targets import errors
from targets.errors import EdgestillError

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def train_all(do: AblationSteps, trainings: Sequence[Training], num_processes: int) -> dict[str, EdgestillError]:
    """Do every training; returns what failed, by the training's name. An interrupt ends the processes first."""
    if num_processes <= 1 or len(trainings) < 2:
        return _one_after_another(do, trainings)
    return _at_once(do, trainings, num_processes)


def _one_after_another(do: AblationSteps, trainings: Sequence[Training]) -> dict[str, EdgestillError]:
    failed: dict[str, EdgestillError] = {}
    with do.how.progress.task("ablation", total=len(trainings)) as task:
        for training in trainings:
            try:
                do.outcome(training)
            except EdgestillError as error:
                failed[training.name] = error
            except Exception as error:  # a person's own loss may raise anything; it takes no other training with it
                failed[training.name] = _foreign(type(error).__name__, error)
            if training.name in failed:
                _tell(do.how.progress, training, failed[training.name])
            task.advance(1)
    return failed


def _at_once(do: AblationSteps, trainings: Sequence[Training], num_processes: int) -> dict[str, EdgestillError]:
    failed: dict[str, EdgestillError] = {}
    children = _Children(do, threads_each(num_processes))
    with ThreadPoolExecutor(num_processes) as pool, do.how.progress.task("ablation", total=len(trainings)) as task:
        waiting: dict[Future[EdgestillError | None], Training] = {
            pool.submit(children.run, training): training for training in trainings
        }
        try:
            for done in as_completed(waiting):
                if (error := done.result()) is not None:
                    _tell(do.how.progress, waiting[done], error)
                    failed[waiting[done].name] = error
                task.advance(1)
        except BaseException:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def threads_each(num_processes: int) -> int:
    """A process's share of the cores that this one may use, or fewer where the environment asks for fewer."""
    share = max(1, len(os.sched_getaffinity(0)) // num_processes)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdecimal() and int(asked) > 0 else share


def _tell(progress: Progress, training: Training, error: EdgestillError) -> None:
    progress.say(f"{training.name}: failed: {error}")


@dataclass
class _Children:
    """The processes that are at work, so that they can be ended."""

    do: AblationSteps
    num_threads: int
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, training: Training) -> EdgestillError | None:
        """One training to its end; returns its error. Its lines are told here."""
        child = self._start()
        if child is None:
            return None
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            # The pipe stays open: its end is what tells the child that this process is no more.
            child.stdin.write(json.dumps(self._job(training)) + "\n")
            child.stdin.flush()
            for line in child.stderr:
                self.do.how.progress.say(line.rstrip("\n"))
            told = child.stdout.read()
            return _error_of(child.wait(), told)
        except BrokenPipeError:
            return _error_of(child.wait(), "")
        finally:
            with self._lock:
                self._running.discard(child)
            for pipe in (child.stdin, child.stdout, child.stderr):
                with contextlib.suppress(BrokenPipeError):  # what a child that ended early did not read
                    pipe.close()

    def stop(self) -> None:
        """End those that are at work, and let no other begin."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()

    def _start(self) -> subprocess.Popen[str] | None:
        threads = {name: str(self.num_threads) for name in THREAD_VARIABLES}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._stopped:
                return None
            child = subprocess.Popen(
                # -P: a folder `pipeline` of the person's own, in the working directory, must not hide ours.
                [sys.executable, "-P", "-m", "pipeline.ablation.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **threads, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C comes to this process, which ends them
            )
            self._running.add(child)
        return child

    def _job(self, training: Training) -> dict[str, object]:
        how = self.do.how
        return {
            "recipe": self.do.recipe.model_dump(mode="json"),
            "runs_dir": str(self.do.workspace.dir.parent),
            "training": training.to_json(),
            "num_threads": self.num_threads,
            "offline": how.offline,
            "allow_code": how.allow_code,
        }


def _error_of(exit_code: int, told: str) -> EdgestillError | None:
    """The child's own error by its kind and words; of one that ended without a word, how it ended."""
    if exit_code == 0:
        return None
    try:
        found = json.loads(told.splitlines()[-1])
        kind, message = str(found["kind"]), str(found["message"])
    except (ValueError, LookupError, TypeError):
        how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
        return EdgestillError(
            f"its process ended with {how} and said nothing. Out of memory? Run again with fewer processes."
        )
    of_ours = getattr(errors, kind, None)
    if isinstance(of_ours, type) and issubclass(of_ours, EdgestillError):
        return of_ours(message)
    return _foreign(kind, message)


def _foreign(kind: str, message: object) -> EdgestillError:
    """An error that is none of ours."""
    return EdgestillError(f"{kind}: {message}")
