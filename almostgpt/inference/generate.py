"""The decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.cache_options import past_the_positions
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
    cache: str | KVCache = "auto",
    window: int | None = None,
    sink_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yields the next id of every sequence, (B,) int64, as soon as it is drawn.

    Each step feeds the model what its cache has not had: the prompt, whole, however long it is, then
    one token at a time. Within ``block_size`` tokens every cache but int8 and one with a smaller
    window gives what none at all gives.

    Args:
        temperature: 0 is greedy; above, logits are divided by it.
        top_k, top_p: see :func:`almostgpt.inference.sampling.sample`.
        seed: makes the draws repeatable; ``None`` draws from torch's global generator.
        cache: where keys and values are kept.
            ``"auto"``: full while prompt and new tokens fit into the window, rolling otherwise.
            ``"full"``: all of them, up to ``block_size``.
            ``"rolling"``: the first ``sink_tokens`` and the last ones, ``window`` in all; never ends.
            ``"int8"``: as auto, in 8 bits.
            ``"none"``: nowhere; every step recomputes the last ``block_size`` tokens from position 0.
            A ``KVCache`` holds the first ``cache.length`` tokens of ``ids`` already: the rest is fed,
            and it is left with all tokens but the last one drawn.
        window: at most ``block_size``, the default.
        sink_tokens: less than the window; default 4.
        vocab_size: draw ids below this alone, where the model has more than its tokenizer.

    Raises:
        UserError: at once, no token to start from, an id out of the vocabulary, impossible options,
            more tokens than the cache holds or the model has positions for (learned and sinusoidal
            ones end at ``block_size``).
    """
    check_sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, but must be 0 or above")
    _check_ids(ids, model.config.vocab_size)
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    tokens = ids.shape[1] + max_new_tokens if max_new_tokens else 0
    if isinstance(cache, KVCache):
        _check_given(cache, model, ids, tokens, window, sink_tokens)
        unseen = ids[:, cache.length :]
    else:
        cache = KVCache.for_model(model, ids.shape[0], cache, tokens, window, sink_tokens)
        unseen = ids if cache is not None else ids[:, -model.config.block_size :]
    return _steps(model, unseen, max_new_tokens, draw, cache, vocab_size)


def _steps(
    model: GPT,
    unseen: Tensor,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    cache: KVCache | None,
    vocab_size: int | None,
) -> Iterator[Tensor]:
    for _ in range(max_new_tokens):
        new = draw(feed(model, unseen, cache)[:, :vocab_size])
        yield new
        if cache is None:
            unseen = torch.cat([unseen, new[:, None]], dim=1)[:, -model.config.block_size :]
        else:
            unseen = new[:, None]


@torch.no_grad()
def feed(model: GPT, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """The logits after ids: (B, T) → (B, vocab_size); the tokens are appended to the cache.

    In evaluation mode whatever mode the caller's model is in.
    """
    was_training = model.training
    if was_training:
        model.eval()
    try:
        logits, _ = model(ids, cache=cache)
    finally:
        if was_training:
            model.train()
    return logits[:, -1]


def _check_given(
    cache: KVCache,
    model: GPT,
    ids: Tensor,
    tokens: int,
    window: int | None,
    sink_tokens: int | None,
) -> None:
    """Whether a cache that the caller made holds the first tokens of ids, with room for the others."""
    if window is not None or sink_tokens is not None:
        raise UserError("window and sink_tokens are those of the cache given: leave them out")
    cache.check_model(model.config)
    B, T = ids.shape
    if len(cache.lengths) != B or len(set(cache.lengths)) > 1:
        raise UserError(
            f"the cache holds sequences of {list(cache.lengths)} tokens; for ids of {(B, T)} there must "
            f"be {B}, all of one length"
        )
    if tokens and cache.length >= T:
        raise UserError(
            f"the cache holds {cache.length} tokens, but ids have {T}: give the cached ones and at "
            "least 1 new one"
        )
    if tokens > cache.end:
        raise UserError(
            f"{tokens} tokens, prompt and new ones together, do not fit: the cache ends at {cache.end}"
        )
    if not model.position.endless and tokens > model.config.block_size:
        raise UserError(past_the_positions(tokens, model.config))


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
