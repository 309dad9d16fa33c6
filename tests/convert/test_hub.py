"""Models by their name on the Hub: what is downloaded, checked, packed once and used again.

The Hub is a small one on the loopback address.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf_models
import huggingface_hub.constants
import numpy as np
import pytest
from filelock import FileLock
from hub_server import Hub, serve
from model_files import write_published, write_tokenizer

import nomatmul
from nomatmul import cli
from nomatmul.convert import pack
from nomatmul.convert.export import export
from nomatmul.convert.hub import packed_directory
from nomatmul.formats.chat_template import find_template
from nomatmul.formats.checkpoint import open_checkpoint
from nomatmul.formats.errors import FormatError
from nomatmul.formats.generation_config import sampling_defaults
from nomatmul.formats.hub import download, local_path
from nomatmul.formats.hub_files import HubName
from nomatmul.formats.tokenizer import load_tokenizer

NAME = "owner/name.v1"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A published model with a tokenizer, and files that no one needs."""
    directory = tmp_path_factory.mktemp("hub") / "published"
    write_published(directory, np.random.default_rng(0))
    write_tokenizer(directory)
    (directory / "training_args.bin").write_bytes(b"x" * 5000)
    (directory / "images").mkdir()
    (directory / "images" / "config.json").write_text("{}")
    return directory


