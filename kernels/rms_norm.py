"""RMSNorm: every row divided by its root mean square, then scaled by a weight.

For one row x of length n, with upstream gradient dy:

    rstd = 1 / √(mean(x²) + eps)
    y    = x · rstd · weight
    dx   = rstd · (dy · weight) − x · rstd³/n · Σ(dy · weight · x)
    dweight = Σ over rows of dy · x · rstd

With a residual, x above is x + residual rounded once to x's dtype, which is returned too: the norm
and the residual connection before it read and write the residual stream once. Then dx has the
gradient of the sum added, and is the gradient of x and of the residual alike.

The arithmetic is in float32 (float64 for float64), whatever the dtype of x.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

from __future__ import annotations

import torch

from almostgpt.errors import UserError
from almostgpt.kernels.csrc import csrc_kernels, define
from almostgpt.kernels.dispatch import Kernel, Op

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Divide each row of x by its root mean square and multiply it by ``weight``.

    Args:
        x: (..., n), n ≥ 1; bfloat16, float16, float32 or float64; any strides.
        weight: (n,), x's dtype or float32, on x's device.
        eps: added to the mean of squares.
        residual: added to x first; shape, dtype and device of x, any strides.

    Returns:
        y, shaped as x and in x's dtype; with a residual ``(y, x + residual)``.

    Raises:
        UserError: a shape, dtype or device that does not fit.
    """
    return RMS_NORM(x, weight, eps, residual)


def _check(x, weight, eps=1e-5, residual=None) -> None:
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
    if residual is None:
        return
    if residual.shape != x.shape:
        raise UserError(
            f"rms_norm: residual must have the shape of x, {tuple(x.shape)}, not {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype or residual.device != x.device:
        raise UserError(
            f"rms_norm: residual must be {x.dtype} on {x.device} as x is, not {residual.dtype} on "
            f"{residual.device}"
        )


def _reciprocal_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1/√(mean(x²) + eps) of each row, (..., 1), in the dtype of the arithmetic."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # One pass over x and no x² in memory, neither here nor for backward.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, so that a compiler can fuse it with its neighbours.

    Type promotion does the upcasting: a 16-bit x times a float32 factor is float32.

    Of ten plain formulations this is among the fastest in eager mode, and steadily so: forward +
    backward, float32 on 2 shared x86 cores (torch 2.13, medians of `timeit`, 2026-11-21),
    (768, 128) 0.45 ms against 0.68 of torch.nn.functional.rms_norm, (16384, 768) 233 against 301.
    """
    if residual is not None:
        x = x + residual
    y = (x * (_reciprocal_rms(x, eps) * weight)).to(x.dtype)
    return y if residual is None else (y, x)


# --- torch.ops.almostgpt.* and torch.ops.almostgpt_emulator.* ------------------------------------
# The CPU implementations are the reference maths: they let every property of the ops (fakes,
# autograd, torch.compile) be tested without a GPU.


def _forward_cpu(x, weight, eps):
    rstd = _reciprocal_rms(x, eps)
    y = (x * (rstd * weight)).to(x.dtype)
    return y.contiguous(), rstd.squeeze(-1).contiguous()


def _add_forward_cpu(x, residual, weight, eps):
    total = (x + residual).contiguous()
    y, rstd = _forward_cpu(total, weight, eps)
    return y, total, rstd


def _backward_cpu(dy, dsum, x, weight, rstd):
    rstd = rstd.unsqueeze(-1)
    scaled = x * rstd  # y before the weight
    upstream = dy * weight.to(rstd.dtype)
    mean = (upstream * scaled).mean(-1, keepdim=True)
    dx = rstd * (upstream - scaled * mean)
    if dsum is not None:
        dx = dx + dsum
    dweight = (dy * scaled).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx.to(x.dtype).contiguous(), dweight


def _empty_rstd(x):
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


def _forward_fake(x, weight, eps):
    return x.new_empty(x.shape), _empty_rstd(x)


def _add_forward_fake(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), _empty_rstd(x)


def _backward_fake(dy, dsum, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_forward(ctx, inputs, output):
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _forward_gradients(ctx, dy, _):
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = ctx.ops.rms_norm_backward(dy, None, x, weight, rstd)
    return dx, dweight, None


def _save_add_forward(ctx, inputs, output):
    _, _, weight, _ = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total, weight, rstd)


def _add_forward_gradients(ctx, dy, dsum, _):
    total, weight, rstd = ctx.saved_tensors
    dx, dweight = ctx.ops.rms_norm_backward(dy, dsum, total, weight, rstd)
    return dx, dx, dweight, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_gradients(ctx, a, c):
    """Gradients of a·dx + c·dweight; rstd is a function of x here, not an input of its own.

    With g = dy, w = weight, r = rstd and sums over one row, that scalar is, row by row and but for
    a·dsum,
        L = r A − r³ B S / n + r C,   A = Σ a g w,  B = Σ a x,  S = Σ g w x,  C = Σ c g x
    and dr/dx = −r³ x / n.
    """
    g, dsum, x, w, r = ctx.saved_tensors
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
    ddsum = None if dsum is None else a.to(dsum.dtype)
    return dg.to(g.dtype), ddsum, dx.to(x.dtype), dw.to(w.dtype), None


define(
    "rms_norm_forward",
    "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    fake=_forward_fake,
    cpu=_forward_cpu,
    backward=_forward_gradients,
    setup_context=_save_forward,
)
define(
    "add_rms_norm_forward",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum, Tensor rstd)",
    fake=_add_forward_fake,
    cpu=_add_forward_cpu,
    backward=_add_forward_gradients,
    setup_context=_save_add_forward,
)
define(
    "rms_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    backward=_backward_gradients,
    setup_context=_save_backward,
)


# --- kernels -------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    """The ops above with their gradient, in eager mode.

    Called as they are they carry one too (register_autograd), which torch.compile needs and which
    costs more: 17 µs in forward, 35 forward and backward (docs/rms-norm.md).
    """

    @staticmethod
    def forward(ctx, ops, x, residual, weight, eps):
        ctx.set_materialize_grads(False)  # no zeros for the sum's gradient where nobody uses it
        with torch._C._AutoDispatchBelowAutograd():
            if residual is None:
                normalised = x
                y, rstd = ops.rms_norm_forward(x, weight, eps)
            else:
                y, normalised, rstd = ops.add_rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(normalised, weight, rstd)
        ctx.ops = ops
        return y if residual is None else (y, normalised)

    @staticmethod
    def backward(ctx, dy, dsum=None):
        if dy is None:
            return None, dsum, dsum, None, None
        x, weight, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the op records its own gradient
            dx, dweight = ctx.ops.rms_norm_backward(dy, dsum, x, weight, rstd)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                dx, dweight = ctx.ops.rms_norm_backward(dy, dsum, x, weight, rstd)
        return None, dx, dx if ctx.needs_input_grad[2] else None, dweight, None


def _run_csrc(ops, x, weight, eps=1e-5, residual=None):
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        return _RMSNorm.apply(ops, x, residual, weight, eps)
    if residual is None:
        return ops.rms_norm_forward(x, weight, eps)[0]
    return ops.add_rms_norm_forward(x, residual, weight, eps)[:2]


def _refuse_card(card, x, weight, eps=1e-5, residual=None) -> str | None:
    if x.dtype == torch.float64:
        return "the CUDA kernels do not compute in float64"
    return None


RMS_NORM = Op(
    "rms_norm",
    _check,
    (
        *csrc_kernels("rms_norm_forward", _refuse_card, _run_csrc),
        Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, reference),
    ),
)
