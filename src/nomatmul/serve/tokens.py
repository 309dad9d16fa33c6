"""/tokenize and /detokenize, in the form that vLLM has."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
