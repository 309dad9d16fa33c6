"""The server without its network side: models, cache, scheduler, metrics; loading and closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, cast

from nomatmul.serve.memory import check_memory
from nomatmul.serve.metrics import Metrics
from nomatmul.serve.models import ServedModel, model_paths, open_models

if TYPE_CHECKING:
    from nomatmul.serve.cache import StateCache
    from nomatmul.serve.options import ServeOptions
    from nomatmul.serve.scheduler import Scheduler
    from nomatmul.serve.sequence import Served

State = Literal["loading", "ready", "closing"]


class Server:
    """Everything that requests share.

    models: {name: ServedModel}, empty until they are loaded, and then unchanged. cache: None where
    it was switched off. state: what /ready says. started: `time.monotonic()`.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.models: dict[str, ServedModel] = {}
        self.cache: StateCache | None = None
        self.state: State = "loading"
        self.started = time.monotonic()
        self.metrics = Metrics(self)
        self._scheduler: Scheduler | None = None
        self._warming: threading.Thread | None = None
        self._closing = threading.Lock()

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; only once the models are loaded."""
        assert self._scheduler is not None, "requests are refused until the models are loaded"
        return self._scheduler

    def start(self, models: dict[str, ServedModel] | None = None) -> None:
        """Load the models and start the engine thread.

        models: {name: model} in memory already, in place of those that the options name. Raises
        ValueError, OSError or MemoryError in one line, with nothing left running.
        """
        from nomatmul.serve.cache import StateCache
        from nomatmul.serve.scheduler import Scheduler

        options = self.options
        models = self._load() if models is None else models
        writers = {name: model for name, model in models.items() if model.kind == "language"}
        language = {name: model.language for name, model in writers.items()}
        if options.state_cache and language:
            self.cache = StateCache(language, options.state_cache, options.state_dir)
        self._scheduler = Scheduler(
            cast("Mapping[str, Served]", writers),
            self.cache,
            max_streams=options.max_streams,
            max_queue=options.max_queue,
        )
        self._scheduler.start()
        self.models = models
        with self._closing:
            if self.state == "loading":
                self.state = "ready"
        self._warming = threading.Thread(target=self._warm, name="nomatmul-warm")
        self._warming.start()

    def _warm(self) -> None:
        for model in self.models.values():
            model.warm()

    def _load(self) -> dict[str, ServedModel]:
        options = self.options
        paths = model_paths(options.models)
        check_memory(paths.values(), options)
        return open_models(
            paths,
            threads=options.threads,
            device=options.device,
            kv=options.kv,
            chat_template=options.chat_template,
        )

    def close(self, grace: float | None = None) -> None:
        """Take no new work, let answers end for `grace` seconds, cut the rest, write the cache."""
        with self._closing:
            self.state = "closing"
        if self._scheduler is not None:
            self._scheduler.close(self.options.grace if grace is None else grace)
        if self._warming is not None:
            self._warming.join()
        if self.cache is not None:
            self.cache.close()
