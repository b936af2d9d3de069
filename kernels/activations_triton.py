"""The activations of feed-forward layers in Triton: f(x), and gated f(gate) · up, with gradients.

One kernel a direction. A program takes BLOCK elements of the result, counted through all rows, so
no lane idles whatever the width of a row. In memory (rows, 2 · columns) the gate of element i lies
at row i // columns, column i % columns, and its up ``columns`` further: the fused projection is
read in place, by offset. Each byte is read once and written once; f is recomputed in backward.

Where the number of columns, the stride of rows and addresses are multiples of 16, which Triton
specialises kernels for, it can tell that 8 or more neighbours are within one row, and moves 16
bytes at a time. (Of odd widths it moves element by element.)

The arithmetic is in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from almostgpt.kernels import triton_ops
from almostgpt.kernels.activations_reference import plain_gradient
from almostgpt.kernels.triton_ops import TritonOp, wrap_triton


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x); the compiler drops what is not used."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        # Of the normal distribution the density, but for a factor, and from it the tail beyond |x|:
        # Abramowitz and Stegun 7.1.26, off by 7e-8 at most. With tl.erf backward has 385
        # instructions, not 272, more than a multiprocessor can issue while the bytes come.
        density = tl.exp(-0.5 * x * x)
        t = 1 / (1 + 0.2316418882 * tl.abs(x))
        tail = 0.5307027145 * t - 0.7265760135
        tail = ((tail * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
        tail *= t * density
        cdf = tl.where(x < 0, tail, 1 - tail)
        value = x * cdf
        slope = cdf + x * (0.3989422804014327 * density)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = sigmoid(2 z); here with 2 z = a (x + 0.044715 x³), a = √(8/π).
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * s
        slope = s + value * (1 - s) * (1.5957691216057308 * (1 + 0.134145 * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        positive = tl.where(x <= 0, 0.0, x)  # not maximum, which would drop a NaN
        value = positive * positive
        slope = 2 * positive
    return value, slope


@triton.jit
def _start(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The first element of this program."""
    start = tl.program_id(0)
    # A division of 64 bits is a third of all instructions: only where there are so many elements.
    if WIDE:
        start = start.to(tl.int64)
    return start * BLOCK


@triton.jit
def _gates(base, row_stride, columns, start, lanes):
    """Pointers to the gates of the elements start + lanes."""
    # A lane divides in 32 bits, which hold the place in a row and a block more (MOST_HIDDEN).
    row = start // columns
    lanes += (start - row * columns).to(tl.int32)
    below = (lanes // columns).to(tl.int64)  # rows below the program's first
    return base + row.to(tl.int64) * row_stride + (below * row_stride + lanes % columns)


@triton.jit
def forward_kernel(
    x,  # (rows, 2 · columns), rows of any stride, where GATED; otherwise total elements
    y,  # total elements
    row_stride,
    columns,
    total,  # of the result
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # 2³¹ elements and more
):
    start = _start(BLOCK, WIDE)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < total - start
    if GATED:
        gates = _gates(x, row_stride, columns, start, lanes)
        gate = tl.load(gates, mask=inside).to(tl.float32)
        up = tl.load(gates + columns, mask=inside).to(tl.float32)
        value = _value_and_slope(gate, ACTIVATION)[0] * up
    else:
        value = tl.load(x + start + lanes, mask=inside).to(tl.float32)
        value = _value_and_slope(value, ACTIVATION)[0]
    tl.store(y + start + lanes, value, mask=inside)


@triton.jit
def backward_kernel(
    dy,  # total elements
    x,  # as in forward
    dx,  # as x, but contiguous
    row_stride,  # of x
    columns,
    total,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # 2³¹ elements and more
):
    start = _start(BLOCK, WIDE)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < total - start
    upstream = tl.load(dy + start + lanes, mask=inside).to(tl.float32)
    if GATED:
        gates = _gates(x, row_stride, columns, start, lanes)
        gate = tl.load(gates, mask=inside).to(tl.float32)
        up = tl.load(gates + columns, mask=inside).to(tl.float32)
        value, slope = _value_and_slope(gate, ACTIVATION)
        dgates = _gates(dx, 2 * columns, columns, start, lanes)
        tl.store(dgates, upstream * up * slope, mask=inside)
        tl.store(dgates + columns, upstream * value, mask=inside)
    else:
        value = tl.load(x + start + lanes, mask=inside).to(tl.float32)
        slope = _value_and_slope(value, ACTIVATION)[1]
        tl.store(dx + start + lanes, upstream * slope, mask=inside)


# ---------------------------------------------------------------- launches


def _readable(x: Tensor, gated: bool) -> Tensor:
    """x as the kernels read it: (rows, width); a copy only where it has no such view.

    Gated, the columns must be adjacent; otherwise everything.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() else x.reshape(1, 1)
    return rows if gated and rows.stride(1) == 1 else rows.contiguous()


def _launch(kernel, tensors: tuple[Tensor, ...], x: Tensor, total: int, activation, gated) -> None:
    if total == 0:
        return
    chosen = triton_ops.settings("activation", x.device.index)
    wrap_triton(kernel)[(triton.cdiv(total, chosen["BLOCK"]),)](
        *tensors,
        x.stride(0),
        x.shape[1] // 2 if gated else x.shape[1],
        total,
        ACTIVATION=activation,
        GATED=gated,
        WIDE=total >= 2**31,
        **chosen,
    )


def forward(x: Tensor, activation: str, gated: bool) -> Tensor:
    """f(x) shaped as x, or f(gate) · up (..., n / 2); contiguous."""
    shape = (*x.shape[:-1], x.shape[-1] // 2) if gated else x.shape
    y, x = x.new_empty(shape), _readable(x, gated)
    _launch(forward_kernel, (x, y), x, y.numel(), activation, gated)
    return y


def backward(dy: Tensor, x: Tensor, activation: str, gated: bool) -> Tensor:
    """The gradient of x, shaped as x and contiguous."""
    dx, x = x.new_empty(x.shape), _readable(x, gated)
    _launch(backward_kernel, (dy.contiguous(), x, dx), x, dy.numel(), activation, gated)
    return dx


def _save(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _gradient(ctx, dy):
    dx = torch.ops.almostgpt.activation_backward(dy, *ctx.saved_tensors, *ctx.options)
    return dx, None, None


def _save_backward(ctx, inputs, output):
    dy, x, *ctx.options = inputs
    ctx.save_for_backward(dy, x)


def _second_gradients(ctx, ddx):
    """Of backward, by PyTorch: a rare need."""

    def gradient(dy, x):
        return plain_gradient(dy, x, *ctx.options)

    return *torch.func.vjp(gradient, *ctx.saved_tensors)[1](ddx), None, None


FORWARD = TritonOp("activation", forward, backward=_gradient, setup_context=_save)
BACKWARD = TritonOp(
    "activation_backward", backward, backward=_second_gradients, setup_context=_save_backward
)
