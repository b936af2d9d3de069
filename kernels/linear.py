"""A linear layer: y = x · weightᵀ + bias.

For many rows of x it is a matrix product, and PyTorch's is hard to beat. For one row, which is what
decoding a token at a time has, nothing but reading the weight counts: each element is used once. There
``csrc/cpu/`` reads it as fast as the processor's memory gives it, and PyTorch's does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt.errors import UserError
from almostgpt.kernels import cpu
from almostgpt.kernels.autocast import autocast_dtype
from almostgpt.kernels.dispatch import Kernel, Op

# Beyond them PyTorch's matrix product is as fast or faster; see docs/cpu.md.
MOST_ROWS = {"portable": 4, "avx2": 16, "avx512": 16}
_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, and its gradients; autocast and torch.compile treat it as that.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).

    Raises:
        UserError: shapes, dtypes or devices that do not fit together.
    """
    return LINEAR(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise UserError(
            f"linear: weight must be (N, K) and x (..., K), not {tuple(weight.shape)} and "
            f"{tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"linear: bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise UserError(f"linear: x is on {x.device} and {name} on {tensor.device}")
        if tensor.dtype != x.dtype and autocast_dtype(x) is None:
            raise UserError(f"linear: x is {x.dtype} and {name} {tensor.dtype}")


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


cpu.define(
    "cpu_linear",
    "(Tensor x, Tensor weight, Tensor? bias, int instruction_set) -> Tensor",
    fake=_fake,
)


def _refuse_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return "a gradient is asked for"
    if why := cpu.refuse_watched():
        return why
    most = MOST_ROWS["avx512" if x.is_meta else cpu.best()]
    if x.numel() > most * x.shape[-1]:
        return f"x has more than {most} rows: PyTorch's matrix product is faster"
    if x.dtype not in _DTYPES:
        return f"the C++ kernel computes in float32 and bfloat16, not {x.dtype}"
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return "the C++ kernel takes a contiguous weight and bias"
    return None


def _run_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.almostgpt.cpu_linear.default(x, weight, bias, cpu.BEST)


LINEAR = Op(
    "linear",
    _check,
    (
        cpu.cpu_kernel("linear", _refuse_cpu, _run_cpu),
        Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, F.linear),
    ),
)
