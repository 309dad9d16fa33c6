"""`make soak`: a server under clients of all kinds for twenty minutes.

Serves the model in the box and small random models; every kind of client of `soak_clients` comes
and goes. At the end: nothing that a client was promised failed, no answer held a token of another's
(`soak_known`), resident memory has grown by less than 5 % since the first two minutes, and the
counters of /metrics add up to what clients saw. Writes a log, a line every ten seconds.

    python tests/support/soak.py --minutes 20 --clients 64 --log build/soak.log
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tests", "benchmarks"):
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))

from processes import memory  # noqa: E402
from serve_client import Address, fetch  # noqa: E402
from serve_sides import Served, ours  # noqa: E402
from support.soak_clients import World, client  # noqa: E402
from support.soak_known import known_requests  # noqa: E402

from nomatmul.engine.loading import BOX  # noqa: E402
from nomatmul.serve.models import model_paths, open_models  # noqa: E402

LOG_SECONDS = 10.0
GROWTH = 1.05  # resident memory at the end, of that after WARM_SECONDS
WARM_SECONDS = 120.0
WINDOW_SECONDS = 60.0  # whose median is compared: bodies of ten megabytes come and go
STATE_CACHE = "8MiB"  # full before memory is compared
WATCHED = ("/metrics", "/ready")  # what the soak itself asks for, too
CACHE_BYTES = "nomatmul_cache_bytes"
SETTLE_SECONDS = 60.0  # for what clients left behind
_LINE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--known", type=int, default=300, help="requests whose answers are known")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "soak.log")
    arguments = parser.parse_args(argv)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("w") as log, tempfile.TemporaryDirectory() as folder:
        world = soak(Path(folder), 60 * arguments.minutes, arguments.clients, arguments.known, log)
    print(*(fault[:1000] for fault in world.faults[:20]), sep="\n")
    print(f"{sum(world.done.values())} visits, {len(world.faults)} faults; {arguments.log}")
    return 1 if world.faults else 0


def soak(folder: Path, seconds: float, clients: int, known: int, log: TextIO) -> World:
    """Run it; what went wrong are the `faults` of what is returned."""
    models = [f"box={BOX}", f"chat={_chat_directory(folder / 'chat')}"]
    requests = known_requests(open_models(model_paths(models), threads=1), known, seed=1)
    options = (
        "--max-queue",
        "32",
        "--state-cache",
        STATE_CACHE,
        "--state-dir",
        str(folder / "states"),
    )
    server = ours("the server", models, 1, *options)
    try:
        world = World(server.address, requests, time.monotonic() + seconds, log=log)
        resident = asyncio.run(_run(server, world, clients))
        _check_memory(world, resident, seconds)
        if server.process.poll() is not None:
            world.fault(f"the server ended with {server.process.returncode}: {server.said()}")
    finally:
        status = server.close()
    if status != 0:
        world.fault(f"the server ended with {status}: {server.said()}")
    if "Traceback" in server.said():
        world.fault(f"the server met a fault: {server.said()}")
    world.say(f"{dict(world.done)}, {len(world.faults)} faults")
    return world


def _chat_directory(directory: Path) -> Path:
    """A small model with attention, positions that end, and a chat template."""
    from chat_models import ATTENTION, write_chat_files
    from chat_templates import CHATML
    from random_packed import write_random

    from nomatmul.formats.packed import Forms

    files = write_chat_files(directory.with_name("chat-files"), CHATML)
    config = dataclasses.replace(ATTENTION, max_position_embeddings=2048)
    forms = Forms.of(config, ternary="2bit")
    write_random(directory, config, forms, tokenizer_path=files / "tokenizer.json")
    return directory


async def _run(server: Served, world: World, clients: int) -> list[tuple[float, int]]:
    """Let the clients come; returns (seconds, resident bytes) over time."""
    start, resident = time.monotonic(), []
    tasks = [asyncio.ensure_future(client(world, number)) for number in range(clients)]
    said = 0.0
    while True:
        _, pending = await asyncio.wait(tasks, timeout=1.0)
        if server.process.poll() is not None:
            world.fault("the server died")
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return resident
        now = time.monotonic() - start
        resident.append((now, memory(server.process.pid)["resident"]))
        if now - said >= LOG_SECONDS or not pending:
            said = now
            seen = sum(world.seen.values())
            cached = await _cache_bytes(server.address)
            world.say(f"{now:7.0f} s {resident[-1][1] / 1e6:7.1f} MB,"
                 f" {cached / 1e6:.1f} of them states, {seen} answers"
                 f" {sum(world.left.values())} left {len(world.faults)} faults")  # fmt: skip
        if not pending:
            break
    await _check_counters(world)
    return resident


def _check_memory(world: World, resident: list[tuple[float, int]], seconds: float) -> None:
    """Medians of a minute, behind the first two minutes and at the end."""
    if seconds < 2 * WARM_SECONDS:
        return
    warm = [size for at, size in resident if WARM_SECONDS <= at < WARM_SECONDS + WINDOW_SECONDS]
    last = [size for at, size in resident if seconds - WINDOW_SECONDS <= at < seconds]
    first, end = statistics.median(warm), statistics.median(last)
    if end > GROWTH * first:
        world.fault(f"resident memory grew from {first / 1e6:.1f} to {end / 1e6:.1f} MB")


async def _check_counters(world: World) -> None:
    """/metrics when all is quiet: every request has its place, and tokens are those of answers."""
    found = await _quiet(world.address)
    if found is None:
        world.fault(f"work goes on {SETTLE_SECONDS} s after the last client")
        return
    counted, seen = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for labels, value in found["nomatmul_requests_total"]:
        route, status = re.search(r'route="(.*?)",status="(\d+)"', labels).groups()
        if route not in WATCHED:
            counted[_kind(route, status)] += int(value)
    for (path, status), count in world.seen.items():
        if path not in WATCHED:
            seen[_kind(path, status)] += count
    missing, surplus = seen - counted, (counted - seen).total()
    if missing or surplus > world.left.total():
        world.fault(
            f"/metrics counts {dict(counted)}, clients saw {dict(seen)} and"
            f" {world.left.total()} left early"
        )
    total = {name: sum(value for _, value in lines) for name, lines in found.items()}
    for name, value in world.usage.items():
        if total[f"nomatmul_{name}_total"] < value:
            world.fault(f"/metrics has fewer {name} than the {value} of clients")
    ends = ("finished", "cancelled", "timed_out", "failed", "shut_down")
    over = sum(total[f"nomatmul_jobs_{end}_total"] for end in ends)
    if over != total["nomatmul_jobs_submitted_total"]:
        world.fault(f"{over} jobs ended of {total['nomatmul_jobs_submitted_total']}")
    if total["nomatmul_jobs_failed_total"]:
        world.fault("jobs met an error")


def _kind(path: str, status: str | int) -> tuple[str, int]:
    """What is compared: of answers the route, too; a refused request may have none yet."""
    return (path if int(status) == 200 else "", int(status))


async def _cache_bytes(address: Address) -> float:
    try:
        _, text = await asyncio.wait_for(fetch(address, "/metrics"), LOG_SECONDS)
    except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
        return 0.0  # whoever looks next will say it
    return sum(float(value) for name, _, value in _LINE.findall(text) if name == CACHE_BYTES)


async def _quiet(address: Address) -> dict[str, list[tuple[str, float]]] | None:
    """{metric: [(labels, value)]} once nothing runs; None where that does not come."""
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end:
        _, text = await fetch(address, "/metrics")
        found: dict[str, list[tuple[str, float]]] = {}
        for name, labels, value in _LINE.findall(text):
            found.setdefault(name, []).append((labels, float(value)))
        idle = ("nomatmul_streams_running", "nomatmul_requests_waiting")
        if all(value == 0 for name in idle for _, value in found[name]):
            return found
        await asyncio.sleep(0.1)
    return None


if __name__ == "__main__":
    raise SystemExit(main())
