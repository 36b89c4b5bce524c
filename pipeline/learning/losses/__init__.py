"""What a training minimises: one file a loss. Raw logits in, nats out, each loss a value a sample."""

from pipeline.learning.losses.dist import dist
from pipeline.learning.losses.dkd import dkd
from pipeline.learning.losses.kd import kd, kd_loss
from pipeline.learning.losses.labels import cross_entropy
from pipeline.learning.losses.standardization import standardized

__all__ = ["cross_entropy", "dist", "dkd", "kd", "kd_loss", "standardized"]
