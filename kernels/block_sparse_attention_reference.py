"""Block-sparse attention in plain PyTorch: by blocks of queries, by single queries, or masked.

However it is gathered, what is attended to goes through PyTorch's ``scaled_dot_product_attention``, as
many small ones side by side, each with a mask of what its queries see. With ALiBi it gets a bias in
float32, since one in 16 bits could not tell far distances apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from almostgpt.kernels.block_sparse_attention import BlockPattern

# Elements of gathered keys (and as many of values), or scores, that are there at a time: 64 MiB in float32.
MOST = 1 << 24
# Small attentions side by side: what PyTorch's kernels for GPUs have as heads must fit into a grid.
MOST_HEADS = 65535


def reference(
    q, k, v, pattern, *, start=0, scale=None, alibi_slopes=None, documents=None, most: int = MOST
) -> Tensor:
    """``block_sparse_attention`` in plain PyTorch; of its arguments, which are known to be right."""
    options = {"pattern": pattern, "scale": scale, "slopes": alibi_slopes, "most": most}
    if documents is not None:
        return _masked(q, k, v, documents, **options)
    if not isinstance(start, Tensor) and start == 0 and q.shape[2] == k.shape[2]:
        return _blocked(q, k, v, **options)
    return _gathered(q, k, v, start, **options)


def _key_blocks(pattern: BlockPattern, block: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that queries see, each once.

    Args:
        block: the block of each query; it broadcasts to (…).
        drawn: (…, r), its row of ``pattern.random``.

    Returns:
        (…, S) int64 and bool, S = g + w + r: blocks, and whether they are seen; the number of one that is
        not may be anything.
    """
    g, w, r = pattern.global_blocks, pattern.window, drawn.shape[-1]
    block, drawn = block[..., None], drawn.long()
    first = torch.arange(g, device=drawn.device)
    window = block - torch.arange(w, device=drawn.device)
    # A draw counts where neither of the other sets has it, nor an earlier draw.
    again = (drawn[..., :, None] == drawn[..., None, :]).tril(-1).any(-1)
    chosen = (drawn >= g) & (drawn <= block - w) & ~again
    shape = drawn.shape[:-1]
    blocks = (first.expand(*shape, g), window.expand(*shape, w), drawn.expand(*shape, r))
    seen = ((first <= block).expand(*shape, g), (window >= g).expand(*shape, w), chosen)
    return torch.cat(blocks, dim=-1), torch.cat(seen, dim=-1)


def _attend(q, k, v, seen, distance, slopes, scale, gqa=False) -> Tensor:
    """Attention with a mask, and with ALiBi where there are slopes, which broadcast to ``distance``."""
    if slopes is None:
        return scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=gqa)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    bias = (-slopes.to(wide) * distance).masked_fill(~seen, -torch.inf)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    out = scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=gqa)
    return out.to(dtype)


def _in_parts(attend: Callable[[int, int], Tensor], length: int, size: int, dim: int) -> Tensor:
    """``attend(start, stop)`` for parts of at most ``size``; of several, backward computes each anew."""
    size = max(1, size)
    if length <= size:
        return attend(0, length)
    if torch.is_grad_enabled() and (
        torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()
    ):
        attend = functools.partial(
            checkpoint, attend, use_reentrant=False, preserve_rng_state=False
        )
    starts = range(0, length, size)
    return torch.cat([attend(start, min(start + size, length)) for start in starts], dim=dim)


# --- whole sequences, by blocks of queries --------------------------------------------------------


