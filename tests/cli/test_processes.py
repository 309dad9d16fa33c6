"""What only a real process shows: signals, pipes, a full disk, what gets imported."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys

import pytest

NOMATMUL = [sys.executable, "-m", "nomatmul"]


def _start(*arguments, **options):
    return subprocess.Popen(
        [*NOMATMUL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_in_generate_exits_130(packed):
    process = _start("generate", "--model", packed, "--prompt", "w1", "--max-tokens", 10**9)
    assert process.stdout.read(3)  # it is writing
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "nomatmul: interrupted\n"


def test_ctrl_c_at_the_prompt_of_chat_exits_130(packed):
    process = _start("chat", "--model", packed, "--max-tokens", 2, stdin=subprocess.PIPE)
    process.stdin.write("w1\n")
    process.stdin.flush()
    assert process.stdout.readline()  # the answer is there, it waits for the next turn
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "nomatmul: interrupted\n"


def test_a_closed_pipe_ends_generate_quietly(packed):
    process = _start("generate", "--model", packed, "--prompt", "w1", "--max-tokens", 10**9)
    assert process.stdout.read(3)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_an_error(packed):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*NOMATMUL, "generate", "--model", str(packed), "--prompt", "w1", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "nomatmul: error: No space left on device\n"


def test_a_full_disk_while_packing_leaves_nothing(training, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    limit = 6000  # bytes a file may grow to: config and tokenizer fit, the weights do not
    process = _start(
        "pack",
        training,
        out / "packed",
        "--no-check",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    stdout, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stdout == ""
    assert len(err.splitlines()) == 1
    assert "cannot write" in err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_packing_leaves_nothing(training, tmp_path, name):
    # The process stops itself at the fourth tensor: in the middle, and always at the same place.
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import os, signal, sys\n"
        "import nomatmul.convert.packing as room\n"
        "from nomatmul.cli import main\n"
        "def stop(*_):\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "room.silent = lambda done, total, name: stop() if done == 3 else None\n"
        f"sys.exit(main(['pack', {str(training)!r}, {str(out / 'packed')!r}, '--no-check']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "nomatmul: interrupted\n")
    assert list(out.iterdir()) == []


def test_generate_imports_no_torch(packed):
    code = (
        "import sys\n"
        "from nomatmul.cli import main\n"
        f"main(['generate', '--model', {str(packed)!r}, '--prompt', 'w1', '--max-tokens', '2'])\n"
        "heavy = {'torch', 'transformers', 'tyro', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_pasted_block_is_one_turn_of_chat(packed):
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*NOMATMUL, "chat", "--model", str(packed), "--max-tokens", "2", "--seed", "1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        _read_until(ours, b"> ")
        os.write(ours, b"w1 w2\nw3 w4\n/quit w5\n")
        answer = _read_until(ours, b"> ")
        assert answer.count(b"> ") == 1  # one answer, then the next prompt
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(terminal: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end):
        assert select.select([terminal], [], [], 60)[0], seen
        seen += os.read(terminal, 4096)
    return seen
