"""Attention in plain PyTorch: what runs where no kernel does, and the maths of the ops on a CPU.

Without options, or with a window closed on both sides, it is PyTorch's ``scaled_dot_product_attention``,
whichever kernel that takes; a window takes a mask for some queries at a time. Every other option is
served by the maths as it is written, likewise in parts, and of the keys only those that a part may see.
So no whole (Tq, Tk) matrix is ever there, neither forward nor backward; but for the mask of causal
attention with fewer queries than keys, as in a prefill on a cache.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from almostgpt.errors import UserError

# Scores that are there at a time: 16 MiB in float32, a few times over in backward.
MOST_SCORES = 1 << 22


class Options(NamedTuple):
    """What ``flash_attention`` takes besides q, k and v; see there."""

    causal: bool = False
    window: tuple[int, int] | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sink_logits: Tensor | None = None
    cu_seqlens: Tensor | None = None
    deterministic: bool = False
    return_lse: bool = False


class Scoring(NamedTuple):
    """What a score is made of, as the ops take it.

    Attributes:
        left, right: how many keys a query sees on either side of its own; −1: all of them.
        scale: factor on q · k.
        softcap: scores beyond it are bent back below it; 0: none are.
        slopes: (H,) or None, what a head takes off a score for each key of distance.
    """

    left: int
    right: int
    scale: float
    softcap: float = 0.0
    slopes: Tensor | None = None


def reach(causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """How many keys a query sees to the left and to the right of its own; −1: all of them."""
    left, right = (-1, -1) if window is None else window
    return left, 0 if causal else right


def reference(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attention`` in plain PyTorch; of its arguments, which are known to be right."""
    chosen = Options(**options)
    if chosen.cu_seqlens is not None and has_values(chosen.cu_seqlens):
        return _document_by_document(q, k, v, chosen)
    left, right = reach(chosen.causal, chosen.window)
    alone = (
        chosen.softcap == 0
        and chosen.alibi_slopes is None
        and chosen.sink_logits is None
        and chosen.cu_seqlens is None
        and not chosen.return_lse
        and not (chosen.deterministic and q.is_cuda)  # PyTorch's backward on CUDA adds in any order
    )
    if alone and left == -1 and right <= 0:
        return _by_pytorch(q, k, v, right == 0, chosen.scale)
    if alone and min(left, right) >= 0 and 0 < q.shape[2] <= k.shape[2]:  # each sees its own key
        return _windowed_by_pytorch(q, k, v, left, right, chosen.scale)
    scale = q.shape[3] ** -0.5 if chosen.scale is None else chosen.scale
    scoring = Scoring(left, right, scale, chosen.softcap, chosen.alibi_slopes)
    out, lse = attend(q, k, v, scoring, chosen.sink_logits, chosen.cu_seqlens)
    return (out, lse) if chosen.return_lse else out


def _by_pytorch(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    Tq, Tk = q.shape[2], k.shape[2]
    # PyTorch's grouped queries against repeated heads, float32 on a 2-core x86 CPU, torch 2.13:
    # equal within noise for long sequences, and half the time for one cached query (94 against
    # 209 µs with 12 heads on 4, 512 keys, width 64). An `if`, not a comparison: with dynamic
    # shapes torch.compile has no bool for that.
    gqa = True if q.shape[1] != k.shape[1] else False
    if not causal or Tq == 1 <= Tk:  # the last query sees every key
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
    if Tq == Tk:  # top left is bottom right
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    if Tq < Tk:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
        return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
    # The first queries see no key; the rest is square.
    blind = torch.zeros_like(q[:, :, : Tq - Tk])
    seeing = _by_pytorch(q[:, :, Tq - Tk :], k, v, True, scale)
    return torch.cat([blind, seeing], dim=2)


def _windowed_by_pytorch(q, k, v, left: int, right: int, scale: float | None) -> Tensor:
    """Some queries at a time, with a mask: a part of n of them sees no more than n + window keys.

    For a window that is closed on both sides: autograd keeps the masks, which then are small.

    Of 512 tokens with a window of 128, 4 heads of 64 in float32, a forward takes 2.7 ms, the maths
    written out 14 (one thread of an AMD EPYC, torch 2.13, medians of `timeit`, 2026-11-21).
    """
    Tq, Tk = q.shape[2], k.shape[2]
    scoring = Scoring(left, right, 1.0)
    rows = max(256, left + right + 1)
    gqa = True if q.shape[1] != k.shape[1] else False
    found = []
    for start in range(0, Tq, rows):
        stop, place = min(start + rows, Tq), start + Tk - Tq
        first, last = _keys_of(place, stop + Tk - Tq, Tk, scoring)
        sees = ~_outside(stop - start, last - first, scoring, place - first, q.device)
        part = (q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last])
        found.append(scaled_dot_product_attention(*part, sees, scale=scale, enable_gqa=gqa))
    return torch.cat(found, dim=2)


