"""Which models there are: /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from nomatmul.engine.language_model import LanguageModel
from nomatmul.serve.errors import unknown_model
from nomatmul.serve.models import ServedModel

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """All models, as OpenAI lists them, with what clients may want to know of each."""
    served = request.app.state.server.models
    return {"object": "list", "data": [card(model) for model in served.values()]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One model. Raises ApiError 404."""
    served = request.app.state.server.models
    if name not in served:
        raise unknown_model(name)
    return card(served[name])


def card(model: ServedModel) -> dict[str, Any]:
    """OpenAI's four fields, and of ours: kind, parameters, positions (None: no limit), template."""
    lm = model.lm
    length = lm.max_length if isinstance(lm, LanguageModel) else lm.config.max_position_embeddings
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "nomatmul",
        "nomatmul": {
            "kind": model.kind,
            "parameters": lm.config.param_count(),
            "max_length": length,
            "chat_template": model.template,
            "fingerprint": lm.fingerprint[:16],
            "files_changed": model.replaced,
        },
    }
