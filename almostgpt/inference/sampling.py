"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from almostgpt.config import MAX_SEED
from almostgpt.errors import UserError


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    """Raises ``UserError`` for values that mean nothing."""
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}, but must be in 0 … {MAX_SEED}")
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}, but must be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}, but must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, but must be in (0, 1]")


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one id per row of logits: (B, V) → (B,) int64.

    Temperature 0 takes the largest logit. ``top_k`` keeps the k largest; ``top_p`` keeps the fewest
    largest whose probabilities reach p (nucleus sampling, Holtzman et al. 2019), at least one.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # From the largest down, so that however low the temperature nothing overflows.
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-10)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of everything more likely
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, float("-inf")))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)
