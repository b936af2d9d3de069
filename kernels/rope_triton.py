"""RoPE in Triton: one kernel, which rotates the heads of a few tokens a program, or rotates them back.

A row is one head of one token. A program takes as many as make ``BLOCK`` pairs of dimensions and
goes through them once: a thread's pairs are two pieces of 16 bytes, one of each half of the head,
and the cosines and sines that go with them, which the heads of a token share in the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from almostgpt.kernels import triton_ops
from almostgpt.kernels.triton_ops import TritonOp, wrap_triton

MAX_HEAD_DIM = 4096  # a row is one piece of a program
MAX_ROWS = 2**30  # they are counted in 32 bits; offsets in memory have 64


# A start of a sequence that is 0, 1 or a multiple of 16 must not be compiled for.
@triton.jit(do_not_specialize=["start"])
def _rope_kernel(
    x,  # (B, T, H, D)
    out,  # (B, T, H, D); x itself where the rotation is in place
    cos,  # (P, HALF)
    sin,
    positions,  # (B, T) where PACKED
    start,
    rows,  # B·T·H
    T,
    x_batch,  # strides
    x_token,
    x_head,
    out_batch,
    out_token,
    out_head,
    H: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,  # dimensions behind the rotated ones that are copied
    PACKED: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # powers of two, not below HALF and REST
    REST_BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    token = row // H
    b = (token // T).to(tl.int64)
    t = (token % T).to(tl.int64)
    h = (row % H).to(tl.int64)
    x += (b * x_batch + t * x_token + h * x_head)[:, None]
    out += (b * out_batch + t * out_token + h * out_head)[:, None]
    exists = exists[:, None]
    if HALF > 0:
        if PACKED:
            position = tl.load(positions + token[:, None], exists, other=0).to(tl.int64)
        else:
            position = (start + t)[:, None]
        i = tl.arange(0, HALF_BLOCK)[None, :]
        inside = exists & (i < HALF)
        c = tl.load(cos + position * HALF + i, inside)
        s = tl.load(sin + position * HALF + i, inside)
        if INVERSE:
            s = -s
        first = tl.load(x + i, inside).to(tl.float32)
        second = tl.load(x + HALF + i, inside).to(tl.float32)
        tl.store(out + i, first * c - second * s, inside)
        tl.store(out + HALF + i, second * c + first * s, inside)
    if REST > 0:
        i = tl.arange(0, REST_BLOCK)[None, :]
        inside = exists & (i < REST)
        tl.store(out + 2 * HALF + i, tl.load(x + 2 * HALF + i, inside), inside)


def _launch(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    start: int,
    inverse: bool,
) -> None:
    B, T, H, D = x.shape
    rows = B * T * H
    if rows == 0:
        return
    # Whole numbers to compile for, even where torch.compile traces other sizes as symbols.
    H, D, half = int(H), int(D), int(cos.shape[1])
    rest = 0 if out is x else D - 2 * half
    half_block = triton.next_power_of_2(max(half, 1))
    rest_block = triton.next_power_of_2(max(rest, 1))
    chosen = triton_ops.settings("rope", x.device.index)
    pairs = max(half_block, rest_block // 2)
    block = max(1, chosen["BLOCK"] // pairs)
    wrap_triton(_rope_kernel)[((rows + block - 1) // block,)](
        x,
        out,
        cos.contiguous(),
        sin.contiguous(),
        cos if positions is None else positions.contiguous(),
        start,
        rows,
        T,
        *x.stride()[:3],
        *out.stride()[:3],
        H=H,
        HALF=half,
        REST=rest,
        PACKED=positions is not None,
        INVERSE=inverse,
        ROWS=block,
        HALF_BLOCK=half_block,
        REST_BLOCK=rest_block,
        num_warps=chosen["num_warps"],
    )


def rotated(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    start: int,
    inverse: bool,
) -> Tensor:
    """x (B, T, H, D) rotated, or with ``inverse`` rotated back: contiguous."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, out, cos, sin, positions, start, inverse)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, start: int) -> None:
    """The same in place; the last dimension of x is contiguous."""
    _launch(x, x, cos, sin, positions, start, False)


def _save(ctx, inputs, output):
    _, cos, sin, positions, ctx.start, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx, dy):
    cos, sin, positions = ctx.saved_tensors
    dx = torch.ops.almostgpt.rope(dy, cos, sin, positions, ctx.start, not ctx.inverse)
    return dx, None, None, None, None, None


ROTATED = TritonOp("rope", rotated, backward=_gradients, setup_context=_save)
ROTATE = TritonOp("rope_", rotate, mutates=("x",))
