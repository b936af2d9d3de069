"""Looking at the values of tensors, where that costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from almostgpt.kernels.csrc import refuse_derivatives


def unread(tensor: Tensor) -> bool:
    """Whether its values are not looked at: a GPU would have to be waited for, a fake has none."""
    return (
        tensor.device.type != "cpu"
        or type(tensor) is not Tensor
        or torch.compiler.is_compiling()
        or refuse_derivatives() is not None
    )


def outside(indices: Tensor, end: int) -> int | None:
    """An index that is not in [0, end), or None: where there is none, or nobody looks."""
    if unread(indices) or not indices.numel():
        return None
    low, high = (int(value) for value in indices.aminmax())
    if low < 0:
        return low
    return high if high >= end else None
