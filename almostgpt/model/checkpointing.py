"""Activation checkpointing: what of a block is kept for the backward pass, and what is computed again.

none: all of it. full: nothing but what enters the block (Chen et al. 2016). selective: the outputs of
matrix products and of attention, which hold nearly all of a block's work; norms, activations, rotations
and dropout are computed again (Korthikanti et al. 2023, with the projections on the kept side).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from almostgpt.model.experts import Routing

# Batched products (bmm) are not among them: in a block they occur only in attention written out, whose
# scores are what nobody wants to keep.
KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::linear",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "almostgpt::flash_attention_forward",
    "almostgpt_emulator::flash_attention_forward",
    "almostgpt::expert_linear",
}

# What is to be added to the residual stream, the stream, and what a router did, if there is one.
Streams = tuple[Tensor, Tensor, Routing | None]


def _policy(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _none(block: Callable[..., Streams], x: Tensor, residual: Tensor | None, *rest) -> Streams:
    return block(x, residual, *rest)


def _selective(block: Callable[..., Streams], x: Tensor, residual: Tensor | None, *rest) -> Streams:
    return checkpoint(
        block,
        *(x, residual, *rest),
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )


def _full(block: Callable[..., Streams], x: Tensor, residual: Tensor | None, *rest) -> Streams:
    # Summed first: what enters a block is what is kept of it, one tensor and not two. (selective has
    # kept x already, as the output of a matrix product, and leaves the sum to the block's norm.)
    x = x if residual is None else x + residual
    return checkpoint(block, x, None, *rest, use_reentrant=False)


# Each is called with a block and the block's arguments, and returns what the block returns.
CHECKPOINTING = {"none": _none, "selective": _selective, "full": _full}
