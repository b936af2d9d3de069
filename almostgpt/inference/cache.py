"""The key/value cache: what attention has computed for earlier tokens, kept for later ones."""

from __future__ import annotations

import torch
from torch import Tensor

from almostgpt.config import GPTConfig, resolve_model


class KVCache:
    """Keys and values of up to ``capacity`` tokens for every layer.

    Two buffers of shape (n_layer, batch, n_kv_head, capacity, head_dim), allocated once, so that a
    decoding step copies only its own token.

    Args:
        config: the model's.
        batch: sequences decoded side by side.
        capacity: most tokens a sequence; default ``config.block_size``.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        config = resolve_model(config)
        capacity = config.block_size if capacity is None else capacity
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v: (B, Hkv, T, D) behind the earlier tokens of ``layer``.

        Returns views (B, Hkv, length + T, D) of all keys and values so far.
        """
        stop = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : stop] = k
        self.values[layer, :, :, self.length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, tokens: int) -> None:
        """Counts the tokens that every layer has stored in this forward pass."""
        self.length += tokens
