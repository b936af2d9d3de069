"""Causal self-attention: (B, T, n_embd) → (B, T, n_embd); one file a kind."""

from almostgpt.model.attention.base import Attention, Cache, checked_lengths
from almostgpt.model.attention.block_sparse import BlockSparseAttention
from almostgpt.model.attention.linear import LinearAttention
from almostgpt.model.attention.softmax import SoftmaxAttention

# By ``model.attention``; sliding_window is full attention whose local layers see the last keys alone.
ATTENTIONS: dict[str, type[Attention]] = {
    "full": SoftmaxAttention,
    "sliding_window": SoftmaxAttention,
    "linear": LinearAttention,
    "block_sparse": BlockSparseAttention,
}

__all__ = ["ATTENTIONS", "Attention", "Cache", "checked_lengths"]