@pytest.fixture
def hub(published, tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with the model, and empty caches."""
    with serve() as server:
        server.add(NAME, published)
        monkeypatch.setenv("NOMATMUL_CACHE", str(tmp_path / "ours"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "theirs"))
        use(server, monkeypatch)
        # it writes to the stderr of the test that came first
        monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])
        yield server


def use(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask this hub, which it takes from the environment when imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:a/b", ("a/b", None, None)),
        ("hf:a/b.c-1_d@refs/pr/3", ("a/b.c-1_d", None, "refs/pr/3")),
        ("hf:a/b/q/m.gguf@v1.0", ("a/b", "q/m.gguf", "v1.0")),
    ],
)
def test_names_are_taken_apart(text, parts):
    name = HubName.parse(text)
    assert (name.repository, name.file, name.revision) == parts
    assert str(name) == text


@pytest.mark.parametrize(
    "text", ["hf:", "hf:a", "hf:a/b@", "hf:a/../c.gguf", "hf:a/b@x y", "hf:/a/b", "hf:a/b/c.bin"]
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"is no name of a model|names a file that is no \.gguf"):
        HubName.parse(text)


def test_a_model_is_packed_once(hub, published, tmp_path, capsys):
    lm = nomatmul.load(f"hf:{NAME}")
    commit = hub.commit(NAME)
    assert lm.path == tmp_path / "ours" / "packed" / f"owner--name.v1@{commit}"
    pack(published, tmp_path / "packed", check=False)
    assert lm.fingerprint == nomatmul.load(tmp_path / "packed").fingerprint
    paths = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    files = {path.rpartition("/")[2] for path in paths}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
    shown = capsys.readouterr().err
    assert "downloading 3 files, 0." in shown
    assert f"packing it into {lm.path}" in shown
    before, written = len(hub.requests), lm.path.stat().st_mtime_ns
    again = nomatmul.load(f"hf:{NAME}")
    assert again.fingerprint == lm.fingerprint
    assert again.path.stat().st_mtime_ns == written
    later = hub.requests[before:]
    assert later
    assert [path for method, path, _ in later if method == "GET" and "resolve" in path] == []
    assert capsys.readouterr().err == ""
    nomatmul.load(f"hf:{NAME}@{commit}")  # a new name for the same commit
    assert hub.downloads("model.safetensors") == [None]
    fixed = len(hub.requests)
    nomatmul.load(f"hf:{NAME}@{commit}")  # commits never change: the Hub is not asked
    assert hub.requests[fixed:] == []


def test_a_packed_model_is_used_as_it_is(hub, published, tmp_path):
    pack(published, tmp_path / "packed", check=False)
    hub.add("owner/packed", tmp_path / "packed")
    lm = nomatmul.load("hf:owner/packed")
    assert lm.fingerprint == nomatmul.load(tmp_path / "packed").fingerprint
    assert not (tmp_path / "ours" / "packed").exists()


def test_a_broken_connection_is_taken_up_again(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.broken["model.safetensors"] = 40_000
    path = local_path(f"hf:{NAME}")
    assert (path / "model.safetensors").read_bytes() == hub.repositories[NAME]["model.safetensors"]
    assert hub.downloads("model.safetensors") == [None, "bytes=40000-"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_wrong_checksum_is_refused_and_mended(hub, file):
    hub.lies[file] = "0" * (64 if file == "model.safetensors" else 40)
    with pytest.raises(FormatError, match=f"{file} was damaged on its way .*the Hub says 0000"):
        local_path(f"hf:{NAME}")
    hub.lies.clear()
    path = local_path(f"hf:{NAME}")
    assert (path / file).read_bytes() == hub.repositories[NAME][file]


def test_a_file_that_changed_in_the_cache_is_noticed(hub):
    path = local_path(f"hf:{NAME}") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.safetensors was damaged"):
        local_path(f"hf:{NAME}")
    assert local_path(f"hf:{NAME}") == path.parent
    assert path.read_bytes() == hub.repositories[NAME]["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"hf:{NAME}@v9", "hf:owner/name.v1 has no revision 'v9'"),
        ("hf:owner/absent", "hf:owner/absent does not exist, or is private: then set HF_TOKEN"),
        ("hf:owner/gated", "given only to those who asked for it"),
        (f"hf:{NAME}/m.gguf", "has no file m.gguf"),
        ("hf:owner/empty", "holds no model: neither a config.json with model.safetensors or"),
    ],
)
def test_what_the_hub_does_not_have(hub, text, message, tmp_path, capsys):
    hub.repositories["owner/gated"] = {"config.json": b"{}"}
    hub.repositories["owner/empty"] = {"README.md": b"nothing"}
    hub.gated.add("owner/gated")
    target = tmp_path / "target"
    assert cli.main(["pack", text, str(target)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("nomatmul: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not target.exists()


def test_one_of_several_gguf_files_must_be_named(hub):
    files = {"a-Q2_0.gguf": b"a" * 2000, "sub/b.gguf": b"b" * 2000, "README.md": b"x"}
    files["generation_config.json"] = b"{}"
    hub.repositories["owner/g"] = files
    with pytest.raises(ValueError, match=r"holds 2 models; write hf:owner/g/FILE with one of a-Q2"):
        download(HubName.parse("hf:owner/g"))
    with pytest.raises(ValueError, match=r"no file c.gguf; write hf:owner/g/FILE with one of a-Q2"):
        download(HubName.parse("hf:owner/g/c.gguf"))
    for file in list(files)[:2]:
        assert local_path(f"hf:owner/g/{file}").read_bytes() == files[file]
    del files["sub/b.gguf"]
    assert local_path("hf:owner/g").name == "a-Q2_0.gguf"
    assert (local_path("hf:owner/g").parent / "generation_config.json").read_bytes() == b"{}"
    assert hub.downloads("README.md") == []


def test_a_gguf_file_is_packed_with_what_it_holds(hub, tmp_path):
    def keys(writer):
        gguf_models.sizes(writer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        letters = [chr(ord("A") + i) for i in range(37)]
        writer.add_token_list([*letters, "AB", "<|im_start|>", "<|im_end|>"])
        writer.add_token_types([1] * 38 + [3] * 2)
        writer.add_token_merges(["A B"])
        writer.add_eos_token_id(39)
        writer.add_chat_template("{{ messages[0].content }}")

    path = tmp_path / "m.gguf"
    gguf_models.write_gguf(path, "qwen3", np.random.default_rng(0), kind="TQ2_0", keys=keys)
    hub.repositories["owner/g"] = {
        "m-TQ2_0.gguf": path.read_bytes(),
        "other.gguf": b"x" * 2000,
        "generation_config.json": b'{"top_k": 7}',
    }
    packed = packed_directory("hf:owner/g/m-TQ2_0.gguf")
    assert packed.name == f"owner--g--m-TQ2_0.gguf@{hub.commit('owner/g')}"
    assert find_template(packed) == "{{ messages[0].content }}"
    assert sampling_defaults(packed) == {"top_k": 7}
    assert load_tokenizer(packed).token_to_id("<|im_end|>") == 39
    assert packed_directory("hf:owner/g/m-TQ2_0.gguf") == packed
    export("hf:owner/g/m-TQ2_0.gguf", tmp_path / "unpacked")
    assert sampling_defaults(tmp_path / "unpacked") == {"top_k": 7}
    assert find_template(tmp_path / "unpacked") == "{{ messages[0].content }}"
    assert open_checkpoint(tmp_path / "unpacked").config.qk_norm
    assert hub.downloads("other.gguf") == []


def test_an_index_names_the_files(hub, published):
    """Of a model in several files those are taken that its index names."""
    files = dict(hub.repositories[NAME])
    weights = files.pop("model.safetensors")
    weight_map = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(weight_map).encode()
    files |= {f"part-{i}.safetensors": weights for i in (1, 2, 3)}
    hub.repositories["owner/parts"] = files
    names = {path.name for path in local_path("hf:owner/parts").iterdir()}
    assert {"part-1.safetensors", "part-2.safetensors", "tokenizer.json"} < names
    assert "part-3.safetensors" not in names


def test_parts_of_a_gguf_file_come_together(hub):
    parts = [f"q/m-0000{part}-of-00002.gguf" for part in (1, 2)]
    hub.repositories["owner/g"] = dict.fromkeys((*parts, "other.gguf"), b"GGUF")
    found = local_path(f"hf:owner/g/{parts[1]}")
    assert found.name == "m-00002-of-00002.gguf"
    assert sorted(path.name for path in found.parent.iterdir()) == [part[2:] for part in parts]
    assert hub.downloads("other.gguf") == []
    with pytest.raises(ValueError, match=rf"holds 2 models; .* one of {parts[0]}, other\.gguf$"):
        local_path("hf:owner/g")
    hub.repositories["owner/h"] = dict.fromkeys(parts, b"GGUF")
    assert local_path("hf:owner/h").name == "m-00001-of-00002.gguf"
    hub.repositories["owner/i"] = {parts[1]: b"GGUF"}
    with pytest.raises(ValueError, match=f"hf:owner/i lacks {parts[0]}, of 2 parts"):
        local_path("hf:owner/i")


def test_without_a_network_the_cache_serves(published, hub, monkeypatch, capsys):
    first = nomatmul.load(f"hf:{NAME}")
    gone = Hub(url="http://127.0.0.1:9")  # nobody listens there
    use(gone, monkeypatch)
    capsys.readouterr()
    assert nomatmul.load(f"hf:{NAME}").fingerprint == first.fingerprint
    assert "the Hub cannot be reached; using the cache" in capsys.readouterr().err
    with pytest.raises(ValueError, match="hf:owner/other cannot be downloaded: "):
        nomatmul.load("hf:owner/other")
    with pytest.raises(ValueError, match=f"hf:{NAME}@v2 cannot be downloaded: "):
        nomatmul.load(f"hf:{NAME}@v2")


def test_a_second_process_waits(hub, tmp_path, monkeypatch, capsys):
    """Who holds the lock packs; who waited for it takes what is there then."""
    target = tmp_path / "ours" / "packed" / f"owner--name.v1@{hub.commit(NAME)}"
    target.parent.mkdir(parents=True)
    (target.parent / f".{target.name}.part-1234").mkdir()  # left by a process that was killed
    lock, found = FileLock(target.with_name(f".{target.name}.lock")), []
    lock.acquire()
    thread = threading.Thread(target=lambda: found.append(packed_directory(f"hf:{NAME}")))
    thread.start()
    while "waiting for another process" not in capsys.readouterr().err:
        assert thread.is_alive()
        thread.join(0.02)
    assert not target.exists()
    lock.release()
    thread.join()
    assert found == [target]
    assert [path.name for path in target.parent.glob(".*.part-*")] == []


def test_commands_take_the_settings_of_the_environment(hub, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "NOMATMUL_CACHE": str(tmp_path / "cache"),
    }
    arguments = ["generate", "w1 w2", "--model", f"hf:{NAME}", "--max-tokens", "3", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "nomatmul", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert Path(report["model"]).parent == tmp_path / "cache" / "packed"
    assert report["prompt_tokens"] == 3


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'need huggingface_hub .*"nomatmul\[hub\]"'):
        nomatmul.load("hf:owner/name")


def test_a_directory_that_is_not_packed_is_refused_with_the_command(published):
    with pytest.raises(FormatError, match="is not packed: `nomatmul pack "):
        nomatmul.load(published)
