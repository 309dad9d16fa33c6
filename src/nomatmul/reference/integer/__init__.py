"""Integer inference: every step of a MatMul-free LM in fixed point, as hardware computes it.

docs/hardware-numerics.md is these files in words. `scalar`, `vector`, `table` and `gates` hold one
exact function a step, `model` the whole forward pass, `trace` what it leaves after every step, and
`bounds` the proof that nothing overflows. Everything is numpy int64 and vectorised over leading
axes.
"""

from nomatmul.reference.integer.numerics import Formats

__all__ = ["Formats"]
