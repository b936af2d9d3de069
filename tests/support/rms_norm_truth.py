"""RMSNorm as it is defined, and how far from that in float64 a kernel may be.

The rule of the house: at most twice the error of the same maths by PyTorch in the kernel's own dtype,
plus four units in the last place of the largest term that a result is a sum of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True)
class Deviation:
    name: str
    error: float
    bound: float


def plain(x: Tensor, weight: Tensor, residual: Tensor | None = None):
    """The definition, in x's own dtype; the sum with the residual is rounded to it."""
    total = x if residual is None else x + residual
    rstd = torch.rsqrt((total * total).mean(-1, keepdim=True) + EPS)
    y = total * rstd * weight.to(x.dtype)
    return y if residual is None else (y, total)


def make(leading, n: int, dtype, wide_weight=False, seed=0, device="cpu") -> tuple[Tensor, ...]:
    """x, weight, residual, and upstream gradients of y and of the sum; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, dy, dsum = (
        torch.randn(*leading, n, generator=generator).to(device, dtype) for _ in range(4)
    )
    weight = torch.randn(n, generator=generator)
    weight = weight.to(device, torch.float32 if wide_weight else dtype)
    return x, weight, residual, dy, dsum


def with_gradients(norm: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> tuple:
    """Outputs, then the gradient of each input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = norm(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [dy.to(y.dtype) for y, dy in zip(outputs, upstream, strict=True)]
    return *outputs, *torch.autograd.grad(outputs, inputs, upstream)


def deviations(norm: Callable, inputs, upstream) -> list[Deviation]:
    """Of y, dx, dweight, and with a residual also of the sum and its gradient.

    Args:
        norm: of x, weight and perhaps a residual; y, or with a residual (y, sum).
        inputs: x, weight and perhaps the residual.
        upstream: gradients of the outputs.
    """
    exact = with_gradients(plain, [t.double() for t in inputs], [t.double() for t in upstream])
    peer = with_gradients(plain, inputs, upstream)
    ours = with_gradients(norm, inputs, upstream)
    # The largest terms. A gradient is a difference, which may be much smaller than they are.
    total = sum(tensor.double() for tensor in inputs[::2])
    weight, dy = inputs[1].double(), upstream[0].double()
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    y = (total * rstd * weight).abs()
    dx = (dy * weight * rstd).abs() + sum(tensor.double().abs() for tensor in upstream[1:])
    dweight = (dy * total * rstd).abs().reshape(-1, total.shape[-1]).sum(0)
    terms = {"y": y, "dx": dx, "dweight": dweight}
    if len(inputs) == 3:
        terms = {"y": y, "sum": total.abs(), "dx": dx, "dweight": dweight, "dresidual": dx}
    found = []
    for (name, term), got, same, truth in zip(terms.items(), ours, peer, exact, strict=True):
        assert got.shape == truth.shape, name
        if truth.numel():
            bound = 2 * _largest(same - truth) + 4 * torch.finfo(got.dtype).eps * _largest(term)
            found.append(Deviation(name, _largest(got - truth), bound))
    return found


def assert_close_to_float64(norm: Callable, inputs, upstream) -> None:
    for deviation in deviations(norm, inputs, upstream):
        assert deviation.error <= deviation.bound, deviation


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
