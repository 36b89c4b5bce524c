"""Recipes with unlabelled samples: what they cannot ask for, and what they can."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.ablation.arms import arm_names
from pipeline.recipe import Recipe, parse_recipe
from targets.errors import RecipeError

CHECKPOINT = {"model": "m", "train": None, "checkpoint": "t.safetensors"}


def recipe(*, data: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    raw = {
        "name": "r",
        "data": {"source": "digits", **({"labelled_share": 0.1} if data is None else data)},
        "teacher": {"model": "resnet20"},
        "targets": [{"name": "openvino-cpu"}],
        **sections,
    }
    return parse_recipe({**raw, "distill": {"model": "resnet8", **sections.get("distill", {})}}, "r.yaml")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"distill": {"losses": [{"name": "dkd"}]}}, r"distill\.losses: dkd takes the label's class apart.*kd or dist"),
    *[
        ({"distill": {"curriculum": {"difficulty": measure, **more}}}, rf"curriculum\.difficulty: {measure} is told by the label")
        for measure, more in (
            ("teacher_loss", {}),
            ("teacher_doubt", {}),
            ("margin", {}),
            ("self_paced", {"rescore_every": 1}),
            ("el2n", {"rescore_every": 1}),
            ("forgetting", {"rescore_every": 1}),
            ("aum", {"rescore_every": 1}),
        )
    ],
    ({"distill": {"weight_curriculum": {"per_sample": "superloss"}}}, r"per_sample: superloss is told by the label.*confidence"),
    ({"distill": {"weight_curriculum": {"per_sample": "correctness"}}}, r"per_sample: correctness is told by the label"),
    ({"ablation": {"arms": {"d": {"losses": [{"name": "dkd"}]}}}}, r"ablation\.arms\.d\.losses: dkd"),
    ({"data": {"unlabelled": ["npz:x"]}, "distill": {"kd_weight": 0}}, r"no loss of distill asks the teacher"),
    ({"distill": {"kd_weight": 0, "teacher_wrong": "drop"}}, r"labelled_share=0\.1: no loss of distill asks the teacher"),
    (
        {"ablation": {"arms": {"d": {"kd_weight": 0, "teacher_wrong": "drop"}}}},
        r"no loss of ablation\.arms\.d asks the teacher.*set ablation\.arms\.d\.kd_weight above 0",
    ),
    ({"data": {"labelled_share": 0}}, r"leaves the teacher nothing to learn from"),
    ({"data": {"labelled_share": 0}, "teacher": CHECKPOINT, "distill": {"kd_weight": 0}}, r"labelled_share=0: no loss"),
    (
        {"data": {"labelled_share": 0, "validation": 0}, "teacher": CHECKPOINT, "quantize": {"method": "ptq"}},
        "leave no label to check the teacher by",
    ),
    ({"data": {"labelled_share": 0}, "teacher": CHECKPOINT, "quantize": {"kd_weight": 0}}, "leave QAT nothing to learn from"),
]  # fmt: skip

ACCEPTED: list[dict[str, Any]] = [
    {"distill": {"losses": [{"name": "kd", "standardize": True}, {"name": "dist"}, {"name": "dkd", "weight": 0}]}},
    *[{"distill": {"curriculum": {"difficulty": measure, **more}}} for measure, more in (
        ("teacher_entropy", {}), ("kl", {"rescore_every": 1}), ("disagreement", {"rescore_every": 1}),
    )],
    {"distill": {"weight_curriculum": {"per_sample": "confidence", "schedule": "linear"}}},
    {"distill": {"teacher_wrong": "drop"}},
    {"data": {"unlabelled": ["npz:x"]}, "ablation": {"arms": {"labels-alone": {"kd_weight": 0}}}},
    {"distill": {"loss": "python:a:b"}},
    {"distill": {"kd_weight": 0, "curriculum": {"difficulty": "teacher_loss"}}},  # shown the labelled samples alone
    {"data": {"labelled_share": 0}, "teacher": CHECKPOINT},
    {"data": {"unlabelled": ["npz:x"]}, "distill": {"views": 2}},
]  # fmt: skip


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=str)
def test_what_needs_every_samples_label_or_would_teach_nothing_is_refused_in_words(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        recipe(**sections)

    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("sections", ACCEPTED, ids=str)
def test_what_needs_no_label_is_accepted_and_reads_back_as_itself(sections: dict[str, Any]) -> None:
    accepted = recipe(**sections)

    assert parse_recipe(accepted.model_dump(mode="json"), "again") == accepted


@pytest.mark.parametrize(("sections", "message"), REFUSED[:10], ids=str)
def test_where_all_have_labels_everything_may_be_asked_for(sections: dict[str, Any], message: str) -> None:
    assert not recipe(**{**sections, "data": {}}).data.has_unlabelled


def test_where_none_has_a_label_no_arm_learns_alone() -> None:
    assert "alone" in arm_names(recipe())
    assert "alone" not in arm_names(recipe(data={"labelled_share": 0}, teacher=CHECKPOINT))


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [({"mean": 33, "std": 78.5}, ((33.0,), (78.5,))), ({"mean": [1, 2, 3], "std": [4, 5, 6]}, ((1, 2, 3), (4, 5, 6)))],
)
def test_a_teachers_normalization_is_one_number_or_one_a_channel(normalization: dict[str, Any], expected: Any) -> None:
    found = recipe(data={}, teacher={**CHECKPOINT, "normalization": normalization}).teacher.normalization

    assert found is not None
    assert (found.mean, found.std) == expected


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({**CHECKPOINT, "normalization": {"mean": 0, "std": 0}}, r"normalization\.std"),
        ({**CHECKPOINT, "normalization": {"mean": [], "std": 1}}, r"normalization\.mean"),
        ({**CHECKPOINT, "normalization": {"mean": 1}}, "'teacher.normalization.std' is missing"),
        ({**CHECKPOINT, "normalization": {"mean": True, "std": 1}}, r"normalization\.mean"),
        ({"model": "m", "normalization": {"mean": 0, "std": 1}}, "this one has no checkpoint"),
    ],
)
def test_a_normalization_that_cannot_be_is_refused(teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(data={}, teacher=teacher)
