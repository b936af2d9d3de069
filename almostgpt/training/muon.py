"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/): momentum, made orthogonal.

The momentum of a weight matrix is dominated by a few directions. Muon replaces it by the nearest
matrix that weighs all directions alike: UVᵀ for the momentum USVᵀ. It is for the hidden matrices of a
network; embeddings, the output projection and vectors stay with AdamW.

``torch.optim.Muon`` takes the same steps (a test compares them), but one matrix at a time, and it cannot
leave a step out without a wait of the host: a learning rate on the device is read back for every matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

MATRICES_AT_ONCE = 2**24  # values in a batch: enough to fill a GPU, and half a GB of temporaries


def orthogonalize(x: Tensor) -> Tensor:
    """UVᵀ of each USVᵀ in x: (n, rows, columns), roughly; bfloat16.

    Five Newton–Schulz iterations σ → 3.4445 σ − 4.7750 σ³ + 2.0315 σ⁵ on all singular values at once.
    The coefficients give up exactness for a steep start: what is above 0.002 of the Frobenius norm ends
    in 0.68 … 1.21, what is below that lower.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).bfloat16()
    if tall:  # the Gram matrix of the shorter side is the smaller one
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    The update is scaled by 0.2 · √max(rows, columns), which gives it the root mean square that AdamW's
    has: learning rate and weight decay of AdamW then serve both (Liu et al. 2025, "Muon is scalable for
    LLM training", section 2.2).

    Like a fused AdamW it reads ``found_inf`` on the device: where that is above 0, weights and momenta
    stay as they are. Gradients must be unscaled before.

    Args:
        groups: each has ``params``, and ``rows``: the heights of the matrices that each of its
            parameters holds one above the other (queries, keys and values, say). They are made
            orthogonal each on its own, as Jordan recommends. None where a parameter is one matrix.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rows": None}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf > 0
        for group in self.param_groups:
            for alike in self._matrices(group):
                count = max(1, MATRICES_AT_ONCE // alike[0][0].numel())
                for start in range(0, len(alike), count):
                    _update(*zip(*alike[start : start + count], strict=True), group, skip)

    def _matrices(self, group: dict[str, Any]) -> Iterable[list[tuple[Tensor, Tensor, Tensor]]]:
        """Views of weight, gradient and momentum of the group's matrices, a list for each shape."""
        shapes = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            rows = group["rows"] or [p.numel() // p.shape[-1]]
            # Of more than two dimensions, as of experts: matrices one above the other.
            whole = (x.flatten(0, -2) for x in (p, p.grad, self.state[p]["momentum_buffer"]))
            for matrix in zip(*(part.split(rows) for part in whole), strict=True):
                shapes[matrix[0].shape].append(matrix)
        return shapes.values()


def _update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    group: dict[str, Any],
    skip: Tensor | None,
) -> None:
    """One step of matrices of one shape; none where ``skip``, bool of shape (), says so."""
    lr, beta = group["lr"], group["momentum"]
    weight, gradient, before = (torch.stack(part) for part in (weights, gradients, momenta))
    momentum = before.lerp(gradient, 1 - beta)
    update = orthogonalize(gradient.lerp(momentum, beta))
    scale = lr * 0.2 * math.sqrt(max(weight.shape[1:]))
    stepped = (weight * (1 - lr * group["weight_decay"])).sub_(update, alpha=scale)
    if skip is not None:  # chosen, not multiplied by 0, which would keep a NaN
        stepped = torch.where(skip, weight, stepped)
        momentum = torch.where(skip, before, momentum)
    torch._foreach_copy_(weights, stepped.unbind())
    torch._foreach_copy_(momenta, momentum.unbind())
