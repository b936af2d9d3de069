"""Linear layers and the token table in 8 bits, for inference: ``quantize`` makes them of trained ones.

What is read for every token are the matrices; norms, biases and positions stay as they are. How a row
is rounded, and by how much, says ``almostgpt.kernels.int8_linear``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import not_one_of
from almostgpt.errors import UserError
from almostgpt.kernels.int8_linear import dequantize_rows, quantize_rows
from almostgpt.model.linear import Embedding, ExpertLinear, Linear, expert_product

if TYPE_CHECKING:
    from almostgpt.model import GPT


class _Int8Matrix(nn.Module):
    """(rows, columns) int8 and a float32 scale for each row, as buffers: nothing trains them."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, columns, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(rows))

    def fill(self, matrix: Tensor) -> None:
        """Takes over a floating-point matrix, row by row."""
        self.weight, self.scales = quantize_rows(matrix)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix that this stands for, in ``dtype``; made anew at every call."""
        return dequantize_rows(self.weight, self.scales, dtype)

    def _apply(self, fn, recurse=True):
        """The scales move with the model, but a cast leaves them in float32, which the op takes."""
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = before.to(self.scales.device)
        return self


class Int8Linear(_Int8Matrix):
    """x (..., in_features) → (..., out_features), like ``nn.Linear``."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(out_features, in_features)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.int8_linear(x, self.weight, self.scales, self.bias)


class Int8ExpertLinear(_Int8Matrix):
    """The matrices of experts, (E · out_features, in_features): see ``ExpertLinear``.

    They are made floating-point at every call: what is saved is their storage. Of fewer rows than
    experts, as in decoding, only those of each row's expert are.
    """

    def __init__(self, n_experts: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__(n_experts * out_features, in_features)
        self.n_experts = n_experts
        self.bias = nn.Parameter(torch.zeros(n_experts * out_features)) if bias else None

    def forward(self, x: Tensor, offsets: Tensor, expert: Tensor) -> Tensor:
        E, (rows, width) = self.n_experts, x.shape
        if rows >= E:
            weight = self.dense(x.dtype).view(E, -1, width)
            return expert_product(x, weight, self.bias, offsets, expert)
        its_own = (
            stored.index_select(0, expert)  # on a CPU 25 times as fast as stored[expert]
            for stored in (self.weight.view(E, -1, width), self.scales.view(E, -1))
        )
        y = (x[:, None] @ dequantize_rows(*its_own, x.dtype).mT).squeeze(1)
        return y if self.bias is None else y + self.bias.view(E, -1)[expert].to(y.dtype)


class Int8Embedding(_Int8Matrix):
    """ids (...) → (..., columns) float32, like ``nn.Embedding``; and the logits of a tied model."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float() * self.scales[ids].unsqueeze(-1)

    def logits(self, x: Tensor) -> Tensor:
        return kernels.int8_linear(x, self.weight, self.scales)


class Matrices(NamedTuple):
    """The classes that hold a model's matrices."""

    linear: type[nn.Module]
    embedding: type[nn.Module]
    experts: type[nn.Module]


QUANTIZED = {
    "none": Matrices(Linear, Embedding, ExpertLinear),
    "int8": Matrices(Int8Linear, Int8Embedding, Int8ExpertLinear),
}


@torch.no_grad()
def quantize(model: GPT, kind: str = "int8") -> GPT:
    """The model with its matrices in 8 bits, in place: from here on to be evaluated, not trained.

    A tied table is one matrix, quantised once: embedding and output projection read the same bytes.

    Args:
        model: not yet quantised, or quantised this way: then nothing changes.
        kind: ``"int8"``, or ``"none"``: nothing.

    Raises:
        UserError: no such kind, or weights that are not finite.
    """
    if kind not in QUANTIZED:
        raise UserError(f"quantize is {not_one_of(kind, QUANTIZED)}")
    if kind in ("none", model.config.quantize):
        return model
    made = {
        module: {
            name: _quantized(child) for name, child in module.named_children() if _dense(child)
        }
        for module in model.modules()
    }  # all of them before the first is put in its place: where one fails, the model is as it was
    for module, children in made.items():
        for name, child in children.items():
            setattr(module, name, child)
    model.config = dataclasses.replace(model.config, quantize=kind)
    return model.requires_grad_(False).eval()


def _dense(module: nn.Module) -> bool:
    return isinstance(module, QUANTIZED["none"])


def _quantized(trained: Linear | Embedding | ExpertLinear) -> _Int8Matrix:
    matrix = trained.weight.flatten(0, -2)
    rows, columns = matrix.shape
    if isinstance(trained, ExpertLinear):
        n = trained.weight.shape[0]
        made = Int8ExpertLinear(n, columns, rows // n, trained.bias is not None)
        made.bias = trained.bias
    elif isinstance(trained, Embedding):
        made = Int8Embedding(rows, columns)
    else:
        made = Int8Linear(columns, rows, trained.bias is not None)
        made.bias = trained.bias
    made.to(trained.weight.device)
    made.fill(matrix)
    return made
