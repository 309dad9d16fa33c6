"""What /metrics says: counters of this server alone, in the text form of Prometheus.

Tokens are counted when a response has ended, from the same `Usage` that the response carried; what
goes on now comes from the scheduler and the cache when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from nomatmul.serve.cache import StateCache
    from nomatmul.serve.job import Ticket
    from nomatmul.serve.models import ServedModel
    from nomatmul.serve.scheduler import Scheduler

_WAITS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_WHOLE = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
# Fields of the scheduler's and the cache's counts: {field: (metric, what it counts)}.
_RUNNING = {
    "running": ("streams_running", "Answers that are read or written now."),
    "waiting": ("requests_waiting", "Requests of which no answer runs yet."),
}
_JOBS = {
    "submitted": ("jobs_submitted", "Requests that were taken."),
    "refused": ("jobs_refused", "Requests that found the queue full (status 429)."),
    "finished": ("jobs_finished", "Requests whose answers ended by themselves."),
    "cancelled": ("jobs_cancelled", "Requests whose client went away."),
    "timed_out": ("jobs_timed_out", "Requests that took longer than --timeout."),
    "failed": ("jobs_failed", "Requests that met an error."),
    "shut_down": ("jobs_shut_down", "Requests that were cut off by the end of the server."),
    "prompt_tokens": ("engine_prompt_tokens", "Tokens of prompts, cut requests included."),
    "cached_tokens": ("engine_cached_tokens", "Of these, tokens that a state had seen."),
    "computed_tokens": ("engine_computed_tokens", "Of these, tokens that were computed."),
    "completion_tokens": ("engine_completion_tokens", "Tokens made, cut requests included."),
    "reread_tokens": ("engine_reread_tokens", "Tokens of ended answers, read while idle."),
    "steps": ("engine_steps", "Steps of models."),
    "step_s": ("engine_step_seconds", "Seconds in steps and between two of them."),
}
_CACHE_NOW = {
    "entries": ("cache_entries", "States in the cache."),
    "bytes": ("cache_bytes", "Memory of these states."),
    "max_bytes": ("cache_max_bytes", "The limit of --state-cache."),
    "file_bytes": ("cache_file_bytes", "States in --state-dir, those to be written included."),
}
_CACHE = {
    "hits": ("cache_hits", "Prompts of which a state had seen a part."),
    "misses": ("cache_misses", "Prompts of which no state had seen anything."),
    "evicted": ("cache_evicted", "States that made room for others."),
    "written": ("cache_written", "States written to --state-dir."),
    "read": ("cache_read", "States read from --state-dir."),
    "dropped": ("cache_dropped", "Damaged or foreign files in --state-dir."),
}


class Watched(Protocol):
    """What is looked at: a `Server`, which holds the metrics."""

    models: dict[str, ServedModel]
    cache: StateCache | None
    state: Literal["loading", "ready", "closing"]

    @property
    def scheduler(self) -> Scheduler:
        """Only once the models are loaded."""


class Metrics:
    """The counters of one server; methods may be called from any thread."""

    def __init__(self, server: Watched) -> None:
        self._registry = registry = CollectorRegistry()
        # a second series for each counter, of no use to anybody; the library has no types here
        disable_created_metrics()  # type: ignore[no-untyped-call]
        ProcessCollector(registry=registry)
        registry.register(_Now(server))

        def counter(name: str, words: str, labels: tuple[str, ...] = ("model",)) -> Counter:
            return Counter(f"nomatmul_{name}", words, labels, registry=registry)

        def seconds(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"nomatmul_{name}_seconds", words, ("model",), buckets=buckets, registry=registry
            )

        labels = ("route", "status", "model")
        self._requests = counter("requests", "Responses that have ended.", labels)
        self._tokens = {
            "prompt_tokens": counter("prompt_tokens", "Tokens of prompts."),
            "cached_tokens": counter("cached_tokens", "Of these, tokens that a state had seen."),
            "computed_tokens": counter("computed_tokens", "Of these, tokens that were computed."),
            "completion_tokens": counter("completion_tokens", "Tokens made."),
        }
        self._seconds = {
            "queue_s": seconds("queue", "From a request to its first step.", _WAITS),
            "first_token_s": seconds("first_token", "From a request to its first token.", _WAITS),
            "total_s": seconds("request", "From a request to its last token.", _WHOLE),
        }
        words = "Between two tokens of a request's answers, its mean."
        self._between = seconds("between_tokens", words, _BETWEEN)

    def text(self) -> tuple[bytes, str]:
        """(all metrics, their content type)."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def count(self, route: str, status: int, model: str, ticket: Ticket | None) -> None:
        """Note a response that has ended."""
        self._requests.labels(route, str(status), model).inc()
        if ticket is None:
            return
        usage = ticket.usage
        for name, counter in self._tokens.items():
            counter.labels(model).inc(getattr(usage, name))
        for name, histogram in self._seconds.items():
            if (value := getattr(usage, name)) is not None:
                histogram.labels(model).observe(value)
        made = usage.completion_tokens
        if made > 1 and usage.first_token_s is not None and usage.total_s is not None:
            # choices of one request run side by side
            pace = (usage.total_s - usage.first_token_s) * ticket.job.choices / (made - 1)
            self._between.labels(model).observe(pace)


class _Now(Collector):
    """What the scheduler and the cache say when they are asked."""

    def __init__(self, server: Watched) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server = self._server
        gauge, count = GaugeMetricFamily, CounterMetricFamily
        yield gauge("nomatmul_ready", "Whether new work is taken.", int(server.state == "ready"))
        replaced = sum(model.replaced for model in server.models.values())
        yield gauge("nomatmul_models_replaced", "Models whose files have changed.", replaced)
        if not server.models:  # still loading, or closed before they were there
            return
        stats = server.scheduler.stats()
        yield from _each(stats, gauge, _RUNNING)
        yield from _each(stats, count, _JOBS)
        words = "The longest step so far."
        yield gauge("nomatmul_engine_longest_step_seconds", words, stats.longest_step_s)
        if server.cache is not None:
            cached = server.cache.stats()
            yield from _each(cached, gauge, _CACHE_NOW)
            yield from _each(cached, count, _CACHE)


def _each(stats: Any, kind: Any, fields: dict[str, tuple[str, str]]) -> Iterator[Metric]:
    for field, (name, words) in fields.items():
        yield kind(f"nomatmul_{name}", words, getattr(stats, field))
