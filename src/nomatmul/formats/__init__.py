"""Contracts of the house: config, quantisers, packing, files. Needs numpy only."""

from nomatmul.formats.config import ModelConfig
from nomatmul.formats.errors import FormatError, WriteError

__all__ = ["FormatError", "ModelConfig", "WriteError"]