# --- packed documents ------------------------------------------------------------------------------


def has_values(tensor: Tensor) -> bool:
    """Whether it can be read now: not while compiling, and not of a fake or a meta tensor."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def borders_of(cu_seqlens: Tensor, T: int) -> list[int]:
    """Where each document starts, then T; on a GPU it waits for the values.

    Raises:
        UserError: they do not go from 0 up to T.
    """
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != T or borders != sorted(borders):
        shown = borders if len(borders) <= 10 else [*borders[:5], "…", *borders[-4:]]
        raise UserError(
            f"flash_attention: cu_seqlens must start with 0, never decrease and end with the "
            f"number of tokens, {T}; it is [{', '.join(map(str, shown))}]"
        )
    return borders


def _document_by_document(q: Tensor, k: Tensor, v: Tensor, chosen: Options):
    # Repeated borders, which pad the list, are documents of nothing.
    borders = sorted({0, *borders_of(chosen.cu_seqlens, q.shape[2])})
    lengths = [stop - start for start, stop in zip(borders, borders[1:], strict=False)]
    alone = chosen._replace(cu_seqlens=None)._asdict()
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), strict=True)
    found = [reference(*document, **alone) for document in documents]
    if not found:  # no tokens at all
        return reference(q, k, v, **alone)
    if chosen.return_lse:
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
    return torch.cat(found, dim=2)


# --- the maths as it is written --------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    sink: Tensor | None,
    cu_seqlens: Tensor | None,
    most: int = MOST_SCORES,
) -> tuple[Tensor, Tensor]:
    """Attention with every option, in float32 (float64 for float64).

    Args:
        q, k, v: as of ``flash_attention``.
        scoring: its options that make a score.
        sink: (H,) or None, a logit of each head that has no value.
        cu_seqlens: as of ``flash_attention``; its values are not looked at by the host.
        most: scores that may be there at a time (but those of one query are).

    Returns:
        out (B, H, Tq, D) in q's dtype and lse (B, H, Tq) in that of the maths.
    """
    Tq, Tk = q.shape[2], k.shape[2]
    offset = Tk - Tq  # of the key that query 0 is at
    number = None
    if cu_seqlens is not None:
        number = torch.searchsorted(cu_seqlens, torch.arange(Tk, device=q.device), right=True)
    parts = _parts(q.shape, Tk, scoring, most)
    run = _attend_part
    if parts > 1 and torch.is_grad_enabled() and not _under_transforms():
        # Backward computes a part's scores anew: those of all parts are never kept.
        run = functools.partial(
            checkpoint, _attend_part, use_reentrant=False, preserve_rng_state=False
        )
    found = []
    for part in range(parts):
        start, stop = Tq * part // parts, Tq * (part + 1) // parts
        first, last = _keys_of(start + offset, stop + offset, Tk, scoring)
        numbers = None if number is None else (number[start:stop], number[first:last])
        found.append(
            run(
                q[:, :, start:stop],
                k[:, :, first:last],
                v[:, :, first:last],
                scoring,
                sink,
                numbers,
                start + offset - first,
            )
        )
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _parts(q_shape: torch.Size, Tk: int, scoring: Scoring, most: int) -> int:
    """Into how many parts the queries go, so that each has at most so many scores."""
    B, H, Tq, _ = q_shape
    most = most // max(1, B * H)
    rows = most // max(1, Tk)
    if scoring.left >= 0 and scoring.right >= 0:
        # n queries see n + width keys, no more than 2 · width where n ≤ width.
        width = max(scoring.left + scoring.right + 1, 128)
        rows = max(rows, min(width, most // (2 * width)))
    return max(1, -(-Tq // max(1, rows)))


def _keys_of(start: int, stop: int, Tk: int, scoring: Scoring) -> tuple[int, int]:
    """The keys, as a range, that queries at the places from start to before stop may see."""
    first = 0 if scoring.left < 0 else min(max(0, start - scoring.left), Tk)
    last = Tk if scoring.right < 0 else min(stop + scoring.right, Tk)
    return first, max(first, last)


def _under_transforms() -> bool:
    """Under torch.func, which allows no checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _attend_part(q, k, v, scoring: Scoring, sink, numbers, place: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of some queries; see ``masked_scores``."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = masked_scores(q.to(wide), k.to(wide), scoring, numbers, place)[0]
    # A row without a key has zeros in place of its scores while it is summed, so that no gradient
    # hangs on −inf minus −inf.
    blind = (scores == -torch.inf).all(-1)
    lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1).masked_fill(blind, -torch.inf)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.to(wide)[:, None])
    weights = probabilities(scores, lse)
    return grouped_matmul(weights, v.to(wide)).to(q.dtype), lse


