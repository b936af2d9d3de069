"""The decoding loop: token ids in, token ids out. ``text.py`` is the same for text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.cache_options import past_the_positions
from almostgpt.inference.decoder import Decoder, Drawn, cuda_graph
from almostgpt.inference.ended import Ended
from almostgpt.inference.prompts import Prompts, as_texts
from almostgpt.inference.sampling import (
    Sampling,
    check_new_tokens,
    check_sequences,
    check_stop_ids,
    check_vocab_size,
    seed_or_new,
)

if TYPE_CHECKING:
    from almostgpt.model import GPT


def generate(
    model: GPT, prompts: Prompts, max_new_tokens: int, *, logprobs: bool = False, **options
) -> Tensor | list[Tensor] | tuple:
    """Continues prompts by ``max_new_tokens``, or until a stop id.

    Args:
        prompts: (B, T) int64; or B texts of any lengths, each (T,) int64 or a list of ids.
        logprobs: return those of the new tokens, too.
        **options: those of :func:`stream`.

    Returns:
        (B, T + max_new_tokens) int64. Of a list of texts, or with ``stop_ids``, a list of B tensors,
        each the prompt and what follows it, a stop id included. With ``logprobs`` a pair: that, and
        (B, max_new_tokens) float32, or a list of B tensors (new tokens,).
    """
    texts = as_texts(prompts, model)
    given = prompts if isinstance(prompts, Tensor) else texts
    drawn = list(stream(model, given, max_new_tokens, logprobs=logprobs, **options))
    new = _side_by_side([step.ids for step in drawn], texts, torch.int64)
    scores = _side_by_side([step.logprobs for step in drawn], texts, torch.float32)
    if isinstance(prompts, Tensor) and not options.get("stop_ids"):
        ids = torch.cat([prompts.to(new.device), new], dim=1)
        return (ids, scores) if logprobs else ids
    lengths = (new >= 0).sum(1).tolist()  # ended sequences have −1, and nothing after it
    ids = [torch.cat([text, row[:n]]) for text, row, n in zip(texts, new, lengths, strict=True)]
    if not logprobs:
        return ids
    return ids, [row[:n] for row, n in zip(scores, lengths, strict=True)]


def stream(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    sequences: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    logprobs: bool = False,
    cache: str | KVCache = "auto",
    window: int | None = None,
    sink_tokens: int | None = None,
    vocab_size: int | None = None,
    graph: bool = True,
) -> Iterator[Drawn]:
    """Yields the next token of every sequence, ``.ids`` (B,) int64, as soon as it is drawn.

    Each step feeds the model what its cache has not had: the prompts, whole, however long they are,
    then one token at a time. Within ``block_size`` tokens every cache but int8 and one with a smaller
    window gives what none at all gives. On a GPU a step is replayed as one CUDA graph, and nothing
    waits for it but who looks at what is yielded.

    Args:
        prompts: (B, T) int64; or B texts of any lengths, each (T,) int64 or a list of ids.
        temperature, top_k, top_p, min_p, repetition_penalty: see
            :class:`almostgpt.inference.sampling.Sampling`; temperature 0 is greedy.
        seed: makes the draws repeatable; ``None`` draws a seed from torch's global generator.
        sequences: B numbers, by default 0, 1, …: a draw depends on the seed, the number of its
            sequence and its position, so a text comes out the same whatever else is in the batch.
        stop_ids: a sequence ends with the first of these that it draws: ``.ids`` of it are −1 from
            then on. All have ended: nothing more is yielded.
        logprobs: yield ``.logprobs`` too, see :class:`almostgpt.inference.decoder.Drawn`.
        cache: where keys and values are kept.
            ``"auto"``: full while prompt and new tokens fit into the window, rolling otherwise.
            ``"full"``: all of them, up to ``block_size``.
            ``"rolling"``: the first ``sink_tokens`` and the last ones, ``window`` in all; never ends.
            ``"int8"``: as auto, in 8 bits.
            ``"none"``: nowhere; every step recomputes the last ``block_size`` tokens from position 0.
            A ``KVCache`` holds the first ``cache.length`` tokens of each prompt already: the rest is
            fed, and it is left with all tokens but the last one drawn.
        window: at most ``block_size``, the default.
        sink_tokens: less than the window; default 4.
        vocab_size: draw ids below this alone, where the model has more than its tokenizer.
        graph: false: launch every kernel of every step anew, where hooks of the model must run.

    Raises:
        UserError: at once, no token to start from, an id out of the vocabulary, impossible options,
            more tokens than the cache holds or the model has positions for (learned and sinusoidal
            ones end at ``block_size``).
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    seed = seed_or_new(seed)
    max_new_tokens = check_new_tokens(max_new_tokens)
    config, device = model.config, model.device
    texts = as_texts(prompts, model)
    sequences = check_sequences(sequences, len(texts))
    vocab_size = check_vocab_size(vocab_size, config.vocab_size)
    stop_ids = check_stop_ids(stop_ids, vocab_size)
    lengths = [len(text) for text in texts]
    tokens = max(lengths, default=0) + max_new_tokens if max_new_tokens else 0
    cached = 0
    if isinstance(cache, KVCache):
        check_given(cache, model, lengths, tokens, window, sink_tokens)
        cached = cache.length
    else:
        cache = KVCache.for_model(model, len(texts), cache, tokens, window, sink_tokens)
    decoder = Decoder(
        model,
        cache,
        sampling,
        seed=seed,
        sequences=sequences,
        logprobs=logprobs,
        vocab_size=vocab_size,
        capture=partial(cuda_graph, device) if graph and device.type == "cuda" else None,
    )
    return _steps(decoder, texts, cached, max_new_tokens, stop_ids)


