"""One training of an ablation in a process of its own: `python -m pipeline.ablation.worker`, started by processes.py.

Reads one line of JSON from stdin: recipe, training, and how. Lines of progress go to stderr; where it fails, one line of JSON
(kind, message) to stdout, and the error's exit code. It ends when stdin does: whoever started it is then no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.ablation.steps import AblationSteps, Training, looking
from pipeline.how import How
from pipeline.progress import PlainProgress
from pipeline.recipe import Recipe
from pipeline.workspace import Workspace
from targets.errors import EdgestillError


def main() -> int:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a person's own code prints
            do_job(job)
    except Exception as error:  # told to the parent, which names it at the end
        print(json.dumps({"kind": type(error).__name__, "message": str(error)}), flush=True)
        return error.exit_code if isinstance(error, EdgestillError) else 1
    return 0


def do_job(job: Mapping[str, Any]) -> None:
    """Build the training's own stages; what all arms share must be finished, because only the parent may build that."""
    import torch

    torch.set_num_threads(job["num_threads"])
    recipe, progress = Recipe.model_validate(job["recipe"]), PlainProgress(sys.stderr)
    how = How(seed=recipe.seed, progress=progress, offline=job["offline"], allow_code=job["allow_code"])
    runs_dir = Path(job["runs_dir"])
    do = AblationSteps(recipe, Workspace(runs_dir, recipe.name, progress), how)
    training = Training.from_json(job["training"])
    shared = looking(do).shared(training.config)
    student = do.train(training, shared)
    if training.scored:
        do.score(training, shared, student)


def _end_with_stdin() -> None:
    while os.read(
        sys.stdin.fileno(), 1
    ):  # the descriptor itself: a buffered read would hold a lock when the process ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
