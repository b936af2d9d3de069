"""The decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.sampling import check_sampling, sample

if TYPE_CHECKING:
    from almostgpt.model import GPT


def generate(model: GPT, ids: Tensor, max_new_tokens: int, **options) -> Tensor:
    """Continues ids: (B, T) int64 by ``max_new_tokens`` → (B, T + max_new_tokens).

    Options are those of :func:`stream`.
    """
    return torch.cat(
        [ids, *(new.unsqueeze(1) for new in stream(model, ids, max_new_tokens, **options))], 1
    )


def stream(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next id of every sequence, (B,) int64, as soon as it is drawn.

    Once prompt and new tokens are longer than ``block_size``, every step sees the last ``block_size``
    tokens, counted anew from position 0. Keys and values of a moved window are other ones, so the cache
    ends there and each step recomputes its window: with and without cache the text is the same.

    Args:
        temperature: 0 is greedy; above, logits are divided by it.
        top_k, top_p: see :func:`almostgpt.inference.sampling.sample`.
        seed: makes the draws repeatable; ``None`` draws from torch's global generator.
        use_cache: keep keys and values instead of recomputing all positions for every token.
        vocab_size: draw ids below this alone, where the model has more than its tokenizer.

    Raises:
        UserError: no token to start from, an id out of the vocabulary, impossible options.
    """
    check_sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, but must be 0 or above")
    _check_ids(ids, model.config.vocab_size)
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _steps(model, ids, max_new_tokens, draw, use_cache, vocab_size)


def _steps(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    use_cache: bool,
    vocab_size: int | None,
) -> Iterator[Tensor]:
    block_size = model.config.block_size
    cache = None
    if use_cache and ids.shape[1] < block_size:
        capacity = min(block_size, ids.shape[1] + max_new_tokens)
        weight = model.token_embedding.weight
        cache = KVCache(
            model.config, ids.shape[0], capacity, dtype=weight.dtype, device=weight.device
        )
    window = ids[:, -block_size:]  # what an uncached step sees
    unseen = window  # what the cache has not seen yet
    for _ in range(max_new_tokens):
        if cache is not None and cache.length + unseen.shape[1] > block_size:
            cache = None
        logits = _last_logits(model, window if cache is None else unseen, cache)
        new = draw(logits[:, :vocab_size])
        yield new
        unseen = new.unsqueeze(1)
        window = torch.cat([window, unseen], dim=1)[:, -block_size:]


@torch.no_grad()
def _last_logits(model: GPT, ids: Tensor, cache: KVCache | None) -> Tensor:
    """(B, vocab_size), in evaluation mode whatever mode the caller's model is in."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        logits, _ = model(ids, cache=cache)
    finally:
        if was_training:
            model.train()
    return logits[:, -1]


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise UserError(
            f"generation starts from ids of the shape (batch, at least 1 token), not {tuple(ids.shape)}"
        )
    if ids.dtype != torch.int64:
        raise UserError(f"ids must be torch.int64, not {ids.dtype}")
    if ids.numel():
        lowest, highest = (int(value) for value in torch.aminmax(ids))
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"token id {wrong} is outside the vocabulary of {vocab_size} ids")
