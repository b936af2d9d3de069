"""Attention in steps, for readers: from the textbook to FlashAttention on tensor cores.

The first two kernels are in ``csrc/attention/ladder/``, where each step says what it costs and what
the next one will save; ``"mma"`` is the kernel that ``kernels.flash_attention`` runs on every card
but Hopper, here on any. Forward only::

    from almostgpt.kernels.attention_ladder import attention_ladder

    with kernels.use_backend("emulator"):           # on CPU tensors; on a GPU without it
        naive, tiled = (attention_ladder(step, q, k, v, causal=True) for step in ("naive", "tiled"))
"""

from __future__ import annotations

import math

import torch

from almostgpt.errors import UserError
from almostgpt.kernels.csrc import csrc_kernels, define
from almostgpt.kernels.dispatch import Kernel, Op

STEPS = ("naive", "tiled", "mma")


@torch.no_grad()
def attention_ladder(
    step: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax(q kᵀ · scale) v of each head, by one step of the ladder; no gradient flows through.

    Args:
        step: ``"naive"``, ``"tiled"`` or ``"mma"``.
        q, k, v: (B, H, T, D), one shape, dtype and device. The kernels take bfloat16 and float16,
            and a D that is a multiple of 8 up to 128; else, and on a CPU, plain PyTorch runs.
        causal: position i sees the positions j ≤ i.
        scale: factor on the scores; 1/√D when None.

    Returns:
        (B, H, T, D), contiguous.

    Raises:
        UserError: no such step, or tensors that are not alike.
    """
    return ATTENTION_LADDER(q, k, v, step=step, causal=causal, scale=scale)


def _check(q, k, v, *, step, causal=False, scale=None) -> None:
    if step not in STEPS:
        raise UserError(f"attention_ladder: the steps are {', '.join(STEPS)}, not {step!r}")
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k, v))
        raise UserError(
            f"attention_ladder: q, k and v must be (B, H, T, D), all alike, not {shapes}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in (q, k, v))
        raise UserError(
            f"attention_ladder: q, k and v must be of one dtype and device, not {kinds}"
        )


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


# --- torch.ops.almostgpt.* and torch.ops.almostgpt_emulator.* ------------------------------------


def _plain(q, k, v, scale, causal):
    """Every step on a CPU: in float32, as the kernels compute, and rounded once."""
    q_, k_, v_ = (
        tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (q, k, v)
    )
    scores = q_ @ k_.mT * scale
    if causal:
        unseen = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(unseen, -math.inf)
    return (scores.softmax(-1) @ v_).to(q.dtype)


for _step in STEPS:
    define(
        f"attention_ladder_{_step}",
        "(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor out",
        fake=lambda q, k, v, scale, causal: q.new_empty(q.shape),
        cpu=_plain,
    )


# --- kernels -------------------------------------------------------------------------------------


def _reference(q, k, v, *, step, causal=False, scale=None):
    return _plain(q, k, v, _scale(q, scale), causal)


def _run_csrc(ops, q, k, v, *, step, causal=False, scale=None):
    return getattr(ops, f"attention_ladder_{step}")(q, k, v, _scale(q, scale), causal)


def _refuse_card(card, q, k, v, *, step, causal=False, scale=None) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= 128:
        return f"the kernels take widths that are multiples of 8 up to 128, not {q.shape[-1]}"
    return None


# Not one of kernels.OPS: no model calls it. A forced backend holds for it all the same.
ATTENTION_LADDER = Op(
    "attention_ladder",
    _check,
    (
        *csrc_kernels("a step of the ladder", _refuse_card, _run_csrc),
        Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, _reference),
    ),
)