def masked_scores(
    q: Tensor,
    k: Tensor,
    scoring: Scoring,
    numbers: tuple[Tensor, Tensor] | None = None,
    place: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Scores, −inf where a query does not see a key.

    Args:
        q: (B, H, n, D), some queries.
        k: (B, Hkv, m, D), some keys.
        scoring: what a score is made of.
        numbers: (n,) and (m,), the document that each is of, or None.
        place: of the key that the first query is at, among these keys.

    Returns:
        (B, H, n, m), and where there is a softcap its derivative there, (B, H, n, m).
    """
    n, m = q.shape[2], k.shape[2]
    scores, slope = grouped_matmul(q, k.mT) * scoring.scale, None
    if scoring.softcap > 0:
        bent = torch.tanh(scores / scoring.softcap)
        scores, slope = scoring.softcap * bent, 1 - bent.square()
    if scoring.slopes is not None:
        queries = torch.arange(n, device=q.device) + place
        distance = torch.arange(m, device=q.device) - queries[:, None]
        scores = scores - scoring.slopes.to(q.dtype)[:, None, None] * distance.abs()
    unseen = _outside(n, m, scoring, place, q.device)
    if numbers is not None:
        others = numbers[0][:, None] != numbers[1]
        unseen = others if unseen is None else unseen | others
    if unseen is not None:
        scores = scores.masked_fill(unseen, -torch.inf)
    return scores, slope


def _outside(n: int, m: int, scoring: Scoring, place: int, device) -> Tensor | None:
    """(n, m) booleans, where a key is outside of a query's window; None where all keys are inside."""
    distance = torch.arange(m, device=device) - (torch.arange(n, device=device) + place)[:, None]
    if scoring.left >= 0 and scoring.right >= 0:
        return (distance < -scoring.left) | (distance > scoring.right)
    if scoring.left >= 0:
        return distance < -scoring.left
    return distance > scoring.right if scoring.right >= 0 else None


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores − lse); zeros in a row whose lse is −inf, since its scores are too."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """(B, H, n, x) · (B, Hkv, x, y) → (B, H, n, y); head h takes h // (H // Hkv), not repeated."""
    B, H, n, x = a.shape
    Hkv, y = b.shape[1], b.shape[3]
    return (a.reshape(B, Hkv, H // Hkv * n, x) @ b).view(B, H, n, y)
