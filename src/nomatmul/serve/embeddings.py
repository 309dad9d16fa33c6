"""/v1/embeddings: vectors of texts, by encoders and by language models made for it."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
