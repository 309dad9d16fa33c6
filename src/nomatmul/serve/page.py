"""The chat page at GET /: one file, its Content-Security-Policy made from what stands in it.

The policy names the checksums of the page's own script and style: whatever a model writes, no
other script runs, no other style holds, nothing is loaded, and nothing is sent but to this server.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response

router = APIRouter()


@dataclass(frozen=True)
class Page:
    """body: the file; packed: the same by gzip; etag: of its content, weak: there are two forms.

    headers: what goes with each answer.
    """

    body: bytes
    packed: bytes
    etag: str
    headers: dict[str, str]


def content_security_policy(html: str) -> str:
    """The policy under which the page's own <script> and <style> elements are all that runs."""
    allowed = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {allowed['script']}",
            f"style-src {allowed['style']}",
            "connect-src 'self'",
            "img-src data:",  # the icon of the page
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # text never becomes markup or code: the browser refuses innerHTML and the like
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


@functools.cache
def load_page() -> Page:
    """The page that is installed; read once."""
    body = files("nomatmul.serve").joinpath("page", "index.html").read_bytes()
    etag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "Content-Security-Policy": content_security_policy(body.decode("utf-8")),
        "ETag": etag,
        "Cache-Control": "no-cache",  # kept, but asked for each time: the answer is mostly 304
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    return Page(body, gzip.compress(body, mtime=0), etag, headers)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def chat_page(request: Request) -> Response:
    """The page, or 304 where the browser has it already."""
    page = load_page()
    known = {tag.strip() for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {page.etag, page.etag.removeprefix("W/"), "*"}:
        return Response(status_code=304, headers=page.headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers = {**page.headers, "Content-Encoding": "gzip"}
        return Response(page.packed, media_type="text/html", headers=headers)
    return Response(page.body, media_type="text/html", headers=page.headers)
