"""Named states: a long text that is read once and stands in front of many requests.

PUT /v1/states/{name}, GET /v1/states, DELETE /v1/states/{name}.
"""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()
