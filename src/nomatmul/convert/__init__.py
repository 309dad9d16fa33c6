"""Turning models of other forms into packed ones."""

from nomatmul.convert.check import PackCheck
from nomatmul.convert.packing import PackResult, pack

__all__ = ["PackCheck", "PackResult", "pack"]
