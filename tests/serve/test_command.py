"""`nomatmul serve` as a user starts it: what it says, and what it refuses before it serves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import httpx
import pytest
from chat_models import ATTENTION
from random_packed import write_random
from support.serving import WAIT, serve_process

from nomatmul import cli
from nomatmul.engine.loading import BOX
from nomatmul.formats.packed.layout import Forms
from nomatmul.serve import memory
from nomatmul.serve.keys import find_keys
from nomatmul.serve.options import ServeOptions
from nomatmul.serve.server import Server


def refused(*arguments: object, **options: object) -> str:
    """The one line with which `nomatmul serve` ends with status 1."""
    done = subprocess.run(
        [sys.executable, "-m", "nomatmul", "serve", "--port", "0", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        **options,
    )
    assert (done.returncode, done.stdout) == (1, ""), done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("nomatmul: error: ")
    return lines[0].removeprefix("nomatmul: error: ")


def test_it_says_what_runs_where():
    box = f"nomatmul-box={BOX}"
    with serve_process(box, "--threads", 1, "--state-cache", "64MiB") as process:
        report = process.report
        assert report["api"] == f"{process.url}/v1"
        assert report["page"] == f"{process.url}/"
        assert report["pid"] == process.popen.pid
        assert report["state_cache"] == {"bytes": 64 << 20, "directory": None}
        (model,) = report["models"]
        assert model["name"] == "nomatmul-box"
        assert model["threads"] == 1
        assert model["chat_template"] == "plain"
        assert model["weight_bytes"] > 10**7
        assert 0 < report["ready_s"] < WAIT
        listed = httpx.get(f"{process.url}/v1/models").json()["data"]
        assert [each["id"] for each in listed] == ["nomatmul-box"]


def test_the_words_for_people(capsys):
    report = {
        "page": "P/",
        "api": "P/v1",
        "metrics": "P/metrics",
        "models": [
            {
                "name": "m",
                "kind": "language",
                "parameters": 1234,
                "packing": "2bit",
                "device": "cpu",
                "kernels": "avx2",
                "threads": 3,
                "weight_bytes": 5 * 10**6,
                "chat_template": "model",
                "stream_bytes": 0,
                "token_bytes": 512,
            },
            {
                "name": "e",
                "kind": "encoder",
                "parameters": 99,
                "packing": "none",
                "device": "cpu",
                "kernels": "avx2",
                "threads": 1,
                "weight_bytes": 10**3,
                "chat_template": None,
            },
        ],
        "state_cache": {"bytes": 10**9, "directory": "/states"},
        "limits": {"streams": 2, "queue": 3, "seconds": 60.0, "body_bytes": 10**6},
        "keys": 0,
        "open_to_all": True,
        "ready_s": 0.5,
    }
    from nomatmul.cli.serve import _lines

    assert _lines(report) == [
        "page         P/",
        "API          P/v1  (metrics: P/metrics)",
        "model m      1,234 parameters, 2bit weights, avx2 kernels on 3 threads, 5.00 MB of"
        " weights, 512 B a token of a stream, its own chat template",
        "model e      99 parameters, avx2 kernels on 1 thread, 1.00 kB of weights, an"
        " encoder, for embeddings",
        "state cache  up to 1.00 GB, kept in /states",
        "limits       2 streams, 3 waiting requests, 60 s a request, bodies of 1.00 MB",
        "keys         none: --api-key FILE asks for one",
        "WARNING      everybody who reaches this address may use the models",
        "ready after 0.50 s; Ctrl-C ends it",
    ]


def test_a_port_in_use_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused("--port", port)
    assert line == f"cannot listen on 127.0.0.1:{port}: Address already in use"


def test_faults_of_the_command_line_are_one_line(tmp_path):
    write_random(tmp_path / "m", ATTENTION, Forms.of(ATTENTION))
    shutil.copytree(tmp_path / "m", tmp_path / "other" / "m")
    (tmp_path / "empty").write_text("# no keys\n\n")
    (tmp_path / "bad").write_text("good-key-1\nbad key\n")
    cases = {
        "nothing-here does not exist": [tmp_path / "nothing-here"],
        "is no name for a model": [f"m={tmp_path / 'a b'}", tmp_path / "a b"],
        "two models are called 'm'": [tmp_path / "m", tmp_path / "other" / "m"],
        "has no tokenizer.json": [tmp_path / "m"],
        "cannot listen on no.such.host.invalid:0": ["--host", "no.such.host.invalid"],
        "port must be a whole number from 0 to 65535, got 70000": ["--port", 70000],
        "'1 stone' is not a size such as 1GiB": ["--state-cache", "1 stone"],
        "max-streams must be a whole number from 1 to 4096, got 0": ["--max-streams", 0],
        "timeout must be from 1 to 604800 seconds, got 0.0": ["--timeout", 0],
        "cors 'example.org' is no origin": ["--cors", "example.org"],
        "holds no API key": ["--api-key", tmp_path / "empty"],
        "bad, line 2: an API key is": ["--api-key", tmp_path / "bad"],
        "absent: No such file": ["--api-key", tmp_path / "absent"],
        f"the state directory {tmp_path / 'bad'} is a file": ["--state-dir", tmp_path / "bad"],
        "kv 'int8' is about keys and values": ["--kv", "int8"],
        "threads must be a whole number": ["--threads", 0],
        "absent.jinja: No such file": ["--chat-template", tmp_path / "absent.jinja"],
    }
    for words, arguments in cases.items():
        line = run_in_process(*arguments)
        assert words in line, (words, line)
        assert "bad key" not in line


def run_in_process(*arguments: object) -> str:
    """As `refused`, without a process."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["serve", "--port", "0", *map(str, arguments)])
    lines = [line for line in err.getvalue().splitlines() if "warning" not in line]
    assert (status, out.getvalue(), len(lines)) == (1, "", 1), (arguments, err.getvalue())
    return lines[0]


