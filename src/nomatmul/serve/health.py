"""Is the server alive, does it take work, what has it done: /health, /ready, /metrics.

Probes that look at the status alone ask with HEAD.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

router = APIRouter(tags=["operations"])


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Status 200 for as long as the process answers."""
    server = request.app.state.server
    uptime = round(time.monotonic() - server.started, 1)
    return JSONResponse({"status": server.state, "uptime_s": uptime})


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Status 200 while new work is taken, 503 while models are loaded and while closing."""
    state = request.app.state.server.state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters in the text form of Prometheus."""
    content, kind = request.app.state.server.metrics.text()
    return Response(content, media_type=kind)
