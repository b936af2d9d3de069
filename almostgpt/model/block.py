"""One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from almostgpt.config import GPTConfig
from almostgpt.model.attention import ATTENTIONS, Cache
from almostgpt.model.experts import Routing
from almostgpt.model.feedforward import FEEDFORWARDS
from almostgpt.model.norm import NORMS
from almostgpt.model.position import Position, Positions


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feedforward(norm(x)).

    The second sum is left to whoever comes next, which is a norm: see norm.py.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = NORMS[config.norm](config)
        self.attention = ATTENTIONS[config.attention](config, layer)
        self.feedforward_norm = NORMS[config.norm](config)
        self.feedforward = FEEDFORWARDS[config.feedforward](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        position: Position,
        positions: Positions,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """Takes and returns what is to be added to the residual stream, and the stream: (B, T, n_embd).

        And what the router of a mixture of experts did in training, where there is one.
        """
        x, residual = self.attention_norm(x, residual)
        x = self.dropout(self.attention(x, position, positions, cu_seqlens, cache))
        x, residual = self.feedforward_norm(x, residual)
        x, routing = self.feedforward(x)
        return self.dropout(x), residual, routing
