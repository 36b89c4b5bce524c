"""The sample curriculum: a difficulty measurer, which orders, and a pacing function, which says how many are shown.

Terms and pacing functions as in Wang et al., 2021 and Wu et al., 2021; competence as in Platanios et al., 2019. On
standard data at full budget a random order with the same pacing does as well as an easy-to-hard one (Wu et al.), so
`order: random` is the control that every curriculum is compared with.
"""

from pipeline.learning.curriculum.difficulty import difficulty
from pipeline.learning.curriculum.pacing import adaptive_fraction, pacing_fraction
from pipeline.learning.curriculum.samples import SampleCurriculum, check_fills_a_batch, first_samples, shown_samples

__all__ = [
    "SampleCurriculum",
    "adaptive_fraction",
    "check_fills_a_batch",
    "difficulty",
    "first_samples",
    "pacing_fraction",
    "shown_samples",
]
