"""What a cache holds of each layer of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from almostgpt import kernels
from almostgpt.config_model import GPTConfig
from almostgpt.kernels import KVLayer, LinearState
from almostgpt.kernels.kv_cache import MAX_QUERIES

Layer = KVLayer | LinearState


@dataclass(frozen=True)
class Slots:
    """How many slots a layer has for a sequence, and of how many tokens a query sees the keys.

    ``window`` None: of all tokens, and there are slots for all.
    """

    capacity: int
    window: int | None
    sink_tokens: int

    @classmethod
    def of(cls, layer: KVLayer) -> Slots:
        return cls(layer.capacity, layer.window, layer.sink_tokens)

    @property
    def at_once(self) -> int:
        """Tokens that may be appended before a query of the first of them has looked at its window."""
        return self.capacity if self.window is None else self.capacity - self.window + 1


def local_slots(config: GPTConfig, layer: int, slots: Slots) -> Slots:
    """Those of a layer, where ``slots`` are for one that sees all before it.

    A layer with a window of its own keeps that window alone, in a ring twice as long: a prompt then goes
    through flash_attention a window at a time.
    """
    window = config.window_of(layer)
    seen = slots.capacity if slots.window is None else slots.window
    if window is None or window >= seen:
        return slots
    return Slots(window + max(window, MAX_QUERIES) - 1, window, 0)


def empty_layers(
    config: GPTConfig,
    batch: int,
    slots: Slots,
    *,
    int8: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[Layer]:
    """A layer for each of the model's (``config`` resolved), with no token in it."""
    if config.attention == "linear":
        heads = (batch, config.n_kv_head, config.head_dim)
        return [
            LinearState.empty(*heads, dtype=dtype, device=device) for _ in range(config.n_layer)
        ]
    layers = []
    for layer in range(config.n_layer):
        own = local_slots(config, layer, slots)
        layers.append(
            KVLayer.empty(
                *(batch, config.n_kv_head, own.capacity, config.head_dim),
                dtype=torch.int8 if int8 else dtype,
                window=own.window,
                sink_tokens=own.sink_tokens,
                device=device,
            )
        )
    return layers


def device_of(layer: Layer) -> torch.device:
    return (layer.numerator if isinstance(layer, LinearState) else layer.keys).device


def copied(layer: Layer, n: int) -> Layer:
    """With each sequence ``n`` times, one after the other, in storage of its own."""

    def repeated(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(n, 0)

    if isinstance(layer, LinearState):
        return LinearState(repeated(layer.numerator), repeated(layer.denominator))
    return replace(
        layer,
        keys=repeated(layer.keys),
        values=repeated(layer.values),
        key_scales=repeated(layer.key_scales),
        value_scales=repeated(layer.value_scales),
        lengths=repeated(layer.lengths),
        tickets=layer.tickets.new_zeros(n * layer.tickets.numel()),
    )


def forget(layer: Layer) -> None:
    """Slots may keep what they hold, which nobody sees; sums begin anew."""
    if isinstance(layer, kernels.LinearState):
        layer.numerator.zero_()
        layer.denominator.zero_()
