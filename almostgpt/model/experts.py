"""A mixture of experts: many feed-forwards, of which a router sends every token to a few.

    p = softmax(router x)                         over E experts, in float32
    y = Σ over the k largest pₑ of wₑ · expertₑ(x)

with w the k probabilities, divided by their sum where k > 1 (Mixtral, arXiv:2401.04088); of one expert
its own probability, or the router would have no gradient (Switch, arXiv:2101.03961).

Dropless: every expert takes all tokens that it is sent, however many. The tokens are sorted by expert,
and ``kernels.expert_linear`` multiplies each run of them by its expert's matrix (MegaBlocks,
arXiv:2211.15841). All shapes are known without the values, so nothing waits for a GPU.

In training the router is asked for two more things, as a penalty on the loss:

    balance   E · Σₑ fₑ · mean(pₑ)        fₑ: share of the N·k choices; 1 where all are chosen alike (Switch)
    z-loss    mean(logsumexp(router x)²)  keeps logits small (ST-MoE, arXiv:2202.08906)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config_model import GPTConfig
from almostgpt.model.quantized import QUANTIZED


class Routing(NamedTuple):
    """What a router did in training.

    Attributes:
        penalty: () float32, balance and z-loss by their weights; a part of the loss.
        load: (E,) float32, the share of all choices that fell on each expert.
    """

    penalty: Tensor
    load: Tensor


class MixtureOfExperts(nn.Module):
    """``n_experts`` feed-forwards of the kind ``expert``, each token through ``experts_per_token``."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_experts, self.k = config.n_experts, config.experts_per_token
        self.weights = config.balance_loss, config.router_z_loss
        self.gated = config.expert == "swiglu"
        width, hidden = config.n_embd, config.mlp_hidden
        experts = QUANTIZED[config.quantize].experts
        # No linear layer of ours: in 8 bits a router would send tokens elsewhere.
        self.router = nn.Linear(width, self.n_experts, bias=False)
        first = experts(self.n_experts, width, (1 + self.gated) * hidden, bias=config.bias)
        setattr(self, "gate_up" if self.gated else "up", first)
        self.down = experts(self.n_experts, hidden, width, bias=config.bias)

    @property
    def unused_weights(self) -> int:
        """Of its weights, how many a token is not multiplied with."""
        matrices = [self.gate_up if self.gated else self.up, self.down]
        return sum(m.weight.numel() for m in matrices) * (self.n_experts - self.k) // self.n_experts

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        rows = x.reshape(-1, x.shape[-1])
        # The choice is made in float32: in 16 bits close experts are one (ST-MoE, section 3).
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(rows.float(), self.router.weight.float())
        probabilities = logits.softmax(-1)
        weight, expert = probabilities.topk(self.k)  # (N, k)
        if self.k > 1:
            weight = weight / weight.sum(-1, keepdim=True)

        choice = expert.flatten()
        order = choice.argsort(stable=True)  # (N·k,): the choices by expert, then by token
        chosen = choice[:, None] == torch.arange(self.n_experts, device=x.device)
        counts = chosen.sum(0)  # (E,)
        offsets = counts.cumsum(0).to(torch.int32)
        sorted_choice = choice[order]
        hidden = self._activated(rows[order // self.k], offsets, sorted_choice)
        out = self.down(hidden, offsets, sorted_choice)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        out = out[back].view(*expert.shape, -1)  # (N, k, n_embd)
        y = (out * weight.to(out.dtype)[..., None]).sum(1).view(x.shape)
        return y, self._routing(logits, probabilities, counts) if self.training else None

    def _activated(self, rows: Tensor, offsets: Tensor, choice: Tensor) -> Tensor:
        if self.gated:
            return kernels.swiglu(self.gate_up(rows, offsets, choice))
        return kernels.gelu(self.up(rows, offsets, choice))

    def _routing(self, logits: Tensor, probabilities: Tensor, counts: Tensor) -> Routing:
        load = counts / counts.sum().clamp(min=1)
        balance = self.n_experts * (load * probabilities.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        by_balance, by_z = self.weights
        return Routing(by_balance * balance + by_z * z, load)
