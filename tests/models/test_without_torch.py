"""Where torch is missing, every room that needs it says so in one line with pip's command."""

from __future__ import annotations

import subprocess
import sys

import pytest

_BLOCK = "import sys; sys.modules['{missing}'] = None\n"
LINE = 'pip install "nomatmul[train]"'


@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.parametrize(
    "code",
    [
        "import nomatmul.models",
        "import nomatmul; nomatmul.models",
        "from nomatmul.train import run",
        "from nomatmul.finetune import finetune",
    ],
)
def test_a_room_names_what_it_lacks(code, missing):
    _check(code, missing)


def test_operations_need_torch_alone():
    _check("from nomatmul.ops.fff import fff", "torch")
    code = _BLOCK.format(missing="transformers") + "from nomatmul.ops.fff import fff"
    subprocess.run([sys.executable, "-c", code], check=True)


def _check(code: str, missing: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCK.format(missing=missing) + code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: ")
    assert missing in last
    assert last.endswith(LINE)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "cpu_minute", "--data", __file__, "--out", "never"],
        ["finetune", "never", "--task", "sst2", "--data", "never", "--out", "never"],
        ["generate", "--device", "cuda", "--prompt", "a"],
    ],
)
def test_a_command_names_what_it_lacks(words, tmp_path):
    code = _BLOCK.format(missing="torch")
    code += f"from nomatmul.cli import main; sys.argv = ['nomatmul', *{words!r}]; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert LINE in done.stderr
    assert not list(tmp_path.iterdir())