def _blocked(q, k, v, *, pattern: BlockPattern, scale, slopes, most: int) -> Tensor:
    B, H, T, D = q.shape
    Hkv, b = k.shape[1], pattern.block
    n = -(-T // b)
    # What fills the last block comes after every query.
    q = pad(q, (0, 0, 0, n * b - T)).view(B, H, n, b, D)
    k, v = (pad(t, (0, 0, 0, n * b - T)).reshape(B, Hkv * n, b * D) for t in (k, v))
    block = torch.arange(n, device=q.device)
    blocks, seen = _key_blocks(pattern, block, pattern.random[:, :n])  # (H, n, S)
    S = blocks.shape[-1]
    blocks = blocks.masked_fill(~seen, 0)
    head = torch.arange(H, device=q.device)[:, None, None] // (H // Hkv)
    within = torch.arange(b, device=q.device)

    def attend(start: int, stop: int) -> Tensor:
        here, P = blocks[:, start:stop], stop - start
        rows = (head * n + here).flatten()
        keys, values = (t.index_select(1, rows).view(B, H * P, S * b, D) for t in (k, v))
        queries = (block[start:stop, None] * b + within)[..., None]  # (P, b, 1)
        places = (here[..., None] * b + within).view(H, P, 1, S * b)
        distance = (queries - places).view(1, H * P, b, S * b)
        visible = seen[:, start:stop].repeat_interleave(b, dim=-1).view(1, H * P, 1, S * b)
        visible = visible & (distance >= 0)
        slope = None if slopes is None else slopes.repeat_interleave(P)[:, None, None]
        rows_of_q = q[:, :, start:stop].reshape(B, H * P, b, D)
        out = _attend(rows_of_q, keys, values, visible, distance, slope, scale)
        return out.view(B, H, P, b, D)

    size = min(most // max(1, B * H * S * b * max(b, D)), MOST_HEADS // max(1, H))
    out = _in_parts(attend, n, size, dim=2)
    return out.reshape(B, H, n * b, D)[:, :, :T]


# --- queries anywhere, each by itself -------------------------------------------------------------


def _gathered(q, k, v, first, *, pattern: BlockPattern, scale, slopes, most: int) -> Tensor:
    """``first``: the position of the first query, an int or (B,)."""
    B, H, T, D = q.shape
    Hkv, Tk, b = k.shape[1], k.shape[2], pattern.block
    position = torch.arange(T, device=q.device)
    # (B, T), or (1, T) where that is the same for all. There is no key for a query beyond the last one.
    if isinstance(first, Tensor):
        position = position + first.long()[:, None]
    else:
        position = (position + first)[None]
    position = position.clamp(max=Tk - 1)
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    head = torch.arange(H, device=q.device)[:, None, None] // (H // Hkv)
    within = torch.arange(b, device=q.device)

    def attend(start: int, stop: int) -> Tensor:
        here, n = position[:, start:stop], stop - start
        block = here // b
        drawn = pattern.random[:, block].transpose(0, 1)  # (B, H, n, r)
        blocks, seen = _key_blocks(pattern, block[:, None], drawn)
        places = (blocks[..., None] * b + within).flatten(3)  # (B, H, n, S · b)
        distance = here[:, None, :, None] - places
        seen = seen.repeat_interleave(b, dim=-1) & (distance >= 0)
        places = places.masked_fill(~seen, 0)
        # Chosen, not multiplied: a slot that is not seen may hold anything.
        keys, values = (
            t[batch, head, places].masked_fill(~seen[..., None], 0).flatten(1, 2) for t in (k, v)
        )
        mask, distance = (t.flatten(1, 2).unsqueeze(2) for t in (seen, distance))
        slope = None if slopes is None else slopes.repeat_interleave(n)[:, None, None]
        rows = q[:, :, start:stop].reshape(B, H * n, 1, D)
        return _attend(rows, keys, values, mask, distance, slope, scale).view(B, H, n, D)

    keys = (pattern.global_blocks + pattern.window + pattern.random.shape[2]) * b
    size = min(most // max(1, B * H * keys * D), MOST_HEADS // max(1, H))
    return _in_parts(attend, T, size, dim=2)


# --- packed documents, with a mask ----------------------------------------------------------------


def _masked(q, k, v, documents, *, pattern: BlockPattern, scale, slopes, most: int) -> Tensor:
    B, H, T, _ = q.shape
    b = pattern.block
    n = -(-T // b)
    place = torch.arange(T, device=q.device)
    documents = documents.contiguous()
    begin = torch.searchsorted(documents, documents)  # the first token with this number
    block = (place - begin) // b  # (B, T)
    blocks, seen = _key_blocks(pattern, torch.arange(n, device=q.device), pattern.random[:, :n])
    allowed = torch.zeros(H, n, n + 1, dtype=torch.bool, device=q.device)  # the last: of no block
    allowed = allowed.scatter(2, blocks.masked_fill(~seen, n), True)

    def attend(start: int, stop: int) -> Tensor:
        rows, keys = slice(start, stop), slice(0, stop)
        distance = place[rows, None] - place[keys]
        own = (documents[:, rows, None] == documents[:, None, keys]) & (distance >= 0)
        mask = allowed[:, block[:, rows, None], block[:, None, keys]].transpose(0, 1) & own[:, None]
        slope = None if slopes is None else slopes[:, None, None]
        # An `if`, not a comparison: with dynamic shapes torch.compile has no bool for that.
        gqa = True if H != k.shape[1] else False
        part = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        return _attend(*part, mask, distance, slope, scale, gqa)

    return _in_parts(attend, T, most // max(1, B * H * T), dim=2)
