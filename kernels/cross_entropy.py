"""Cross-entropy of logits that are already there; see linear_cross_entropy.py for both in one.

For each row z of logits and its target t:

    loss = logsumexp(z) − z[t],    z ← softcap · tanh(z / softcap) where there is a softcap
    dz   = (softmax(z) − onehot(t)) · dloss · (1 − (z / softcap)²)

Forward reads the logits once and keeps the logsumexp, backward reads them once more and writes
their gradient; no softmax is ever stored.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt.errors import UserError
from almostgpt.kernels import triton_ops
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.values import outside

if triton_ops.MISSING is None:
    from almostgpt.kernels import cross_entropy_triton as kernel

REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    softcap: float = 0.0,
) -> Tensor:
    """The cross-entropy of targets under ``softmax(logits)``, in nats.

    Args:
        logits: (..., V), V ≥ 1; bfloat16, float16, float32 or float64.
        targets: (...), int64 or int32: in [0, V), or ``ignore_index``. Others are an error on a
            CPU; on a GPU, where looking would cost a sync, the kernels make the loss NaN.
        ignore_index: a row with this target has no loss and no gradient.
        reduction: ``"mean"`` over the rows that count (of none of them it is 0, not PyTorch's
            NaN), ``"sum"`` or ``"none"``.
        softcap: bends logits to (−softcap, softcap) by tanh; 0 switches it off.

    Returns:
        A scalar, or with ``"none"`` (...): float32, float64 for float64.

    Raises:
        UserError: a shape, dtype, device or option that does not fit; a second derivative of the
            kernel.
    """
    return CROSS_ENTROPY(
        logits, targets, ignore_index=ignore_index, reduction=reduction, softcap=softcap
    )


def _check(logits, targets, *, ignore_index=-1, reduction="mean", softcap=0.0) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise UserError(
            f"cross_entropy: logits must be (..., V) with V ≥ 1, not {tuple(logits.shape)}"
        )
    if logits.dtype not in _DTYPES:
        raise UserError(
            f"cross_entropy: logits must be a floating tensor of 16 bits or more, not {logits.dtype}"
        )
    if targets.shape != logits.shape[:-1]:
        raise UserError(
            f"cross_entropy: targets must be {tuple(logits.shape[:-1])} for logits of "
            f"{tuple(logits.shape)}, not {tuple(targets.shape)}"
        )
    check_loss_options("cross_entropy", targets, reduction, softcap)
    if logits.device != targets.device:
        raise UserError(
            f"cross_entropy: logits are on {logits.device} and targets on {targets.device}"
        )


def check_loss_options(op: str, targets: Tensor, reduction: str, softcap: float) -> None:
    """What this op and linear_cross_entropy take alike."""
    if targets.dtype not in (torch.int64, torch.int32):
        raise UserError(f"{op}: targets must be int64 or int32, not {targets.dtype}")
    if reduction not in REDUCTIONS:
        raise UserError(f"{op}: reduction is {reduction!r}, not one of {', '.join(REDUCTIONS)}")
    if not 0 <= softcap < float("inf"):
        raise UserError(f"{op}: softcap must be 0 (off) or above and finite, not {softcap}")


def check_targets(op: str, targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Those that count, the others being 0."""
    if (target := outside(targets, vocab_size)) is not None:
        raise UserError(
            f"{op}: target {target} is neither in [0, {vocab_size}) nor ignore_index "
            f"({ignore_index})"
        )


def reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Losses of rows, or already their sum, as ``reduction`` says."""
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum() if losses.dim() else losses
    if reduction == "sum":
        return total
    return total / (targets != ignore_index).sum().clamp(min=1)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Every op in the dtype it is given, on devices that have autocast ("meta" has not)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def reference(logits, targets, *, ignore_index=-1, reduction="mean", softcap=0.0):
    """The same in plain PyTorch."""
    z = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    check_targets(
        "cross_entropy", targets.where(targets != ignore_index, 0), z.shape[1], ignore_index
    )
    with without_autocast(logits.device):
        losses = F.cross_entropy(
            z, targets.flatten().long(), ignore_index=ignore_index, reduction="none"
        )
    return reduced(losses, targets, ignore_index, reduction)


# ---------------------------------------------------------------- kernels


class _CrossEntropy(torch.autograd.Function):
    """The losses of rows by the kernels, in eager mode."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, softcap):
        losses, lses = kernel.FORWARD(logits, targets, ignore_index, softcap)
        ctx.save_for_backward(logits, targets, lses)
        ctx.options = ignore_index, softcap
        return losses

    @staticmethod
    def backward(ctx, dlosses):
        if torch.is_grad_enabled():
            raise UserError(
                "cross_entropy: the kernels have no second derivative; the reference has, so force "
                "it: with kernels.use_backend('reference', ops=['cross_entropy'])"
            )
        dlogits = kernel.BACKWARD(dlosses, *ctx.saved_tensors, *ctx.options)
        return dlogits, None, None, None


def _run_triton(logits, targets, *, ignore_index=-1, reduction="mean", softcap=0.0):
    rows = logits.reshape(-1, logits.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    inputs = (rows, targets.reshape(-1), ignore_index, float(softcap))
    if torch.compiler.is_compiling():
        losses = torch.ops.almostgpt.cross_entropy_forward(*inputs)[0]
    else:
        losses = _CrossEntropy.apply(*inputs)
    return reduced(losses, targets, ignore_index, reduction)


def _refuse_call(logits, targets, **options) -> str | None:
    if logits.dtype == torch.float64:
        return "the Triton kernels do not compute in float64"
    return None


CROSS_ENTROPY = Op(
    "cross_entropy",
    _check,
    (
        *triton_ops.triton_kernels("cross_entropy", _refuse_call, _run_triton),
        Kernel("reference", "plain PyTorch", lambda *a, **k: None, reference),
    ),
)
