"""The activations as they are defined, and how far from that in float64 a result may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt import kernels


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu(x: Tensor) -> Tensor:
    return x * torch.erfc(-x / math.sqrt(2)) / 2  # 1 + erf would be 0 below -8


def _gelu_tanh(x: Tensor) -> Tensor:
    # (1 + tanh(z)) / 2, which cancels far below 0
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def _relu_squared(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0, x) ** 2


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.tensor_split(2, -1)
    return _silu(gate) * up


def _swiglu_pytorch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.tensor_split(2, -1)
    return F.silu(gate) * up


# The public op, its definition, PyTorch's way to compute it, and the arguments of the torch op.
PUBLIC: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": kernels.swiglu,
    "gelu": kernels.gelu,
    "gelu_tanh": partial(kernels.gelu, approximate="tanh"),
    "relu_squared": kernels.relu_squared,
}
TRUTH = {"swiglu": _swiglu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu_squared": _relu_squared}
PYTORCH = {
    "swiglu": _swiglu_pytorch,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}
OPTIONS = {name: ("silu", True) if name == "swiglu" else (name, False) for name in PUBLIC}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "strided rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "strided columns": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "repeated rows": lambda x: x[:1].expand_as(x) if x.dim() > 1 else x,
    "begins anywhere": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def make(
    name: str, leading, width: int, dtype, layout="contiguous", scale=1.0, seed=0, device="cpu"
) -> tuple[Tensor, Tensor]:
    """An input and the gradient of the result, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    columns = 2 * width if name == "swiglu" else width
    x = scale * torch.randn(*leading, columns, generator=generator)
    dy = torch.randn(*leading, width, generator=generator)
    return LAYOUTS[layout](x.to(device, dtype)), dy.to(device, dtype)


def with_gradient(function: Callable, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    # A view of a leaf, whose strides are those of x.
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y, *torch.autograd.grad(y, leaf, dy.to(y.dtype))


def assert_close_to_float64(name: str, function: Callable, x: Tensor, dy: Tensor) -> None:
    """The rule of the house: at most twice the error of PyTorch in that dtype, and 4 ulps of the largest.

    And, where terms cancel, of the largest term in float32.
    """
    ours, plain, exact = _ours_plain_exact(name, function, x, dy)
    terms = (1 + _largest(x)) ** 2 * max(1.0, _largest(dy)) if x.numel() else 0.0
    residue = 4 * torch.finfo(torch.float32).eps * (terms if math.isfinite(terms) else 0.0)
    for what, got, same, truth in zip(("y", "dx"), ours, plain, exact, strict=True):
        assert got.shape == truth.shape and got.dtype == x.dtype
        if truth.numel():
            largest, error = _largest(truth), _largest(got - truth)
            bound = 2 * _largest(same - truth) + 4 * torch.finfo(x.dtype).eps * largest + residue
            assert error <= bound, (what, error, bound)


def assert_rounded_once(name: str, function: Callable, x: Tensor, dy: Tensor) -> None:
    """float32 arithmetic, then one rounding: element by element, much tighter in 16 bits.

    Of the last place a whole unit is allowed, not a half: Triton's interpreter truncates.
    """
    ours, _, exact = _ours_plain_exact(name, function, x, dy)
    gate, up = x.double().tensor_split(2, -1) if name == "swiglu" else (x.double(), 1.0)
    # What float32 rounds on the way is of this size.
    terms = (1 + gate.abs()) ** 2 * (up.abs() if name == "swiglu" else 1.0)
    dterms = dy.double().abs() * terms
    if name == "swiglu":
        dterms = torch.cat([dterms, dy.double().abs() * (1 + gate.abs())], -1)
    info = torch.finfo(x.dtype)
    for what, got, truth, term in zip(("y", "dx"), ours, exact, (terms, dterms), strict=True):
        float32 = 16 * torch.finfo(torch.float32).eps * term
        bound = info.eps * truth.abs() + float32 + info.smallest_normal * info.eps
        error = (got.double() - truth).abs()
        assert (error <= bound).all(), (what, (error / bound).max().item())


def _ours_plain_exact(name, function, x, dy):
    return (
        with_gradient(function, x, dy),
        with_gradient(PYTORCH[name], x, dy),
        with_gradient(TRUTH[name], x.double(), dy.double()),
    )


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
