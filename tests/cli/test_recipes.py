"""The list of recipes is whole, in words and for machines."""

from __future__ import annotations

import json

from nomatmul.train.recipes import ABOUT, RECIPES


def test_every_recipe_is_listed_with_its_sizes(run):
    done = run("recipes")
    assert done.status == 0
    lines = {line.split()[0]: line for line in done.out.splitlines()}
    assert list(lines) == ["recipe", *RECIPES]
    assert list(ABOUT) == list(RECIPES)
    assert lines["union_cpu_minute"].split()[1:6] == ["1.29M", "4", "x", "128", "410k"]
    assert lines["union_cpu_minute"].endswith("trees in place of the GLU")
    assert all(len(line) <= 120 for line in lines.values())


def test_machines_get_numbers(run):
    entries = {
        entry["name"]: entry for entry in json.loads(run("recipes", "--json").out)["recipes"]
    }
    config = RECIPES["box"]()
    assert entries["box"]["parameters"] == config.model.param_count()
    assert entries["box"]["tokens"] == config.steps * config.tokens_per_step
    assert entries["crammedbert"]["tokens"] is None  # a time limit ends it
