"""What doctor calls an extra is what pyproject.toml installs for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nomatmul.cli import doctor

MODULE_OF = {"scikit-learn": "sklearn", "llama-cpp-python": "llama_cpp"}


PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")


def test_every_extra_of_users_is_looked_for():
    table = PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([a-z-]+) = \[", table, re.MULTILINE))
    assert extras - {"test", "dev"} == set(doctor.EXTRAS)


@pytest.mark.parametrize("extra", ["train", "bench", "serve", "chat", "hub", "hardware"])
def test_every_package_of_an_extra_is_looked_for(extra):
    listed = re.search(rf"^{extra} = \[(.*?)\]", PYPROJECT, re.DOTALL | re.MULTILINE)[1]
    packages = re.findall(r'"([A-Za-z0-9_.-]+?)[><=]', listed)
    assert packages
    assert sorted(doctor.EXTRAS[extra]) == sorted(
        MODULE_OF.get(p, p.replace("-", "_")) for p in packages
    )
