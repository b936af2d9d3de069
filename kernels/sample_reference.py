"""What ``sample`` computes, in plain PyTorch: a counter-based generator, thresholds, one argmax.

Nothing here waits for a GPU, and no shape depends on values (but on a CPU, where it saves time), so
a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from almostgpt.kernels.values import unread

_MASK = 0xFFFFFFFF
# The multipliers and the steps of the key of Philox4x32, Salmon et al. 2011, section 4.3.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# The noise is between −ln(−ln(2^−33)) = −3.13 and −ln(2^−33) = 22.87, so it lifts no token over one
# whose scaled logit is further above it than this.
_REACH = 26.1

_FEW = 1024  # tokens that hold the mass of most nuclei


class Options(NamedTuple):
    """The scalar options of ``sample``; what is None filters nothing."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0


class Streams(NamedTuple):
    """Whose random numbers are drawn: three int64 (B,) that ``sample`` says the meaning of."""

    positions: Tensor
    seeds: Tensor
    sequences: Tensor


def sample(
    logits: Tensor, streams: Streams, options: Options, seen: Tensor | None, logprobs: bool
) -> tuple[Tensor, Tensor | None]:
    """Draws (B,) int64 of logits (B, V), marks them in ``seen``, and gives their log-probabilities."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = _choose(_penalised(wide, seen, options.repetition_penalty), streams, options)
    chosen = ids[:, None]
    if seen is not None:
        seen.scatter_(1, chosen, True)
    if not logprobs:
        return ids, None
    found = wide.gather(1, chosen) - wide.logsumexp(1, keepdim=True)
    return ids, found[:, 0].float()


def _penalised(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    if penalty == 1 or seen is None:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _choose(logits: Tensor, streams: Streams, options: Options) -> Tensor:
    if options.temperature == 0:
        return logits.argmax(1)
    largest = logits.amax(1, keepdim=True)

    def scaled(some: Tensor) -> Tensor:
        # From the largest down, so that however low the temperature nothing overflows; the largest
        # are zeros, since of infinite ones the difference is NaN.
        return (some - largest).div_(options.temperature).masked_fill_(some == largest, 0.0)

    heights = scaled(logits)
    kept = heights >= (max(math.log(options.min_p), -_REACH) if options.min_p else -_REACH)
    if (lowest := _lowest_kept(logits, scaled, options)) is not None:
        kept &= logits >= lowest
    # Where looking costs nothing noise is made for few; for all a block of the generator serves four.
    if unread(logits) or 4 * kept.sum() > kept.numel():
        drawn = (heights + noise_of_all(logits.shape[1], streams)).masked_fill_(~kept, -torch.inf)
    else:
        rows, ids = kept.nonzero(as_tuple=True)
        heard = heights[rows, ids] + noise(ids, *(each[rows] for each in streams))
        drawn = torch.full_like(heights, -torch.inf, dtype=heard.dtype)
        drawn[rows, ids] = heard
    # Where the largest is NaN or −inf it is taken itself: the first NaN, or id 0.
    usual = largest[:, 0] > -torch.inf
    return torch.where(usual, drawn.argmax(1), logits.argmax(1))


# --- thresholds ----------------------------------------------------------------------------------


def _lowest_kept(
    logits: Tensor, scaled: Callable[[Tensor], Tensor], options: Options
) -> Tensor | None:
    """(B, 1): of logits (B, V) the lowest that top-k and top-p keep, or None where they keep all."""
    V = logits.shape[1]
    k = V if options.top_k is None else min(options.top_k, V)
    if options.top_p is not None and options.top_p < 1:
        return _nucleus(logits, scaled, k, options.top_p)
    return logits.topk(k, dim=1).values[:, -1:] if k < V else None


def _nucleus(logits: Tensor, scaled: Callable[[Tensor], Tensor], k: int, share: float) -> Tensor:
    """(B, 1): the largest value such that those no less hold that share of the mass of the top k."""

    def masses(some: Tensor) -> Tensor:
        return scaled(some).exp_()

    if k < logits.shape[1]:
        ordered = logits.topk(k, dim=1).values
        last = ordered[:, -1:]  # all that equal it are in the top k
        equal = (logits >= last).sum(1, keepdim=True) - k
        wanted = share * (masses(ordered).sum(1, keepdim=True) + equal * masses(last))
    else:
        wanted = share * masses(logits).sum(1, keepdim=True)
        # Most often few tokens hold it, and where looking costs nothing only they are sorted: of
        # 50257 in 0.2 ms rather than 4 (float32, one core of an AMD EPYC, 2026-11-21).
        few = None if unread(logits) else logits.topk(min(k, _FEW), dim=1).values
        enough = few is not None and bool((masses(few).sum(1, keepdim=True) >= wanted).all())
        ordered = few if enough else logits.sort(1, descending=True).values
    # The first that reaches it; or the last, where rounding keeps all sums below.
    first = (masses(ordered).cumsum(1) < wanted).sum(1, keepdim=True)
    return ordered.gather(1, first.clamp(max=ordered.shape[1] - 1))


# --- noise ---------------------------------------------------------------------------------------


def noise(ids: Tensor, positions: Tensor, seeds: Tensor, sequences: Tensor) -> Tensor:
    """Gumbel noise, float64, of token ids, each of the sequence beside it; all int64 of one shape."""
    words = torch.stack(_words(ids >> 2, positions, seeds, sequences), -1)
    return gumbel(words.gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1))


def noise_of_all(V: int, streams: Streams) -> Tensor:
    """(B, V) float64: the noise of every token id, four of a block of the generator."""
    blocks = torch.arange(-(-V // 4), device=streams.positions.device)
    words = _words(blocks, *(each[:, None] for each in streams))
    return gumbel(torch.stack(words, -1).flatten(1)[:, :V])


def gumbel(word: Tensor) -> Tensor:
    """−ln(−ln(1 − v)) in float64, v = (word + ½)/2³² of a 32-bit word in int64.

    It is the small −ln(1 − v) that decide, and log1p is exact there.
    """
    # mps has no float64. In float32 the last v of all would be 1, and its noise −inf.
    wide = torch.float32 if word.device.type == "mps" else torch.float64
    v = ((word.to(wide) + 0.5) * 2.0**-32).clamp(max=1 - torch.finfo(wide).eps / 2)
    return -torch.log(-torch.log1p(-v))


def _words(blocks: Tensor, positions: Tensor, seeds: Tensor, sequences: Tensor):
    counter = (blocks, positions & _MASK, *_halves(sequences))
    return philox(counter, _halves(seeds))


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper 32 bits of int64."""
    return value & _MASK, value >> 32 & _MASK


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: 128 random bits of a counter under a key, as 32-bit words in int64.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        (left_high, left_low), (right_high, right_low) = map(_product, (a, c), _MULTIPLIERS)
        a, b, c, d = right_high ^ b ^ k, right_low, left_high ^ d ^ m, left_low
        k, m = (k + _WEYL[0]) & _MASK, (m + _WEYL[1]) & _MASK
    return a, b, c, d


def _product(word: Tensor, odd: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a 32-bit word times an odd one.

    Of word − 2³¹, since the whole product overflows int64, which C++ leaves undefined: compiled by
    Inductor it came out wrong. What is missing is (odd >> 1) · 2³² + 2³¹.
    """
    product = (word - 2**31).mul_(odd).add_(2**31)
    return (product >> 32).add_(odd >> 1).bitwise_and_(_MASK), product.bitwise_and_(_MASK)
