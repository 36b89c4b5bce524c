from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.differences import differences
from targets.errors import DataError


def rows(*values: Any) -> list[Any]:
    return [np.asarray(value, np.float32) for value in values]


def test_a_model_against_itself_differs_in_nothing() -> None:
    answers = {"y": rows([[1.0, 2.0]], [[3.0, -1.0]]), "z": rows([0.0], [0.0])}

    for one in differences("b", "a", answers, answers):
        assert (one.hop, one.against, one.num_samples, one.max_abs_delta) == ("b", "a", 2, 0.0)
        assert one.cosine_min == pytest.approx(1.0)


def test_cosine_delta_and_agreement_are_those_of_numpy() -> None:
    before, after = {"y": rows([[3.0, 4.0]], [[1.0, 0.0]])}, {"y": rows([[4.0, 3.0]], [[1.0, 0.5]])}

    (one,) = differences("b", "a", before, after)

    cosines = [24 / 25, 1 / np.sqrt(1.25)]
    assert one.cosine_mean == pytest.approx(np.mean(cosines))
    assert one.cosine_min == pytest.approx(min(cosines))
    assert (one.max_abs_delta, one.agreement) == (1.0, 0.5)


def test_an_output_of_other_form_than_scores_has_no_agreement() -> None:
    for shape in ((1, 1), (1, 2, 3), (4,)):
        answers = {"y": [np.ones(shape, np.float32)]}
        assert differences("b", "a", answers, answers)[0].agreement is None


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [], "no samples"),
        (rows([1.0]), rows([np.nan]), "no numbers"),
        (rows([1.0]), rows([1.0, 2.0]), "changes its size"),
    ],
)
def test_what_cannot_be_compared_is_refused(before: list[Any], after: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        differences("b", "a", {"y": before}, {"y": after})