def test_a_state_directory_that_cannot_be_used_is_not_said_to_keep_states(tmp_path, caplog):
    from nomatmul.serve.startup import report

    (tmp_path / "file").write_text("")
    for directory, kept in ((tmp_path / "file" / "states", None), (tmp_path, str(tmp_path))):
        server = Server(ServeOptions(threads=1, state_dir=directory))
        server.start()
        try:
            assert report(server, "U")["state_cache"]["directory"] == kept
        finally:
            server.close(0.0)


def test_help_names_sizes_as_they_are_given(capsys):
    assert cli.main(["serve", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "0 keeps none (default 1GiB)" in words
    assert "beyond: status 413 (default 16MiB)" in words


def test_an_address_of_another_machine_is_one_line():
    line = run_in_process("--host", "192.0.2.1")
    assert "cannot listen on 192.0.2.1:0: Cannot assign requested address" in line


def test_models_beyond_the_memory_are_refused_before_they_are_loaded(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10**7)
    server = Server(ServeOptions())
    with pytest.raises(MemoryError, match=r"the models take 0\.0[12] GB, 0\.01 GB are available"):
        server.start()
    assert (server.models, server.state) == ({}, "loading")


def test_a_cache_that_would_not_fit_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(memory, "available_memory", lambda: 10**8)
    memory.check_memory([BOX], ServeOptions(state_cache=10**7))
    assert caplog.messages == []
    memory.check_memory([BOX], ServeOptions(state_cache=10**9))
    assert "a full state cache would not fit" in caplog.text


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'fastapi' else real(name, *more)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    line = refused(env={**os.environ, "PYTHONPATH": path})
    assert line == 'serve needs fastapi: pip install "nomatmul[serve]"'


def test_a_lock_of_another_server_is_one_line(tmp_path):
    with serve_process("--threads", 1, "--state-dir", tmp_path):
        assert str(tmp_path) in refused("--threads", 1, "--state-dir", tmp_path)


def test_keys_of_a_file_and_of_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst-key-1\n\n  second-key-2  \nfirst-key-1\n")
    file.chmod(0o600)
    monkeypatch.delenv("NOMATMUL_API_KEY", raising=False)
    assert find_keys(None) == ()
    assert find_keys(file) == ("first-key-1", "second-key-2")
    monkeypatch.setenv("NOMATMUL_API_KEY", "third-key-3")
    assert find_keys(file) == ("first-key-1", "second-key-2", "third-key-3")
    monkeypatch.setenv("NOMATMUL_API_KEY", "short")
    with pytest.raises(ValueError, match="NOMATMUL_API_KEY: an API key is 8 to 512 characters"):
        find_keys(None)
    file.chmod(0o644)
    monkeypatch.delenv("NOMATMUL_API_KEY")
    with pytest.warns(UserWarning, match="others may read the keys"):
        find_keys(file)


def test_the_heavy_packages_are_not_imported_for_a_model_without_template():
    code = (
        "import sys\n"
        "from nomatmul.serve.server import Server\n"
        "from nomatmul.serve.options import ServeOptions\n"
        "from nomatmul.serve.app import create_app\n"
        "from nomatmul.engine.loading import BOX\n"
        "server = Server(ServeOptions(models=(str(BOX),), threads=1))\n"
        "create_app(server); server.start()\n"
        "server.close(0)\n"
        "heavy = {'torch', 'transformers', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_is_handed_on(monkeypatch, tmp_path):
    from nomatmul.serve import run

    seen = []
    monkeypatch.setattr(run, "serve", lambda options, show: seen.append(options) or 0)
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-mine")
    keys.chmod(0o600)
    words = (
        f"a b --host ::1 --port 9 --threads 3 --device cuda --kv int8 --max-streams 5"
        f" --max-queue 6 --state-cache 7 --state-dir {tmp_path} --api-key {keys} --timeout 8"
        f" --grace 9 --max-body 2048 --max-connections 11 --cors * --allow-host x"
        f" --chat-template plain --log requests"
    )
    assert cli.main(["serve", *words.split()]) == 0
    assert json.loads(json.dumps(seen[0].__dict__, default=str)) == {
        "models": ["a", "b"],
        "host": "::1",
        "port": 9,
        "threads": 3,
        "device": "cuda",
        "kv": "int8",
        "max_streams": 5,
        "max_queue": 6,
        "state_cache": 7,
        "state_dir": str(tmp_path),
        "api_keys": ["a-key-of-mine"],
        "timeout": 8.0,
        "grace": 9.0,
        "max_body": 2048,
        "max_connections": 11,
        "cors": ["*"],
        "allow_host": ["x"],
        "chat_template": "plain",
        "log": "requests",
    }
