"""What a server says when it is ready: what runs where."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomatmul.engine.language_model import LanguageModel
from nomatmul.serve.models import ServedModel
from nomatmul.serve.security import is_loopback

if TYPE_CHECKING:
    from nomatmul.serve.server import Server


def report(server: Server, url: str) -> dict[str, Any]:
    """{"url", "api", "page", "metrics", "models", "state_cache", "limits", "keys", ...}."""
    from nomatmul import __version__

    options = server.options
    directory = None if server.cache is None else server.cache.directory
    return {
        "version": __version__,
        "pid": os.getpid(),
        "url": url,
        "page": f"{url}/",
        "api": f"{url}/v1",
        "metrics": f"{url}/metrics",
        "models": [_model(model) for model in server.models.values()],
        "state_cache": {
            "bytes": options.state_cache if server.cache is not None else 0,
            "directory": None if directory is None else str(directory),
        },
        "limits": {
            "streams": options.max_streams,
            "queue": options.max_queue,
            "seconds": options.timeout,
            "body_bytes": options.max_body,
            "connections": options.max_connections,
        },
        "keys": len(options.api_keys),
        "open_to_all": not options.api_keys and not is_loopback(options.host),
        "ready_s": round(since_start(), 3),
    }


def _model(model: ServedModel) -> dict[str, Any]:
    lm = model.lm
    parts = lm.backend.weight_bytes() if isinstance(lm, LanguageModel) else lm.weight_bytes()
    found: dict[str, Any] = {
        "name": model.name,
        "kind": model.kind,
        "directory": str(model.directory),
        "parameters": lm.config.param_count(),
        "packing": lm.packing if isinstance(lm, LanguageModel) else lm.forms.ternary,
        "device": "cpu" if lm.backend.gpu is None else lm.backend.gpu.name(),
        "kernels": lm.backend.isa,
        "threads": lm.backend.threads,
        "weight_bytes": sum(parts.values()),
        "chat_template": model.template,
    }
    if isinstance(lm, LanguageModel):
        sizes = lm.footprint()
        found |= {"stream_bytes": sizes["state"], "token_bytes": sizes.get("kv_token", 0)}
        found["max_length"] = lm.max_length
    return found


def since_start() -> float:
    """Seconds since this process was started, Python's own start included."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return time.process_time()
