"""Attention over (B, H, T, D) tensors: softmax(q kᵀ · scale) v, exact, with no (T, T) matrix kept.

For one head, with Tq queries and Tk keys of width D:

    S = q kᵀ · scale                 (Tq, Tk)
    P = softmax(S), row by row       causal: query i sees the keys j ≤ i + Tk − Tq
    out = P v                        (Tq, D)

Causal attention is aligned at the bottom right: the last query sees every key. So the one query of
a decoding step sees the whole cache, where an alignment at the top left (``is_causal`` of PyTorch)
would show it one key. A query that sees no key at all (Tq > Tk) gives zeros.

Source of the algorithm: Dao et al., "FlashAttention", arXiv:2205.14135.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from almostgpt.errors import UserError
from almostgpt.kernels.dispatch import Kernel, Op


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention, with grouped queries by head counts.

    Args:
        q: (B, H, Tq, D), any floating dtype and any strides.
        k: (B, Hkv, Tk, D), same dtype and device; H is a multiple of Hkv, and query head h reads
            key head h // (H // Hkv).
        v: (B, Hkv, Tk, D), likewise.
        causal: query i sees the keys j ≤ i + Tk − Tq (bottom-right alignment).
        scale: factor on the scores; 1/√D when None.

    Returns:
        (B, H, Tq, D), in q's dtype; zeros for queries that see no key.

    Raises:
        UserError: shapes, dtypes or devices that do not fit together.
    """
    return FLASH_ATTENTION(q, k, v, causal=causal, scale=scale)


def _check(q, k, v, *, causal=False, scale=None) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise UserError(f"flash_attention: q, k and v must be (B, H, T, D), not {_shapes(q, k, v)}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(
            "flash_attention: k and v must have one shape, and q their batch size and head width; "
            f"they are {_shapes(q, k, v)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise UserError(
            f"flash_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise UserError(
            "flash_attention: q, k and v must have one floating dtype, "
            f"not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise UserError(f"flash_attention: q, k and v are on {q.device}, {k.device} and {v.device}")


def _shapes(*tensors: torch.Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def reference(q, k, v, *, causal=False, scale=None) -> torch.Tensor:
    """The same by PyTorch's ``scaled_dot_product_attention``, whichever kernel that takes."""
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
    seeing = reference(q[:, :, Tq - Tk :], k, v, causal=True, scale=scale)
    return torch.cat([blind, seeing], dim=2)


FLASH_ATTENTION = Op(
    "flash_attention",
    _check,
    (Kernel("reference", "scaled_dot_product_attention", lambda *a, **k: None, reference),),
)
