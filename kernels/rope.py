"""RoPE: pairs of dimensions of every query and key rotated by an angle of the token's position.

With D dimensions a head, of which the first R ≤ D are rotated, and pair i < R/2 made of the
dimensions i and i + R/2 (the layout of the Llama family), at position p:

    y[i]       = x[i] · cos[p, i] − x[i + R/2] · sin[p, i]
    y[i + R/2] = x[i + R/2] · cos[p, i] + x[i] · sin[p, i]

Dimensions from R on are left as they are. The gradient is that of y rotated back, by the same
kernel with −sin, so nothing of x is kept for backward: only the tables and the positions.

The arithmetic is in float32 (float64 for float64), whatever the dtype of x: in bfloat16 the
products would lose what tells far positions apart.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
arXiv:2104.09864.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.kernels import triton_ops
from almostgpt.kernels.csrc import refuse_derivatives
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.values import outside

if triton_ops.MISSING is None:
    from almostgpt.kernels import rope_triton as kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: int | Tensor = 0,
    *,
    inplace: bool = False,
) -> Tensor:
    """Rotate the heads of every token by the angles of its position.

    Args:
        x: (B, T, H, D), such as the queries and keys in the output of a fused projection;
            bfloat16, float16, float32 or float64; any strides. Where the last dimension is
            contiguous the kernel reads it where it is, otherwise it is copied first.
        cos, sin: (P, R/2) float32, R ≤ D: of the angles of positions 0 … P − 1. They are
            constants: they get no gradient.
        positions: of the first token of every row, the others following it; or int32 or int64 of
            (B, T), the position of each token, as packed documents need. A tensor's values must be
            in [0, P) and are not checked on a GPU, where looking would cost a sync.
        inplace: write into x. Not where a gradient of x is recorded.

    Returns:
        y (B, T, H, D) in x's dtype, contiguous; x itself with ``inplace``.

    Raises:
        UserError: a shape, dtype or device that does not fit, positions beyond the tables, or
            ``inplace`` where it cannot be.
    """
    return ROPE(x, cos, sin, positions, inplace=inplace)


def _check(x, cos, sin, positions=0, *, inplace=False) -> None:
    if x.dim() != 4:
        raise UserError(f"rope: x must be (B, T, heads, D), not {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise UserError(f"rope: x must be a floating tensor of 16 bits or more, not {x.dtype}")
    _check_tables(x, cos, sin)
    if isinstance(positions, Tensor):
        _check_positions(x, positions, cos.shape[0])
    elif not isinstance(positions, (int, torch.SymInt)) or isinstance(positions, bool):
        raise UserError(
            f"rope: positions must be an int or a tensor, not {type(positions).__name__}"
        )
    elif positions < 0 or positions + x.shape[1] > cos.shape[0]:
        raise UserError(
            f"rope: {x.shape[1]} tokens from position {positions} are not within the "
            f"{cos.shape[0]} of cos and sin"
        )
    if inplace:
        _check_inplace(x)


def _check_tables(x, cos, sin) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[3]:
        raise UserError(
            f"rope: cos and sin must be (positions, R/2) with R at most {x.shape[3]} for x of "
            f"{tuple(x.shape)}, not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise UserError(f"rope: cos and sin must be float32, not {cos.dtype} and {sin.dtype}")
    if cos.device != x.device or sin.device != x.device:
        raise UserError(f"rope: x is on {x.device}, cos on {cos.device} and sin on {sin.device}")
    if cos.requires_grad or sin.requires_grad:
        raise UserError("rope: cos and sin are constants; give them detached")


def _check_positions(x, positions, end: int) -> None:
    if positions.shape != x.shape[:2]:
        raise UserError(
            f"rope: positions must be {tuple(x.shape[:2])} for x of {tuple(x.shape)}, "
            f"not {tuple(positions.shape)}"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise UserError(f"rope: positions must be int32 or int64, not {positions.dtype}")
    if positions.device != x.device:
        raise UserError(f"rope: x is on {x.device} and positions on {positions.device}")
    if (position := outside(positions, end)) is not None:
        raise UserError(f"rope: position {position} is not within the {end} of cos and sin")


def _check_inplace(x) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise UserError("rope: inplace is for inference, and a gradient of x is recorded")
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise UserError("rope: inplace needs an x whose elements each have their own memory")


# ---------------------------------------------------------------- angles


def turns_of(frequencies: Tensor) -> Tensor:
    """What a position turns each pair by, as a fraction of a whole turn in units of 2⁻⁶⁴.

    Whole turns do not matter, and whole numbers that overflow lose just those: position · turns in
    64 bits is the angle at any position, to 2⁻⁵³ of a turn times the position, in two instructions.
    A product of floats would have lost all of its digits but the last few long before 10⁶.

    Args:
        frequencies: (R/2,) float64, in radians a position.

    Returns:
        (R/2,) int64; half a turn and more are below 0.
    """
    turns = frequencies.double() / (2 * math.pi)
    high = (turns - turns.floor()) * 2**32
    low = (high - high.floor()) * 2**32
    return (high.to(torch.int64) << 32) + low.to(torch.int64)


def angles_at(positions: Tensor, turns: Tensor) -> Tensor:
    """positions (…) int64 and turns (R/2,) → angles in [−π, π], (…, R/2) float64.

    On a device without float64 (mps) in float32, to 2⁻²⁴ of π.
    """
    phases = positions[..., None] * turns
    if phases.device.type == "mps":
        return (phases >> 32).float() * (2 * math.pi / 2**32)
    return phases.double() * (2 * math.pi / 2**64)


# ---------------------------------------------------------------- the reference


def reference(x, cos, sin, positions=0, *, inplace=False):
    """The same in plain PyTorch.

    In eager mode the rotation carries its own gradient. Against x · cos plus the swapped halves ·
    ±sin with autograd's own gradient, the fastest of the plain formulas, and with tables of the
    whole width: forward and backward of (12, 64, 8, 32) 0.27 and 0.31 ms, (1, 256, 24, 64) 0.34
    and 0.50, (16, 128, 8, 32) 0.69 and 1.30; but one token forward 25 and 13 µs. float32, lower
    quartiles, torch 2.13, 2 shared cores of an AMD EPYC, 2026-11-21.
    """
    if isinstance(positions, Tensor):
        cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
    else:
        end = positions + x.shape[1]
        cos, sin = cos[positions:end, None], sin[positions:end, None]
    y = rotated(x, cos, sin)
    return x.copy_(y) if inplace else y


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) rotated by the angles of its tokens: cos, sin (…, T, 1, R/2), float32."""
    if torch.compiler.is_compiling() or refuse_derivatives():
        return _definition(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotation.apply(x, cos, sin, False)
    return _rotated(x, cos, sin, inverse=False)


def _definition(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D) by cos and sin (…, T, 1, R/2), as compilers and torch.func take it."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = a * cos - b * sin, b * cos + a * sin
    return torch.cat([first.to(x.dtype), second.to(x.dtype), rest], dim=-1).contiguous()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The same, or back, in three passes over its own output."""
    R, D = 2 * cos.shape[-1], x.shape[-1]
    turned = x if R == D else x[..., :R]
    y = turned * torch.cat([cos, cos], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    first, second = y.chunk(2, dim=-1)
    first.addcmul_(b, sin, value=1 if inverse else -1)
    second.addcmul_(a, sin, value=-1 if inverse else 1)
    y = y.to(x.dtype)
    return y.contiguous() if R == D else torch.cat([y, x[..., R:]], dim=-1).contiguous()


class _Rotation(torch.autograd.Function):
    """``_rotated`` and its gradient, which is the rotation the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _rotated(x, cos, sin, inverse)

    @staticmethod
    def backward(ctx, dy):
        rotate = _Rotation.apply if torch.is_grad_enabled() else _rotated  # create_graph or not
        return rotate(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


# ---------------------------------------------------------------- the kernel


class _Rope(torch.autograd.Function):
    """The kernel and its gradient, in eager mode."""

    @staticmethod
    def forward(ctx, x, cos, sin, positions, start, inverse):
        ctx.save_for_backward(cos, sin, positions)
        ctx.start, ctx.inverse = start, inverse
        return kernel.ROTATED(x, cos, sin, positions, start, inverse)

    @staticmethod
    def backward(ctx, dy):
        rotate = _Rope.apply if torch.is_grad_enabled() else kernel.ROTATED  # create_graph or not
        dx = rotate(dy, *ctx.saved_tensors, ctx.start, not ctx.inverse)
        return dx, None, None, None, None, None


def _run_triton(x, cos, sin, positions=0, *, inplace=False):
    start, positions = (0, positions) if isinstance(positions, Tensor) else (positions, None)
    compiling = torch.compiler.is_compiling()
    if inplace:
        rotate = torch.ops.almostgpt.rope_ if compiling else kernel.ROTATE
        rotate(x, cos, sin, positions, start)
        if not (compiling or x.is_inference()):  # a graph that has saved x must notice
            torch.autograd.graph.increment_version(x)
        return x
    if compiling:
        return torch.ops.almostgpt.rope(x, cos, sin, positions, start, False)
    rotate = _Rope.apply if torch.is_grad_enabled() else kernel.ROTATED
    return rotate(x, cos, sin, positions, start, False)


def _refuse_call(x, cos, sin, positions=0, *, inplace=False) -> str | None:
    if x.dtype == torch.float64:
        return "the Triton kernel does not compute in float64"
    if triton_ops.MISSING is None:
        if x.shape[3] > kernel.MAX_HEAD_DIM:
            return f"heads of {x.shape[3]} dimensions are above {kernel.MAX_HEAD_DIM}"
        if x.shape[0] * x.shape[1] * x.shape[2] > kernel.MAX_ROWS:
            return f"the heads of all tokens are more than {kernel.MAX_ROWS}"
    if inplace and x.stride(-1) != 1:
        return "in place the last dimension must be contiguous"
    return None


ROPE = Op(
    "rope",
    _check,
    (
        *triton_ops.triton_kernels("rope", _refuse_call, _run_triton),
        Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, reference),
    ),
)
