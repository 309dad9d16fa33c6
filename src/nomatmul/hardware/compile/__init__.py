"""From a packed model to what the accelerator reads: a program, a memory image and a map."""

from nomatmul.hardware.compile.compiler import compile_model, formats_of
from nomatmul.hardware.compile.files import Compiled, listing, open_compiled

__all__ = ["Compiled", "compile_model", "formats_of", "listing", "open_compiled"]
