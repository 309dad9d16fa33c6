"""Cross-entropy that does not hold all logits at once."""

from nomatmul.ops.loss.naive import IGNORE_INDEX, chunked_cross_entropy

__all__ = ["IGNORE_INDEX", "chunked_cross_entropy"]