def _steps(
    decoder: Decoder, texts: list[Tensor], cached: int, steps: int, stop_ids: tuple[int, ...]
) -> Iterator[Drawn]:
    if not texts:
        return
    ended = Ended(stop_ids, len(texts), decoder.ids.device)
    for number in range(steps):
        drawn = decoder.step() if number else decoder.begin(texts, cached)
        yield ended.masked(drawn)
        if ended.all():
            return


def _side_by_side(rows: list[Tensor | None], texts: list[Tensor], dtype: torch.dtype) -> Tensor:
    if not rows or rows[0] is None:
        device = texts[0].device if texts else None
        return torch.zeros(len(texts), 0, dtype=dtype, device=device)
    return torch.stack(rows, dim=1)


def check_given(
    cache: KVCache,
    model: GPT,
    lengths: Sequence[int],
    tokens: int,
    window: int | None,
    sink_tokens: int | None,
) -> None:
    """Whether a cache that the caller made holds the first tokens of texts, with room for the others.

    Args:
        lengths: of the texts.
        tokens: of the longest one at the end; 0: nothing is to be drawn.
    """
    if window is not None or sink_tokens is not None:
        raise UserError("window and sink_tokens are those of the cache given: leave them out")
    cache.check_model(model.config)
    if len(cache.lengths) != len(lengths) or len(set(cache.lengths)) > 1:
        raise UserError(
            f"the cache holds sequences of {list(cache.lengths)} tokens; for {len(lengths)} prompts "
            f"there must be {len(lengths)}, all of one length"
        )
    if tokens and lengths and cache.length >= min(lengths):
        raise UserError(
            f"the cache holds {cache.length} tokens, but a prompt has {min(lengths)}: give the cached "
            "ones and at least 1 new one"
        )
    if tokens > cache.end:
        raise UserError(
            f"{tokens} tokens, prompt and new ones together, do not fit: the cache ends at {cache.end}"
        )
    if not model.endless and tokens > model.config.block_size:
        raise UserError(past_the_positions(tokens, model))
