"""BigBird's attention, causal: a window of blocks, the first blocks, and some drawn at random.

Positions are cut into blocks of b tokens. A query at position p, in block i = p // b, sees of the keys at
positions up to p those whose block is

    one of the first g (global),   or one of i − w + 1 … i (the window),   or one of random[h, i]

where head h drew random[h, i] from [g, i − w], the blocks that are neither: at most (g + w + r) · b keys
for a query, whatever the length. BigBird's global tokens see everything too; here nothing sees what comes
after it.

Which blocks are drawn depends on the layer, the head and the block alone: so a text that grows changes
nothing of what was computed, and a model is the same at any length, on any machine.

Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.kernels.attention_options import check_scores
from almostgpt.kernels.autocast import in_autocast_dtype
from almostgpt.kernels.block_sparse_attention_reference import reference
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.flash_attention_reference import Options
from almostgpt.kernels.linear_attention import check_documents
from almostgpt.kernels.values import outside

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class BlockPattern:
    """Which blocks of keys the queries of each block see.

    Attributes:
        block: b, tokens in a block.
        window: w ≥ 1, the last blocks that a query sees, its own among them.
        global_blocks: g ≥ 0, the first blocks, which all see.
        random: (H, n, r) int32 on the device of the queries: for each query head and each of n blocks the
            blocks that were drawn, −1 for none. ``random_blocks`` makes one. What is not within
            [g, i − w], or was drawn twice, is left out.
    """

    block: int
    window: int
    global_blocks: int
    random: Tensor


def random_blocks(
    layer: int, heads: int, n_blocks: int, window: int, global_blocks: int, count: int
) -> Tensor:
    """Draw ``count`` blocks for each head and block i from [global_blocks, i − window], each at most once.

    Every choice is as likely as any other, and depends on the layer, the head and the block alone: a longer
    table begins with a shorter one. Where there are fewer blocks than ``count``, all are chosen. (Floyd's
    algorithm; Bentley, "Programming Pearls: A Sample of Brilliance", 1987.)

    Returns:
        (heads, n_blocks, count) int32 on the CPU, −1 at the end of a row for blocks that are missing.

    Raises:
        UserError: a number below 0, or no window.
    """
    sizes = (layer, heads, n_blocks, window - 1, global_blocks, count)
    if any(not isinstance(n, int) or n < 0 for n in sizes):
        raise UserError(
            "random_blocks: all are whole numbers from 0, and window from 1, not "
            f"{(layer, heads, n_blocks, window, global_blocks, count)}"
        )
    block = np.arange(n_blocks)
    bits = _mix(np.full((1, 1), layer, np.uint64))
    bits = _mix(bits + np.arange(heads, dtype=np.uint64)[:, None])
    bits = _mix(bits + block.astype(np.uint64))  # (heads, n_blocks)
    candidates = np.maximum(block - window - global_blocks + 1, 0)
    drawn = np.full((heads, n_blocks, count), -1)
    for k in range(count):
        # Of all choices of k blocks among the first ``last``: one more, of those up to ``last``.
        last = candidates - count + k
        draw = _mix(bits + np.uint64(k)) % np.maximum(last + 1, 1).astype(np.uint64)
        draw = draw.astype(np.int64)
        twice = (drawn[:, :, :k] == draw[:, :, None]).any(-1)
        drawn[:, :, k] = np.where(last < 0, -1, np.where(twice, last, draw))
    drawn = -np.sort(-drawn, axis=-1)  # the missing ones last
    return torch.from_numpy(np.where(drawn < 0, -1, drawn + global_blocks).astype(np.int32))


def _mix(x: np.ndarray) -> np.ndarray:
    """64 bits that depend on all of those of x: a step of SplitMix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    start: int | Tensor = 0,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Causal attention to the blocks of a pattern, exact, with grouped queries by head counts.

    Under autocast q, k and v are taken in its dtype. Of whole sequences (``start`` 0, T = Tk) a block of
    queries is one small attention over the keys that it sees; otherwise, as in decoding, each query gathers
    its own, with a work that does not depend on Tk. Neither looks at more than (g + w + r) · b keys for a
    query, and what is there at a time is bounded. With ``documents`` all scores are made, in parts of the
    queries, and masked: that takes the time of full attention.

    Args:
        q: (B, H, T, D), the tokens at positions start … start + T − 1 of each sequence; any floating dtype
            and any strides.
        k: (B, Hkv, Tk, D), keys in the order of their positions from 0, same dtype and device; H is a
            multiple of Hkv, and query head h reads key head h // (H // Hkv). On a cache what is at positions
            after a query may be anything, also NaN.
        v: (B, Hkv, Tk, D), likewise.
        pattern: of H heads, and as many blocks as the positions of the queries need (where ``start`` is a
            tensor, as the keys need).
        start: an int, and Tk ≥ start + T; or (B,) int32 or int64 on q's device, whose values are looked at
            on a CPU alone. A query whose position is not below Tk, since its row has fewer tokens than T,
            gives something finite as long as the keys and values are, and means nothing.
        scale: factor on the scores, above 0; 1/√D when None.
        alibi_slopes: (H,) floats, no gradient: what a score of that head loses for each token of distance.
        documents: (B, T) int32 or int64, numbers of packed documents that never decrease along a row: each
            is computed as if alone, its positions, blocks and draws counted from its first token. Whole
            sequences only.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        UserError: shapes, dtypes, devices, options or a pattern that do not fit together.
    """
    options = {
        "start": start,
        "scale": scale,
        "alibi_slopes": alibi_slopes,
        "documents": documents,
    }
    if not all(isinstance(tensor, Tensor) for tensor in (q, k, v)):
        raise UserError("block_sparse_attention: q, k and v must be tensors")
    run = partial(BLOCK_SPARSE_ATTENTION, pattern=pattern, **options)
    return in_autocast_dtype(run, q, k, v)


# --- checks --------------------------------------------------------------------------------------


def _shapes(*tensors: Tensor) -> str:
    """Made where one is wrong: a compiler cannot, of sizes that it does not know."""
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _check(q, k, v, pattern, *, start=0, scale=None, alibi_slopes=None, documents=None) -> None:
    name = "block_sparse_attention"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape[-1] == 0:
        raise UserError(
            f"{name}: q, k and v must be (B, H, T, D) with D ≥ 1, not {_shapes(q, k, v)}"
        )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(
            f"{name}: k and v must have one shape, and q their batch size and head width; they are "
            f"{_shapes(q, k, v)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise UserError(
            f"{name}: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads"
        )
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UserError(
            f"{name}: q, k and v must have one floating dtype of 16 bits or more, not {q.dtype}, "
            f"{k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise UserError(f"{name}: q, k and v are on {q.device}, {k.device} and {v.device}")
    check_scores(name, q, Options(scale=scale, alibi_slopes=alibi_slopes))
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise UserError(f"{name}: alibi_slopes get no gradient; give them detached")
    _check_pattern(name, q, pattern)
    T, Tk, b = q.shape[2], k.shape[2], pattern.block
    _check_start(name, q, Tk, start)
    positions = start + T if isinstance(start, int) else Tk
    if positions > pattern.random.shape[1] * b:
        raise UserError(
            f"{name}: the pattern has {pattern.random.shape[1]} blocks of {b} tokens, too few for "
            f"{positions} positions: make its random_blocks longer"
        )
    if documents is not None:
        check_documents(name, q, documents)
        if not isinstance(start, int) or start != 0 or T != Tk:
            raise UserError(
                f"{name}: documents are for whole sequences, with start 0 and as many keys as queries, "
                f"not for {T} queries on {Tk} keys"
            )


def _check_pattern(name: str, q: Tensor, pattern: BlockPattern) -> None:
    if not isinstance(pattern, BlockPattern):
        raise UserError(f"{name}: pattern must be a BlockPattern, not {type(pattern).__name__}")
    for key, least in (("block", 1), ("window", 1), ("global_blocks", 0)):
        if not isinstance(value := getattr(pattern, key), int) or value < least:
            raise UserError(f"{name}: {key} of a pattern must be at least {least}, not {value!r}")
    random = pattern.random
    if random.dim() != 3 or random.shape[0] != q.shape[1] or random.dtype != torch.int32:
        raise UserError(
            f"{name}: random of a pattern must be int32 and ({q.shape[1]}, blocks, count), not "
            f"{random.dtype} and {tuple(random.shape)}"
        )
    if random.device != q.device:
        raise UserError(f"{name}: q is on {q.device} and the pattern on {random.device}")


def _check_start(name: str, q: Tensor, Tk: int, start: int | Tensor) -> None:
    B, _, T, _ = q.shape
    if not isinstance(start, Tensor):
        if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
            raise UserError(f"{name}: start must be an int or a tensor, not {start!r}")
        if start < 0 or start + T > Tk:
            raise UserError(f"{name}: {T} queries from position {start} are not within {Tk} keys")
        return
    if start.shape != (B,) or start.dtype not in (torch.int32, torch.int64):
        raise UserError(
            f"{name}: start must be ({B},) int32 or int64, not {tuple(start.shape)} {start.dtype}"
        )
    if start.device != q.device:
        raise UserError(f"{name}: q is on {q.device} and start on {start.device}")
    if T > 0 and Tk == 0:
        raise UserError(f"{name}: there are queries and no keys")
    if (wrong := outside(start, Tk + 1)) is not None:
        raise UserError(f"{name}: start of {wrong} is not within the {Tk} keys")


BLOCK_SPARSE_ATTENTION = Op(
    "block_sparse_attention",
    _check,
    (Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, reference),),
)
