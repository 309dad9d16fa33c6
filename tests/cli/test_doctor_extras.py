"""What doctor calls an extra is what pyproject.toml installs for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nomatmul.cli import doctor

MODULE_OF = {"scikit-learn": "sklearn", "llama-cpp-python": "llama_cpp"}


@pytest.mark.parametrize("extra", ["train", "bench", "serve"])
def test_every_package_of_an_extra_is_looked_for(extra):
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    listed = re.search(rf"^{extra} = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)[1]
    packages = re.findall(r'"([A-Za-z0-9_.-]+?)[><=]', listed)
    assert packages
    assert sorted(doctor.EXTRAS[extra]) == sorted(
        MODULE_OF.get(p, p.replace("-", "_")) for p in packages
    )
