"""How the next token is drawn: the options, and what each of them may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from almostgpt.config import MAX_SEED
from almostgpt.errors import UserError
from almostgpt.kernels.sample import check_options


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
        check_options(**vars(self))


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


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
