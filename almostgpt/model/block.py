"""One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from almostgpt.config import GPTConfig
from almostgpt.model.attention import ATTENTIONS, Cache
from almostgpt.model.feedforward import FEEDFORWARDS
from almostgpt.model.norm import NORMS
from almostgpt.model.position import Position


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = NORMS[config.norm](config)
        self.attention = ATTENTIONS[config.attention](config, layer)
        self.feedforward_norm = NORMS[config.norm](config)
        self.feedforward = FEEDFORWARDS[config.feedforward](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Position, start: int, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), position, start, cache))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
