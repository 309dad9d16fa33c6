"""Cross-entropy that does not hold all logits at once."""

from nomatmul.ops.loss.linear import linear_cross_entropy
from nomatmul.ops.loss.naive import IGNORE_INDEX, chunked_cross_entropy

__all__ = ["IGNORE_INDEX", "chunked_cross_entropy", "linear_cross_entropy"]
