"""Causal self-attention: (B, T, n_embd) → (B, T, n_embd)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import GPTConfig
from almostgpt.model.position import Position, Positions


class Cache(Protocol):
    """What attention and the model need of a key/value cache (``almostgpt.inference.cache``)."""

    length: int  # tokens already in it

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new k and v of a layer; returns all of that layer's, the new ones last."""

    def advance(self, tokens: int) -> None:
        """Called once a forward pass, when every layer has stored its tokens."""


class FullAttention(nn.Module):
    """Every token attends to itself and all before it, with MHA, GQA or MQA by ``n_kv_head``.

    With ``cu_seqlens``, to those of its own document alone: the rows are then read as one sequence.
    Queries, keys and values come from one projection and are read in place as strided views.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = (
            config.n_head,
            config.n_kv_head,
            config.head_dim,
        )
        self.qkv_heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, self.qkv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        position: Position,
        positions: Positions,
        cu_seqlens: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.qkv_heads, self.head_dim)
        qk, v = qkv.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        qk = position.rotate(qk, positions)
        if cu_seqlens is not None:  # all rows end to end: (1, B·T, heads, D)
            qk, v = (heads.flatten(0, 1).unsqueeze(0) for heads in (qk, v))
        q, k = qk.split([self.n_head, self.n_kv_head], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = kernels.flash_attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)
        return self.out(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


ATTENTIONS = {"full": FullAttention}
