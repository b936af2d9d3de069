"""What ``info --check`` needs of linear attention, experts and block-sparse attention, as check_linear.py."""

from __future__ import annotations

import math

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
