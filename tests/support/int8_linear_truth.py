"""A linear layer with a weight of int8 as it is defined, and how far from that in float64 a kernel may be.

The rule of the house: at most twice the error of the same maths by PyTorch in the kernel's own dtype,
plus four units in the last place of the largest result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What ``kernels.int8_linear`` takes."""

    x: Tensor
    weight: Tensor
    scales: Tensor
    bias: Tensor | None = None


def make(
    leading: tuple[int, ...],
    K: int,
    N: int,
    dtype: torch.dtype,
    bias: torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Inputs:
    """x (*leading, K); weight (N, K) with every code there is; scales (N,); bias (N,) or None."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, K, generator=generator)
    weight = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    scales = torch.rand(N, generator=generator) / 64
    added = None if bias is None else torch.randn(N, generator=generator).to(device, bias)
    return Inputs(x.to(device, dtype), weight.to(device), scales.to(device), added)


def plain(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, in x's own dtype."""
    y = (x @ weight.to(x.dtype).t()) * scales.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def exact(inputs: Inputs) -> Tensor:
    """In float64, which holds every product of a code, a scale and an x of 16 bits exactly."""
    x, weight, scales, bias = inputs
    return plain(x.double(), weight, scales.double(), bias)


def assert_close_to_float64(linear: Callable[..., Tensor], inputs: Inputs) -> None:
    got, truth = linear(*inputs), exact(inputs)
    assert got.shape == truth.shape and got.dtype == inputs.x.dtype
    if truth.numel() == 0:
        return
    error, allowed = _largest(got - truth), 2 * _largest(plain(*inputs) - truth)
    allowed += 4 * torch.finfo(got.dtype).eps * _largest(truth)
    assert error <= allowed, (error, allowed)


def assert_rounded_once(got: Tensor, inputs: Inputs) -> None:
    """Each result is as far from the truth as one rounding of it takes, but for sums in float32."""
    truth, x = exact(inputs), inputs.x.double()
    terms = plain(x.abs(), inputs.weight.double().abs(), inputs.scales.double())
    if inputs.bias is not None:
        terms = terms + inputs.bias.double().abs()
    summing = 16 * torch.finfo(torch.float32).eps * terms
    rounding = torch.finfo(got.dtype).eps / 2 * (truth.abs() + summing)
    assert (
        (got - truth).abs() <= rounding + summing + torch.finfo(got.dtype).smallest_normal
    ).all()


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()
