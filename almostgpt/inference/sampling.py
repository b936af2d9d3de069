"""How the next token is drawn: the options, and what each of them may be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from almostgpt.config import MAX_SEED
from almostgpt.errors import UserError
from almostgpt.kernels.sample import check_options, is_whole


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
    if not is_whole(seed) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed!r}, but must be a whole number in 0 … {MAX_SEED}")
    return int(seed)


def check_new_tokens(max_new_tokens: int) -> int:
    """Raises ``UserError`` for what is no number of tokens."""
    if not is_whole(max_new_tokens) or max_new_tokens < 0:
        raise UserError(
            f"max_new_tokens is {max_new_tokens!r}, but must be a whole number from 0 on"
        )
    return int(max_new_tokens)


def check_vocab_size(vocab_size: int | None, most: int) -> int:
    """How many ids are drawn among: those of the tokenizer that the model has."""
    if vocab_size is None:
        return most
    if not is_whole(vocab_size) or vocab_size < 1:
        raise UserError(f"vocab_size is {vocab_size!r}, but must be a whole number from 1 on")
    return min(int(vocab_size), most)


def check_stop_ids(stop_ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Raises ``UserError`` for ids that no model of so many could draw."""
    ids = _as_tuple("stop_ids", stop_ids)
    for id in ids:
        if not is_whole(id) or not 0 <= id < vocab_size:
            raise UserError(
                f"stop_ids has {id!r}, which is no id of the {vocab_size} that are drawn"
            )
    return tuple(dict.fromkeys(int(id) for id in ids))


def check_sequences(sequences: Iterable[int] | None, B: int) -> list[int]:
    """The numbers of B sequences; ``UserError`` for anything else than whole ones of 64 bits."""
    if sequences is None:
        return list(range(B))
    numbers = _as_tuple("sequences", sequences)
    if len(numbers) != B or not all(is_whole(n) and 0 <= n < 2**63 for n in numbers):
        raise UserError(
            f"sequences must be {B} whole numbers in 0 … {2**63 - 1}, not {sequences!r}"
        )
    return [int(n) for n in numbers]


def _as_tuple(name: str, values: Iterable) -> tuple:
    try:
        return tuple(values)
    except TypeError:
        raise UserError(f"{name} must be a list, not {values!r}") from None
