"""Cross-entropy of rows of logits in Triton: the losses, and the gradient of the logits.

A program works on one row, in blocks of columns that it reads once for the logsumexp and once more
for the gradient, the second time from the L2 cache, which holds the rows that are under way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from almostgpt.kernels import triton_ops
from almostgpt.kernels.triton_ops import TritonOp, wrap_triton


@triton.jit
def _tanh(x):
    """By exp of a number that is not positive: no overflow. Near 0, where that cancels, by x², x⁴ …

    The polynomial is off by one ulp at most (a minimax fit in float64, on [0, 0.55]).
    """
    a = tl.exp(-2 * tl.abs(x))
    t = (1 - a) / (1 + a)
    u = x * x
    p = ((0.016437637 * u - 0.05267185) * u + 0.13320726) * u - 0.33332947
    return tl.where(tl.abs(x) < 0.55, x + x * u * p, tl.where(x < 0, -t, t))


@triton.jit
def _bend(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap · tanh(x / softcap)"""
    if HAS_SOFTCAP:
        x = _tanh(x / softcap) * softcap
    return x


@triton.jit
def _row_logsumexp(row, vocab_size, width, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """log Σ exp of one row, its largest value so far taken out of the sum.

    Milakov and Gimelshein 2018, arXiv:1805.02867. Loads are masked by ``width``: where that is a
    multiple of 16, which the vocabulary itself seldom is, Triton makes them 16 bytes wide.
    """
    largest = float("-inf")
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
        inside = columns < vocab_size
        x = tl.where(inside, _bend(x, softcap, HAS_SOFTCAP), float("-inf"))
        new = tl.maximum(largest, tl.max(x, 0))
        # Nothing but −inf so far: no value to take out.
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base), 0)
        largest = new
    return tl.where(largest == float("-inf"), 0.0, largest) + tl.log(total)


@triton.jit
def _row_loss(row, target, lse, vocab_size, softcap, ignore_index, HAS_SOFTCAP: tl.constexpr):
    """lse − x[target]; 0 for a row to be ignored, NaN for a target that is no column."""
    known = (target >= 0) & (target < vocab_size)
    x = tl.load(row + target, mask=known, other=0.0).to(tl.float32)
    loss = tl.where(known, lse - _bend(x, softcap, HAS_SOFTCAP), float("nan"))
    return tl.where(target == ignore_index, 0.0, loss)


