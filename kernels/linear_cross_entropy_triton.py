"""linear_cross_entropy with a Triton kernel between its matrix products: the torch ops."""

from __future__ import annotations

import torch
from torch import Tensor

from almostgpt.kernels.cross_entropy_triton import loss_and_gradient
from almostgpt.kernels.linear_cross_entropy_reference import Options, loss_in_parts
from almostgpt.kernels.triton_ops import TritonOp


def _step(logits, targets, upstream, options: Options, gradient: bool):
    losses = loss_and_gradient(
        logits,
        targets,
        upstream,
        options.vocab_size,
        options.softcap,
        options.ignore_index,
        gradient,
    )
    return losses, logits if gradient else None


def in_parts(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    softcap: float,
    vocab_size: int,
    rows: int,
    dtype: torch.dtype,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss_in_parts`` with the kernel: losses (T,), dhidden (T, n), dweight (V, n)."""
    options = Options(ignore_index, softcap, vocab_size, rows, dtype)
    return loss_in_parts(
        _step, hidden, weight, targets, upstream, options, want_dhidden, want_dweight
    )


def _save(ctx, inputs, output):
    hidden, weight, targets, _, *options, _, _ = inputs
    ctx.save_for_backward(hidden, weight, targets)
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, dlosses, *_):
    """Of the losses; an ``upstream`` acts on the gradients alone."""
    hidden, weight, targets = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    _, dhidden, dweight = torch.ops.almostgpt.linear_cross_entropy(
        hidden, weight, targets, dlosses, *ctx.options, *wanted
    )
    return (
        dhidden.to(hidden.dtype) if wanted[0] else None,
        dweight.to(weight.dtype) if wanted[1] else None,
        *(None,) * 9,
    )


IN_PARTS = TritonOp("linear_cross_entropy", in_parts, backward=_gradients, setup_context=_save)
