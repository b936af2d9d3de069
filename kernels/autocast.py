"""What autocast means to an op of ours: its tensors in autocast's dtype, and its own maths left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_CAST = (torch.bfloat16, torch.float16, torch.float32)
Result = TypeVar("Result")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast asks for where x is; None without it, or of a tensor without a device."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def in_autocast_dtype(run: Callable[..., Result], *tensors: Tensor) -> Result:
    """``run(*tensors)``; under autocast of tensors in its dtype, but for float64, and without it inside.

    What an op does in float32, autocast would take for products to be done in 16 bits.
    """
    if (dtype := autocast_dtype(tensors[0])) is None:
        return run(*tensors)
    tensors = tuple(t.to(dtype) if t.dtype in _CAST else t for t in tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return run(*tensors)