@triton.jit
def _write_gradient(
    row,
    out,
    target,
    lse,
    upstream,
    vocab_size,
    width,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """upstream · (softmax − onehot) of one row, into out: (width,), 0 beyond the vocabulary."""
    seen = target != ignore_index
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        x = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
        y = _bend(x, softcap, HAS_SOFTCAP)
        gradient = tl.exp(y - lse) - tl.where(columns == target, 1.0, 0.0)
        if HAS_SOFTCAP:
            gradient *= 1 - (y / softcap) * (y / softcap)
        gradient = tl.where(inside & seen, gradient * upstream, 0.0)
        tl.store(out + columns, gradient, mask=columns < width)


@triton.jit
def _loss_and_gradient_kernel(
    logits,  # (rows, width), its gradient afterwards where GRADIENT
    targets,  # (rows,)
    upstream,  # (rows,) where WEIGHTED
    losses,  # (rows,)
    vocab_size,
    width,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * width
    target = tl.load(targets + index).to(tl.int64)
    lse = _row_logsumexp(row, vocab_size, width, softcap, HAS_SOFTCAP, BLOCK)
    loss = _row_loss(row, target, lse, vocab_size, softcap, ignore_index, HAS_SOFTCAP)
    tl.store(losses + index, loss)
    if GRADIENT:
        scale = 1.0
        if WEIGHTED:
            scale = tl.load(upstream + index)
        # The logit of the target has been read by now; of other columns each thread overwrites
        # only what it has read itself.
        tl.debug_barrier()
        _write_gradient(
            row,
            row,
            target,
            lse,
            scale,
            vocab_size,
            width,
            softcap,
            ignore_index,
            HAS_SOFTCAP,
            BLOCK,
        )


@triton.jit
def _forward_kernel(
    logits,
    targets,
    losses,
    lses,
    stride,
    vocab_size,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    target = tl.load(targets + index).to(tl.int64)
    lse = _row_logsumexp(row, vocab_size, vocab_size, softcap, HAS_SOFTCAP, BLOCK)
    loss = _row_loss(row, target, lse, vocab_size, softcap, ignore_index, HAS_SOFTCAP)
    tl.store(losses + index, loss)
    tl.store(lses + index, lse)


@triton.jit
def _backward_kernel(
    dlosses,
    logits,
    targets,
    lses,
    dlogits,
    stride,
    vocab_size,
    softcap,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    _write_gradient(
        logits + index * stride,
        dlogits + index * vocab_size,
        tl.load(targets + index).to(tl.int64),
        tl.load(lses + index),
        tl.load(dlosses + index),
        vocab_size,
        vocab_size,
        softcap,
        ignore_index,
        HAS_SOFTCAP,
        BLOCK,
    )


def launch_settings(logits: Tensor, columns: int) -> dict[str, int]:
    """From the table, no block wider than a row."""
    chosen = triton_ops.settings("cross_entropy", logits.device.index)
    block = min(chosen["BLOCK"], max(128, triton.next_power_of_2(columns)))
    # A warp for at least 256 columns.
    chosen["num_warps"] = max(1, min(chosen["num_warps"], block // 256))
    return chosen | {"BLOCK": block}


def loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    vocab_size: int,
    softcap: float,
    ignore_index: int,
    gradient: bool,
) -> Tensor:
    """Losses (rows,) float32 of contiguous logits (rows, width), which become their gradient.

    upstream: (rows,) float32, what each row's gradient is multiplied with; 1 when None.
    """
    rows, width = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    targets = targets.contiguous()
    if rows:
        wrap_triton(_loss_and_gradient_kernel)[(rows,)](
            logits,
            targets,
            targets if upstream is None else upstream.contiguous(),
            losses,
            vocab_size,
            width,
            softcap,
            ignore_index,
            HAS_SOFTCAP=softcap != 0,
            WEIGHTED=upstream is not None,
            GRADIENT=gradient,
            **launch_settings(logits, width),
        )
    return losses


def forward(
    logits: Tensor, targets: Tensor, ignore_index: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps (rows,) float32 of logits (rows, V), rows of any stride."""
    rows, vocab_size = logits.shape
    losses, lses = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        wrap_triton(_forward_kernel)[(rows,)](
            logits,
            targets.contiguous(),
            losses,
            lses,
            logits.stride(0),
            vocab_size,
            softcap,
            ignore_index,
            HAS_SOFTCAP=softcap != 0,
            **launch_settings(logits, vocab_size),
        )
    return losses, lses


def backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    lses: Tensor,
    ignore_index: int,
    softcap: float,
) -> Tensor:
    """The gradient of the logits, contiguous."""
    rows, vocab_size = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if rows:
        wrap_triton(_backward_kernel)[(rows,)](
            dlosses.contiguous(),
            logits,
            targets.contiguous(),
            lses,
            dlogits,
            logits.stride(0),
            vocab_size,
            softcap,
            ignore_index,
            HAS_SOFTCAP=softcap != 0,
            **launch_settings(logits, vocab_size),
        )
    return dlogits


def _save(ctx, inputs, output):
    logits, targets, *options = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = options


def _gradients(ctx, dlosses, _):
    dlogits = torch.ops.almostgpt.cross_entropy_backward(dlosses, *ctx.saved_tensors, *ctx.options)
    return dlogits, None, None, None


FORWARD = TritonOp("cross_entropy_forward", forward, backward=_gradients, setup_context=_save)
BACKWARD = TritonOp("cross_entropy_backward", backward)
