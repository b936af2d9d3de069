"""How the next token is drawn: the options, and what each of them may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from almostgpt.config import MAX_SEED
from almostgpt.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Options of a draw, in the order in which they act; ``almostgpt.kernels.sample`` defines them.

    Raises:
        UserError: values that mean nothing.
    """

    repetition_penalty: float = 1.0  # logits of tokens in the text so far are lowered by it
    temperature: float = 1.0  # divides the logits; 0 takes the largest
    top_k: int | None = None  # keeps the k most likely
    top_p: float | None = None  # keeps the fewest most likely whose probabilities reach p
    min_p: float | None = None  # keeps those at least so likely, relative to the most likely one

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        if not (_number(penalty) and 0 < penalty < math.inf):
            raise UserError(f"repetition_penalty is {penalty}, but must be above 0 (1: none)")
        if not (_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise UserError(f"temperature is {self.temperature}, but must be 0 (greedy) or above")
        if self.top_k is not None and not (_whole(self.top_k) and self.top_k >= 1):
            raise UserError(f"top_k is {self.top_k}, but must be a whole number from 1 on")
        if self.top_p is not None and not (_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p is {self.top_p}, but must be in (0, 1]")
        if self.min_p is not None and not (_number(self.min_p) and 0 <= self.min_p <= 1):
            raise UserError(f"min_p is {self.min_p}, but must be in 0 … 1")


def seed_or_new(seed: int | None) -> int:
    """The seed given, or where there is none a new one, of torch's global generator.

    Raises ``UserError`` for what is no seed.
    """
    if seed is None:
        return int(torch.randint(2**63 - 1, ()))
    if not _whole(seed) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}, but must be in 0 … {MAX_SEED}")
    return seed


def check_stop_ids(stop_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Raises ``UserError`` for ids that no model of so many could draw."""
    for id in stop_ids:
        if not _whole(id) or not 0 <= id < vocab_size:
            raise UserError(
                f"stop_ids has {id!r}, which is no id of the {vocab_size} that are drawn"
            )
    return tuple(dict.fromkeys(stop_ids))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
