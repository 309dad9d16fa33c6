"""A model that writes on the simulated accelerator: prompt in, text out, figures at the end."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nomatmul.engine.language_text import LanguageText
from nomatmul.engine.sampling import Sampling
from nomatmul.formats.files.atomic import check_writable
from nomatmul.formats.packed import PackedReader
from nomatmul.hardware.compile import Compiled, compile_model, formats_of, open_compiled
from nomatmul.hardware.design import Design
from nomatmul.hardware.simulate.build import simulator
from nomatmul.hardware.simulate.compare import Comparison, Difference
from nomatmul.hardware.simulate.events import read_events
from nomatmul.hardware.simulate.harness import (
    Harness,
    Memory,
    status_flags,
)
from nomatmul.hardware.simulate.plot import check_picture, draw
from nomatmul.hardware.writing import NO_LOGITS, continued
from nomatmul.reference.integer.model import IntegerModel

# What a cycle may have gone to, in the words of a report.
CAUSES = {
    "beats": "weights taken",
    "memory": "waiting for memory",
    "array": "products filling, draining",
    "logits": "waiting for the host to take logits",
    "vector": "norms and quantisers",
    "scalar": "scalar arithmetic",
    "control": "control",
}


@dataclass(frozen=True)
class Waves:
    """A waveform: "vcd" or "fst", and its file."""

    kind: str
    path: Path

    @classmethod
    def of(cls, vcd: str | None, fst: str | None) -> Waves | None:
        """From two options of which one may be given."""
        if vcd is not None and fst is not None:
            raise ValueError("the waveform is asked for twice; give --vcd or --fst")
        if vcd is not None:
            return cls("vcd", Path(vcd))
        return None if fst is None else cls("fst", Path(fst))


@dataclass
class Report:
    """Of a run. cycles: of all tokens, waits for the host's next token left out. checked: whether
    the oracle ran beside; difference: the first that it found."""

    lanes: int
    memory_bytes: int
    tokens: int = 0
    prompt_tokens: int = 0
    cycles: int = 0
    words: int = 0
    last_cycles: int = 0
    last_words: int = 0
    counters: Counter[str] = field(default_factory=Counter)
    status: int = 0
    checked: bool = False
    instructions: int = 0
    values: int = 0
    difference: Difference | None = None

    @property
    def equal(self) -> bool:
        """False where the oracle found a difference."""
        return self.difference is None

    @property
    def busy(self) -> float:
        """The share of cycles in which the array took weights."""
        return self.counters["beats"] / max(1, self.cycles)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        causes = {name: self.counters[name] for name in CAUSES}
        return {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "cycles": self.cycles,
            "cycles_last_token": self.last_cycles,
            "bytes": self.words * self.memory_bytes,
            "bytes_last_token": self.last_words * self.memory_bytes,
            "array_busy": self.busy,
            "cycles_by_cause": causes,
            "instructions": self.counters["instructions"],
            "faults": status_flags(self.status),
            "checked": self.checked,
            "equal": self.equal if self.checked else None,
            "values_compared": self.values,
            "instructions_compared": self.instructions,
            "difference": None if self.difference is None else str(self.difference),
        }

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        rows = [
            ("tokens (prompt, made)", f"{self.prompt_tokens}, {self.tokens}"),
            ("cycles of the last token", f"{self.last_cycles}"),
            ("bytes of the last token", f"{self.last_words * self.memory_bytes}"),
            ("array of lanes busy", f"{self.busy:.1%}"),
        ]
        for name, words in CAUSES.items():
            rows.append((f"  {words}", f"{self.counters[name] / max(1, self.cycles):.1%}"))
        rows.append(("faults", ", ".join(status_flags(self.status)) or "none"))
        if self.checked:
            rows.append(("instructions compared", str(self.instructions)))
            rows.append(("values compared", str(self.values)))
            rows.append(("the integer oracle", str(self.difference or "is equal")))
        return rows


class Simulation:
    """A packed model compiled for a design, and the design's simulation at work.

    A context manager. check: run the integer oracle beside, which needs a design with `probe`.
    Raises ValueError for what `compile_model` refuses and for missing tools, before it builds.
    """

    def __init__(
        self,
        reader: PackedReader,
        design: Design,
        memory: Memory | None = None,
        *,
        check: bool = False,
        plot: Path | None = None,
        waves: Waves | None = None,
        threads: int = 1,
        faults: Sequence[str] = (),
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        assert design.probe or not check
        if plot is not None:
            check_picture(plot)
        if waves is not None:
            check_writable(waves.path)
        self._text = LanguageText(reader.tokenizer_path, reader.config)
        self._config, self._plot = reader.config, plot
        self._model = IntegerModel.from_packed(reader, formats_of(design))
        self._directory = tempfile.TemporaryDirectory(prefix="nomatmul-hardware.")
        try:
            at = Path(self._directory.name)
            compile_model(reader, design, at / "compiled", model=self._model)
            self.compiled: Compiled = open_compiled(at / "compiled")
            program = simulator(
                design, waves=waves.kind if waves else "none", threads=threads, note=note
            )
            options = [*faults, *(("--waves", str(waves.path)) if waves else ())]
            self._events, self._timeline = at / "events", at / "timeline"
            options += ["--events", str(self._events)] if check else []
            options += ["--timeline", str(self._timeline)] if plot else []
            self._harness = Harness(program, self.compiled, memory or Memory(), options)
        except BaseException:
            self._directory.cleanup()
            raise
        self._comparison = Comparison(self.compiled, self._model) if check else None
        self._fresh = True
        self._report = Report(design.lanes, design.memory_bytes, checked=check)

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(finished=kind is None)

    @property
    def tokenizer(self) -> Any:
        """The model's `tokenizers.Tokenizer`; None without one."""
        return self._text.tokenizer

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids that a prompt is fed as; errors as of `write`."""
        self._text.need_tokenizer()
        return self._text.prompt_ids(prompt, fresh=self._fresh)

    def close(self, *, finished: bool = True) -> None:
        """End the simulation; where it has finished, draws the plot that was asked for."""
        try:
            self._harness.close()
            if finished and self._plot is not None:
                draw(self._timeline, self._plot, self.compiled)
        finally:
            self._directory.cleanup()

    def token(self, token: int, want: int = NO_LOGITS) -> dict[str, Any]:
        """Run one token and return the harness's answer; counts it, and compares it where asked.

        Raises harness.Stopped where the design comes to no end.
        """
        answer = self._harness.token(token, want, fresh=self._fresh)
        if answer.get("reset"):
            self._fresh = True
            return answer
        report, counters = self._report, answer["counters"]
        report.last_cycles = counters["cycles"] - counters["token"]
        report.last_words = answer["words"]
        report.cycles += report.last_cycles
        report.words += report.last_words
        report.counters.update(counters)
        report.status |= answer["status"]
        if self._comparison is not None and report.difference is None:
            events = read_events(self._events, self.compiled.design)
            report.difference = self._comparison.token(
                events, token, wanted=want != NO_LOGITS, fresh=self._fresh
            )
            report.instructions = self._comparison.instructions
            report.values = self._comparison.values
        self._fresh = False
        return answer

    def restart(self) -> None:
        """The next token begins a sequence."""
        self._fresh = True

    def write(self, prompt: str, max_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Continue a text; pieces come as they are certain. Ends early where the oracle differs.

        Raises ValueError for a model without tokenizer or a bad prompt.
        """
        ids = self.prompt_ids(prompt)
        self._report.prompt_tokens += len(ids)

        def run(token: int, want: int) -> dict[str, Any]:
            if want != NO_LOGITS and self._report.difference is not None:
                raise StopIteration
            answer = self.token(token, want)
            self._report.tokens += want != NO_LOGITS
            return answer

        yield from continued(
            self._text,
            ids,
            self._config.end_token_ids,
            max_tokens,
            sampling,
            run,
            self._model.logits_scale,
        )

    def report(self) -> Report:
        """The figures so far."""
        return self._report
