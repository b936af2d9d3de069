"""As many parameters for every variant, by the width of its feed-forward.

The hidden width is the one size that all kinds of feed-forward have and no other part depends on; the
number of parameters is a straight line of it. So the width at which a variant has those of the first
one is found by two counts.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from almostgpt.config import GPTConfig
from almostgpt.errors import UserError
from almostgpt.model import GPT

ALIGNMENT = 8  # hidden widths are multiples of it: 16 bytes in 16 bits, which matrix units ask for


def parameters(model: GPTConfig) -> int:
    """Parameters of a model with its vocabulary; nothing is allocated."""
    with torch.device("meta"):
        return GPT(model).num_parameters()


def match_parameters(model: GPTConfig, target: int) -> GPTConfig:
    """``model`` (resolved) with the hidden width that brings it nearest to ``target`` parameters.

    Its own width stays where no other comes nearer.

    Raises:
        UserError: the rest of the model has more parameters than ``target``.
    """

    def count(hidden: int) -> int:
        return parameters(dataclasses.replace(model, mlp_hidden=hidden))

    if count(model.mlp_hidden) == target:
        return model
    a_step = count(2 * ALIGNMENT) - count(ALIGNMENT)
    rest = count(ALIGNMENT) - a_step
    if rest >= target:
        raise UserError(
            f"it has {rest:,} parameters beside its feed-forward, which leaves none for that of the "
            f"{target:,} of the first variant; --match none leaves the widths as they are"
        )
    steps = (target - rest) / a_step
    widths = [ALIGNMENT * max(1, whole) for whole in (math.floor(steps), math.ceil(steps))]
    nearest = min([model.mlp_hidden, *widths], key=lambda hidden: abs(count(hidden) - target))
    return dataclasses.replace(model, mlp_hidden=nearest)
