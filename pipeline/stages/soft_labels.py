"""Stage soft_labels, between teacher and distill: ask the teacher once for every view that the student will be shown.

Built only where `distill.teacher_forward` comes to `cached`. An artifact of its own, so that several students share it: its views
come from the recipe's seed, and nothing of the student is in its key. A build that was killed goes on after its last whole view.
Reads the data and the teacher, or the last assistant. Writes soft_labels.json and view-*.npy (pipeline/learning/label_cache.py).
"""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import PreparedData, TrainedModel
from pipeline.how import How
from pipeline.learning.label_cache import FILE
from pipeline.learning.soft_labels import cache_soft_labels, labels_of
from pipeline.learning.trained import load_trained, open_data
from pipeline.learning.views import view_seeds
from pipeline.recipe import DistillConfig
from pipeline.workspace import CHECKPOINT_DIR
from targets.errors import RecipeError


def cache_teacher(
    config: DistillConfig, prepared: PreparedData, teacher: TrainedModel, out_dir: Path, how: How
) -> None:
    if config.train is None or config.num_views is None:
        raise RecipeError("distill.teacher_forward is online, so no soft labels are kept. Set it to cached.")
    data = open_data(prepared)
    model = load_trained(teacher, data, allow_code=how.allow_code)
    seeds = view_seeds(how.seed, config.num_views)
    of = labels_of(model, data, prepared.digest, seeds, dtype=config.cache.dtype, top_k=config.cache.top_k)
    cache = cache_soft_labels(model, data, of, out_dir / CHECKPOINT_DIR, config.train, how.progress)
    for name in (*cache.info["files"], FILE):
        (out_dir / CHECKPOINT_DIR / name).replace(out_dir / name)
