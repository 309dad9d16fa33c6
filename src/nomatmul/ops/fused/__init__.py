"""Whole sublayers of a MatMul-free block as one operation each, forward and backward."""

from nomatmul.ops.fused.channel import channel
from nomatmul.ops.fused.mixer import mixer

__all__ = ["channel", "mixer"]
