"""Cross-entropy that does not hold all logits at once."""

from nomatmul.ops.loss.linear import Mixed, linear_cross_entropy, mixed_cross_entropy
from nomatmul.ops.loss.naive import IGNORE_INDEX, chunked_cross_entropy
from nomatmul.ops.loss.taught import Taught, TeacherLogits

__all__ = [
    "IGNORE_INDEX",
    "Mixed",
    "Taught",
    "TeacherLogits",
    "chunked_cross_entropy",
    "linear_cross_entropy",
    "mixed_cross_entropy",
]
