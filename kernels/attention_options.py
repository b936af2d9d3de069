"""What attention without and with a cache have in common: options of scores, and how heads are laid out."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from almostgpt.errors import UserError

_NUMBER = (int, float, torch.SymInt, torch.SymFloat)


class ScoreOptions(Protocol):
    """What makes a score of q · k; see ``kernels.flash_attention``."""

    scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    sink_logits: Tensor | None


def check_scores(op: str, q: Tensor, options: ScoreOptions) -> None:
    """Raises ``UserError`` for what no score of q (B, H, T, D) can be made with."""
    scale, softcap = options.scale, options.softcap
    if scale is not None and not (isinstance(scale, _NUMBER) and 0 < scale < math.inf):
        raise UserError(f"{op}: scale must be a number above 0, not {scale!r}")
    if not (isinstance(softcap, _NUMBER) and 0 <= softcap < math.inf):
        raise UserError(f"{op}: softcap must be 0 (none) or above, not {softcap!r}")
    for name in ("alibi_slopes", "sink_logits"):
        tensor = getattr(options, name)
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise UserError(f"{op}: {name} must be a tensor, not {type(tensor).__name__}")
        if tensor.shape != q.shape[1:2] or not tensor.is_floating_point():
            raise UserError(
                f"{op}: {name} must be ({q.shape[1]},) floats, one for each query head, "
                f"not {tuple(tensor.shape)} of {tensor.dtype}"
            )
        if tensor.device != q.device:
            raise UserError(f"{op}: q is on {q.device} and {name} on {tensor.device}")


def refuse_heads(q: Tensor) -> str | None:
    """Why the CUDA kernels cannot take q (B, H, T, D), or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernels compute in bfloat16 and float16, not {q.dtype}"
    if q.shape[3] > 256:
        return f"the CUDA kernels take heads up to 256 wide, not {q.shape[3]}"
    return None


def refuse_scores(scale: float | None, softcap: float) -> str | None:
    """Why the CUDA kernels cannot make such scores, or None."""
    if softcap > 1000:  # their tanh is off by 1e-7, and so such a score by 1e-4
        return "the CUDA kernels take softcaps up to 1000; one so large bends no score"
    if 0 < softcap < 1e-30 or (scale is not None and scale > 1e30):
        return "the CUDA kernels compute in float32: softcaps below 1e-30 and scales above 1e30 leave it"
    return None


def refuse_tma(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why TMA cannot bring what is read in place of (B, H, T, D) tensors, or None."""
    if k.shape[2] == 0:
        return "there are no keys for TMA to bring"
    # A D that is no multiple of 8 is padded, and so copied.
    if q.shape[3] % 8 == 0 and any(_repeats(t) and _is_read_in_place(t) for t in (q, k, v)):
        return "TMA takes no expanded tensors, which have a stride of 0"
    return None


def _repeats(heads: Tensor) -> bool:
    return any(heads.shape[d] > 1 and heads.stride(d) == 0 for d in range(3))


def _is_read_in_place(heads: Tensor) -> bool:
    """As ``readable`` in csrc/torch/heads.h has it: what is not is copied first."""
    *strides, inner = heads.stride()
    aligned = heads.storage_offset() * heads.element_size() % 16 == 0
    return (
        (aligned and (inner == 1 or heads.shape[3] == 1))
        and all(n == 1 or step % 8 == 0 for n, step in zip(heads.shape, strides, strict=False))
        and (heads.shape[2] == 1 or strides[2] < 2**23)
    )


def empty_heads_like(x: Tensor) -> Tensor:
    """(B, H, T, D) as x, but (B, T, H, D) in memory: what comes next reads a token's heads as one."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)
