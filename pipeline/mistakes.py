"""Knowledge that is wrong: what a student says where its teacher errs."""
# Shapes: N samples.

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Classes = npt.NDArray[np.int64]


def where_teacher_errs(teacher_N: Classes, student_N: Classes, labels_N: Classes) -> dict[str, Any]:
    """Counts over the samples that the teacher takes for another class than their label, from three rows of class ids.

    num_wrong samples; of these num_right that the student has right all the same, and num_same where it says what the teacher says.
    The rest are mistakes of the student's own.
    """
    is_wrong_N = teacher_N != labels_N
    return {
        "num_wrong": int(is_wrong_N.sum()),
        "num_right": int((is_wrong_N & (student_N == labels_N)).sum()),
        "num_same": int((is_wrong_N & (student_N == teacher_N)).sum()),
    }
