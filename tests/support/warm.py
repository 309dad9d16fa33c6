"""A stand-in for `sys.executable`: its processes begin with torch imported, which costs seconds.

One process imports the modules, once; each call of the stand-in (a script, `-m MODULE`, `-c CODE`)
runs in a fork of it, with the caller's arguments, environment, folder, streams and process group.
The stand-in passes on how the fork ended, and the fork is killed when the stand-in is: enough for
whoever runs programs to their end. Tests of signals, of what is imported, or of what variables do
while torch is imported start processes of their own.

    python warm.py serve SOCKET MODULE...     the process that forks; a line says that it is ready
    python warm.py call SOCKET ARGUMENT...    what the stand-in does
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

_LENGTH = 4  # bytes that say how long a job is


@contextmanager
def python(folder: Path, modules: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """The path of a stand-in whose processes have imported `modules`, all under `environment`.

    Elsewhere than on Linux it is Python under `environment`, which imports them each time.
    """
    import multiprocessing.spawn  # noqa: F401  # it keeps sys.executable, which tests replace

    path, program = folder / "socket", folder / "python"
    linux = hasattr(os, "pidfd_open")
    ours = f'-I -S "{Path(__file__).resolve()}" call "{path}"' if linux else ""
    exported = "".join(f"export {name}={value}\n" for name, value in environment.items())
    program.write_text(f'#!/bin/sh\n{exported}exec "{sys.executable}" {ours} "$@"\n')
    program.chmod(0o755)
    if not linux:
        yield str(program)
        return
    command = [sys.executable, str(Path(__file__)), "serve", str(path), *modules]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        assert server.stdout.readline(), "the process that imports ended"
        try:
            yield str(program)
        finally:
            server.stdin.close()  # it ends then


# -- the stand-in: imports little -----------------------------------------------------------------


def _call(path: str, words: list[str]) -> None:
    if words[0].startswith("-") and words[0] not in ("-m", "-c"):  # whatever other options say
        os.execv(sys.executable, [sys.executable, *words])
    if words[:2] == ["-m", "nomatmul.train.children"]:  # it would look for its parent: that is us
        words = ["-m", *words[3:]]
    job = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
    job |= {"group": os.getpgrp(), "python": str(Path(path).with_name("python"))}
    text = json.dumps(job).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(text).to_bytes(_LENGTH, "little")], [0, 1, 2])
        server.sendall(text)
        answer = server.recv(16)
    status = int(answer or b"1")
    if status < 0:  # ended by a signal: so do we
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# -- the process that forks -----------------------------------------------------------------------


def _serve(path: str, modules: list[str]) -> None:
    """Fork for each caller, until standard input closes."""
    import importlib
    import multiprocessing.spawn  # noqa: F401  # as in `python`

    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # else the first collection of each fork copies all pages
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        os.dup2(2, 1)
        keepers: set[int] = set()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                break
            caller, _ = listener.accept()
            keeper = os.fork()
            if not keeper:
                listener.close()
                _keep(caller)
                return
            caller.close()
            keepers = {pid for pid in {*keepers, keeper} if not os.waitpid(pid, os.WNOHANG)[0]}
        for pid in keepers:
            os.waitpid(pid, 0)


def _keep(caller: socket.socket) -> None:
    """Fork once more, for the job; tell the caller how it ended."""
    head, streams, _, _ = socket.recv_fds(caller, _LENGTH, 3)
    job = json.loads(caller.makefile("rb").read(int.from_bytes(head, "little")))
    child = os.fork()
    if not child:
        caller.close()
        _end(_become, job, streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, caller], [], [])
    if ended not in ready:  # the caller is gone
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):
        caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _end(work: Callable[..., None], *arguments: Any) -> NoReturn:
    """Do it, and end as Python does, but without taking apart all that was imported."""
    status: object = 0
    try:
        work(*arguments)
    except SystemExit as left:
        status = left.code
    except BaseException:  # said, as Python says it
        traceback.print_exc()
        status = 1
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(int(status or 0) & 0xFF)


def _become(job: dict[str, Any], streams: list[int]) -> None:
    """Run the job as Python would have, in this process."""
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    with suppress(OSError):  # another session's
        os.setpgid(0, job["group"])
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115
    os.chdir(job["folder"])
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(job["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.executable = job["python"]
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    rest = [path for path in sys.path[1:] if path not in own]
    kind, words = job["words"][0], job["words"]
    first = {"-m": job["folder"], "-c": ""}.get(kind, os.path.dirname(os.path.abspath(kind)))
    sys.path[:] = [first, *filter(None, theirs), *rest]
    if kind == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = words
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    {"call": _call, "serve": _serve}[sys.argv[1]](sys.argv[2], sys.argv[3:])
