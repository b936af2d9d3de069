"""What ``info --check`` needs of linear attention, experts and block-sparse attention, as check_linear.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import elu

from almostgpt.kernels.linear_attention import EPS

Shape = tuple[int, ...]


def linear_attention_inputs(shape: Shape, normal) -> dict[str, Tensor]:
    """Of (B, H, T, D): features that are above 0, and values."""
    return {"q": elu(normal(shape)) + 1, "k": elu(normal(shape)) + 1, "v": normal(shape)}


def plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``linear_attention`` as it is defined, with every product of a query and a key."""
    products = (q @ k.mT).tril()
    return products @ v / (products.sum(-1, keepdim=True) + EPS)


def linear_attention_work(shape: Shape) -> dict[str, tuple[int, float]]:
    """Elements that are moved at the least, and operations of the recurrence: 4 · D² a token."""
    elements = math.prod(shape)
    flops = 4.0 * elements * shape[3]
    return {"forward": (4 * elements, flops), "backward": (7 * elements, 2 * flops)}


def expert_linear_inputs(shape: Shape, normal) -> dict[str, Tensor]:
    """Of (experts, rows, in, out)."""
    E, N, K, M = shape
    return {"x": normal((N, K)), "weight": normal((E, M, K))}


def expert_linear_offsets(shape: Shape) -> dict[str, Tensor]:
    """Twice as many rows for the even experts as for the odd ones, but none for the first."""
    E, N, *_ = shape
    shares = (torch.arange(E) % 2 == 0).double() + 1
    shares[0] = float(E == 1)
    return {"offsets": (N * (shares.cumsum(0) / shares.sum())).round().int()}


def plain_expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``expert_linear`` as it is defined, in the dtype of its inputs."""
    ends = offsets.tolist()
    parts = zip([0, *ends], ends, weight, strict=False)
    return torch.cat([x[start:end] @ own.t() for start, end, own in parts])


def expert_linear_work(shape: Shape) -> dict[str, tuple[int, float]]:
    """Elements that are moved at the least, and operations."""
    E, N, K, M = shape
    elements, flops = N * (K + M) + E * K * M, 2.0 * N * K * M
    return {"forward": (elements, flops), "backward": (2 * elements, 2 * flops)}
