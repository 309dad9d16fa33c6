"""The command `nomatmul`: picks a subcommand, imports only that one, turns errors into one line.

Start-up is part of the product (the first token of `generate` is due within 0.4 s of the command),
so this file and `options.py` import the standard library only, and each subcommand's module imports
what it needs inside `run`.

Exit status: 0 done, 1 bad input or failure (one line `nomatmul: error: ...` on stderr),
130 after Ctrl-C, 141 when the reader of our output has gone (as other Unix tools).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

# name -> (module in this package, one line for `nomatmul --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("generate", "continue a prompt, streaming the text"),
    "chat": ("chat", "talk or write with a model; its state is kept between turns"),
    "serve": ("serve", "answer OpenAI's HTTP interface, and a chat page, with packed models"),
    "train": ("train", "train a model on your own text"),
    "distill": ("distill", "train a student of any causal language model on your own text"),
    "ternarise": ("ternarise", "make a pretrained Llama or Qwen3 ternary, taught by itself"),
    "recipes": ("recipes", "list the recipes of `train`: size, data, time, what each is for"),
    "compare": ("compare", "does a layer pay? train its controls beside it and report"),
    "finetune": ("finetune", "fine-tune an encoder on GLUE or on your own labelled texts"),
    "pack": ("pack", "turn a training checkpoint or a published model into a packed one"),
    "export": ("export", "write a ternary model for llama.cpp (GGUF) or transformers"),
    "embed": ("embed", "turn texts into vectors with a packed model"),
    "fill-mask": ("fill_mask", "let a packed masked language model fill the gaps of a text"),
    "classify": ("classify", "classify texts or tokens with a packed, fine-tuned encoder"),
    "eval": ("evaluate", "loss, perplexity and bits per byte of a text"),
    "bench": ("bench", "decode and prefill speed, memory, fraction of the bandwidth limit"),
    "footprint": ("footprint", "bytes of a packed model: on disk, resident, peak, by part"),
    "hardware": ("hardware", "the accelerator: compile a model for it, simulate it, its Verilog"),
    "doctor": ("doctor", "check this machine: CPU, kernels, memory, optional parts, versions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status and never raises for a user's mistake.

    argv: the arguments without the program's name; None takes them from `sys.argv`.
    With NOMATMUL_DEBUG=1 in the environment errors keep their traceback.
    """
    _open_missing_streams()
    _replace_what_cannot_be_shown()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            _print_error("")  # the text that was being written ends in the middle of a line
        _print_error("nomatmul: interrupted")
        return _flushed(130)
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except Exception as error:  # nothing is hidden: one line and status 1, or the traceback
        if os.environ.get("NOMATMUL_DEBUG") == "1":
            raise
        _print_error(f"nomatmul: error: {one_line(error)}")
        return _flushed(1)


def _print_error(line: str) -> None:
    """A line on standard error, or nothing where its reader has gone."""
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)


def _flushed(status: int) -> int:
    """The status, standard output written as far as it can be."""
    try:
        sys.stdout.flush()
    except OSError:  # the output itself was the trouble (full disk, closed pipe): already reported
        _drop_stdout()
    return status


def _replace_what_cannot_be_shown() -> None:
    """A terminal's encoding may lack characters that a model writes: the rest is still due."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # not so in programs that capture the output
            stream.reconfigure(errors=errors)


def _open_missing_streams() -> None:
    """Whoever started us may have closed a stream (`<&-`, some daemons): Python has None there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open as long as we are


def one_line(error: BaseException) -> str:
    """An exception as one line for a user; what nobody foresaw is named as ours to mend."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory ({text})"
    elif not isinstance(error, ValueError | OSError | ImportError | RuntimeError):
        text = f"internal error, please report: {type(error).__name__}: {text}"
    return " ".join(text.split())


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"nomatmul: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1 and arguments[0] == "help":
            return _dispatch([arguments[1], "--help"])
        print(_overview())
        return 0
    name = arguments[0]
    if name in ("--version", "-V", "version"):
        from nomatmul import __version__

        print(f"nomatmul {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(
            f"unknown command {name!r}; the commands are {', '.join(COMMANDS)} (try --help)"
        )
    module, rest = importlib.import_module(f"nomatmul.cli.{COMMANDS[name][0]}"), arguments[1:]
    if hasattr(module, "SUBCOMMANDS"):
        if not rest or rest[0] in ("-h", "--help", "help"):
            print(_group_help(name, module))
            return 0
        name, module, rest = _subcommand(name, module, rest)
    from nomatmul.cli.options import HelpShown, parse

    try:
        options = parse(name, module, rest)
    except HelpShown as shown:
        print(shown.text, end="")
        return 0
    return int(module.run(options) or 0)


def leaf_commands() -> dict[str, str]:
    """{command, of two words where it is in a group: module in this package}, all of them."""
    found: dict[str, str] = {}
    for name, (module_name, _) in COMMANDS.items():
        module = importlib.import_module(f"nomatmul.cli.{module_name}")
        group: dict[str, tuple[str, str]] = getattr(module, "SUBCOMMANDS", {})
        found |= {f"{name} {word}": leaf for word, (leaf, _) in group.items()}
        if not group:
            found[name] = module_name
    return found


def _subcommand(name: str, group: Any, words: list[str]) -> tuple[str, Any, list[str]]:
    """The command that the first of `words` names in a group, its module, the other words."""
    if words[0] not in group.SUBCOMMANDS:
        known = ", ".join(group.SUBCOMMANDS)
        raise ValueError(
            f"unknown command '{name} {words[0]}'; the commands are {known} (try --help)"
        )
    module = importlib.import_module(f"nomatmul.cli.{group.SUBCOMMANDS[words[0]][0]}")
    return f"{name} {words[0]}", module, words[1:]


def _group_help(name: str, group: Any) -> str:
    lines = [f"usage: nomatmul {name} COMMAND [options]", "", (group.__doc__ or "").strip(), ""]
    lines += [
        "commands:",
        *(f"  {word:12} {text}" for word, (_, text) in group.SUBCOMMANDS.items()),
    ]
    return "\n".join([*lines, group.EXAMPLES.rstrip("\n")])


def _overview() -> str:
    lines = [
        "usage: nomatmul COMMAND [options]        (nomatmul COMMAND --help explains one)",
        "",
        "Ternary language models without a dense matrix product: train, pack, run.",
        "",
        "commands:",
    ]
    lines += [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "first steps:",
        '  nomatmul generate "The river"               the model in the box continues your words',
        "  nomatmul serve                              a chat page and OpenAI's HTTP interface",
        "  nomatmul doctor                             what this machine can do",
        "  nomatmul pack CHECKPOINT PACKED             make a trained or published model small",
        "",
        "environment: NOMATMUL_ISA=avx2 forces a kernel, NOMATMUL_DEBUG=1 shows tracebacks.",
    ]
    return "\n".join(lines)


def _drop_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush cannot fail again."""
    with contextlib.suppress(OSError, ValueError):  # stdout may be no file (a test's capture)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
