"""Options of fast feedforward layers in training, what they add to the loss, how they are used.

The knobs are TrainConfig's `fff_...`; the layers themselves are in models/channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nomatmul.models.channels import trees
from nomatmul.train.config import TrainConfig
from nomatmul.train.ranks import Ranks


def wants_auxiliary(config: TrainConfig) -> bool:
    """Does this run add an auxiliary loss of the trees?"""
    return config.fff_balance > 0


def training_options(config: TrainConfig) -> trees.FFFTraining:
    """How the layers of this run train."""
    return trees.FFFTraining(balance=config.fff_balance, route_gradient=config.fff_route_gradient)


def tree_layers(model: nn.Module) -> dict[str, trees.TreeLayer]:
    """The layers with trees by name, "layers.0.channel"."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, trees.TreeLayer)
    }


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """Count which nodes are visited inside the block; `usage_row` reads it before the end."""
    layers = tree_layers(model).values()
    for layer in layers:
        layer.count_usage()
    try:
        yield
    finally:
        for layer in layers:
            layer.count_usage(False)


@torch.no_grad()
def usage_row(model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """What was visited since counting began, over all ranks; empty without trees.

    fff_dead: share of nodes without a visitor; fff_entropy: of the ends of the walks, 1
    for even use; both the mean of the layers, which "fff_layers" has one by one; fff_tokens.
    """
    layers = tree_layers(model)
    if not layers:
        return {}
    facts = {}
    for name, layer in layers.items():
        assert layer.visits is not None
        if ranks.many:
            layer.visits.copy_(ranks.sum(layer.visits))
        facts[name] = layer.usage()
    return {
        "fff_dead": sum(use.dead for use in facts.values()) / len(facts),
        "fff_entropy": sum(use.entropy for use in facts.values()) / len(facts),
        "fff_tokens": max(use.tokens for use in facts.values()),
        "fff_layers": {
            name: {"dead": use.dead, "entropy": use.entropy} for name, use in facts.items()
        },
    }


def choose_implementation(model: nn.Module, name: str) -> None:
    """How the trees of all layers are computed; "" leaves it to them (`nomatmul.ops.fff`)."""
    for layer in tree_layers(model).values():
        layer.implementation = name or None
