"""RMSNorm: every row divided by its root mean square, then scaled by a weight.

For one row x of length n, with upstream gradient dy:

    rstd = 1 / √(mean(x²) + eps)
    y    = x · rstd · weight
    dx   = rstd · (dy · weight) − x · rstd³/n · Σ(dy · weight · x)
    dweight = Σ over rows of dy · x · rstd

The arithmetic is in float32 (float64 for float64), whatever the dtype of x.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from __future__ import annotations

import torch

from almostgpt.errors import UserError
from almostgpt.kernels import native
from almostgpt.kernels.dispatch import Kernel, Op

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Divide each row of x by its root mean square and multiply it by ``weight``.

    Args:
        x: (..., n), n ≥ 1; bfloat16, float16, float32 or float64; any strides.
        weight: (n,), x's dtype or float32, on x's device.
        eps: added to the mean of squares.

    Returns:
        y, shaped as x and in x's dtype.

    Raises:
        UserError: a shape, dtype or device that does not fit.
    """
    return RMS_NORM(x, weight, eps)


def _check(x, weight, eps=1e-5) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise UserError(f"rms_norm: x must be (..., n) with n ≥ 1, not {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise UserError(
            f"rms_norm: weight must be ({x.shape[-1]},) for x of {tuple(x.shape)}, "
            f"not {tuple(weight.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise UserError(f"rms_norm: x must be a floating tensor of 16 bits or more, not {x.dtype}")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise UserError(f"rms_norm: weight must be {x.dtype} (as x) or float32, not {weight.dtype}")
    if weight.device != x.device:
        raise UserError(f"rms_norm: x is on {x.device} and weight on {weight.device}")


def _reciprocal_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1/√(mean(x²) + eps) of each row, (..., 1), in the dtype of the arithmetic."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # One pass over x and no x² in memory, neither here nor for backward.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """The same in plain PyTorch, so that a compiler can fuse it with its neighbours.

    Type promotion does the upcasting: a 16-bit x times a float32 factor is float32.

    Of ten plain formulations this is among the fastest in eager mode, and steadily so: forward +
    backward, float32 on 2 shared x86 cores (torch 2.13, medians of `timeit`, 2026-11-21),
    (768, 128) 0.45 ms against 0.68 of torch.nn.functional.rms_norm, (16384, 768) 233 against 301.
    """
    return (x * (_reciprocal_rms(x, eps) * weight)).to(x.dtype)


# --- torch.ops.almostgpt.rms_norm_forward and rms_norm_backward ----------------------------------
# The schemas live here, so that the ops exist with no native library, which only adds the
# implementations for CUDA. The ones for the CPU are the reference maths: they let every property
# of the ops (fakes, autograd, torch.compile) be tested without a GPU.

_LIBRARY = torch.library.Library("almostgpt", "FRAGMENT")
_LIBRARY.define("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIBRARY.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "rms_norm_forward", "CPU")
def _forward_cpu(x, weight, eps):
    rstd = _reciprocal_rms(x, eps)
    y = (x * (rstd * weight)).to(x.dtype)
    return y.contiguous(), rstd.squeeze(-1).contiguous()


@torch.library.register_fake("almostgpt::rms_norm_forward", lib=_LIBRARY)
def _forward_fake(x, weight, eps):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=dtype)


@torch.library.impl(_LIBRARY, "rms_norm_backward", "CPU")
def _backward_cpu(dy, x, weight, rstd):
    rstd = rstd.unsqueeze(-1)
    scaled = x * rstd  # y before the weight
    upstream = dy * weight.to(rstd.dtype)
    mean = (upstream * scaled).mean(-1, keepdim=True)
    dx = (rstd * (upstream - scaled * mean)).to(x.dtype)
    dweight = (dy * scaled).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx.contiguous(), dweight


@torch.library.register_fake("almostgpt::rms_norm_backward", lib=_LIBRARY)
def _backward_fake(dy, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx, inputs, output):
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.almostgpt.rms_norm_backward(dy, x, weight, rstd)
    return dx, dweight, None


def _save_for_double_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _double_backward(ctx, a, c):
    """Gradients of a·dx + c·dweight; rstd is a function of x here, not an input of its own.

    With g = dy, w = weight, r = rstd and sums over one row, that scalar is, row by row,
        L = r A − r³ B S / n + r C,   A = Σ a g w,  B = Σ a x,  S = Σ g w x,  C = Σ c g x
    and dr/dx = −r³ x / n.
    """
    g, x, w, r = ctx.saved_tensors
    n, r = x.shape[-1], r.unsqueeze(-1)
    a, g_, x_, w_, c = (t.to(r.dtype) for t in (a, g, x, w, c))
    A = (a * g_ * w_).sum(-1, keepdim=True)
    B = (a * x_).sum(-1, keepdim=True)
    S = (g_ * w_ * x_).sum(-1, keepdim=True)
    C = (c * g_ * x_).sum(-1, keepdim=True)
    k = r**3 / n
    dg = r * a * w_ - k * B * w_ * x_ + r * c * x_
    dw = (r * a * g_ - k * B * g_ * x_).reshape(-1, n).sum(0)
    dr = A - 3 * r**2 * B * S / n + C
    dx = r * c * g_ - k * (S * a + B * g_ * w_ + dr * x_)
    return dg.to(g.dtype), dx.to(x.dtype), dw.to(w.dtype), None


torch.library.register_autograd(
    "almostgpt::rms_norm_forward", _backward, setup_context=_save_for_backward, lib=_LIBRARY
)
torch.library.register_autograd(
    "almostgpt::rms_norm_backward",
    _double_backward,
    setup_context=_save_for_double_backward,
    lib=_LIBRARY,
)


# --- kernels -------------------------------------------------------------------------------------


def _refuse_cuda(x, weight, eps=1e-5) -> str | None:
    if not x.is_cuda:
        return f"x is on {x.device}"
    if x.dtype == torch.float64:
        return "the CUDA kernel does not compute in float64"
    return native.NATIVE.refuse() or native.refuse_device(x.device.index)


def _run_cuda(x, weight, eps=1e-5) -> torch.Tensor:
    return torch.ops.almostgpt.rms_norm_forward(x, weight, eps)[0]


RMS_NORM = Op(
    "rms_norm",
    _check,
    (
        Kernel("cuda", "rms_norm_forward", _refuse_cuda, _run_cuda),
        Kernel("reference", "plain PyTorch", lambda *args: None, reference),
    ),
)
