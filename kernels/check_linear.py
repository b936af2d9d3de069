"""What ``info --check`` needs of the linear layers: inputs, definitions, work, and the slack of int8."""

from __future__ import annotations

import math

from torch import Tensor

from almostgpt.kernels.int8_linear import quantize_rows


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``linear`` as it is defined, in the dtype of its inputs."""
    return x @ weight.t() + bias


def linear_inputs(shape: tuple[int, ...], normal) -> dict[str, Tensor]:
    """Of (rows, K, N)."""
    rows, K, N = shape
    return {"x": normal((rows, K)), "weight": normal((N, K)), "bias": normal((N,))}


def linear_work(shape: tuple[int, ...]) -> tuple[int, float]:
    """Elements that are moved at the least, and operations."""
    rows, K, N = shape
    return rows * (K + N) + (K + 1) * N, 2 * rows * K * N


def plain_int8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """``int8_linear`` as it is defined, in the dtype of its inputs."""
    return ((x @ weight.to(x.dtype).t()).to(scales.dtype) * scales + bias).to(x.dtype)


def int8_linear_inputs(shape: tuple[int, ...], normal) -> dict[str, Tensor]:
    """Of (rows, K, N)."""
    rows, K, N = shape
    weight, scales = quantize_rows(normal((N, K)))
    return {"x": normal((rows, K)), "weight": weight, "scales": scales, "bias": normal((N,))}


def int8_linear_work(shape: tuple[int, ...]) -> tuple[int, float, int]:
    """Elements that are moved at the least, operations, and bytes of the weight and its scales."""
    rows, K, N = shape
    return rows * K + N + rows * N, 2 * rows * K * N, N * K + 4 * N


def int8_linear_slack(inputs: dict[str, Tensor]) -> float:
    """How far off x in 16 bits may put y: independent roundings of up to half a unit.

    Each is spread evenly, with a standard deviation of a unit / √12; this is 5 of those of their sum.
    """
    unit = inputs["x"].abs().max().item() / 32767
    sizes = inputs["weight"].float().norm(dim=1) * inputs["scales"]
    return 5 * unit / math.sqrt(12) * sizes.max().item()
