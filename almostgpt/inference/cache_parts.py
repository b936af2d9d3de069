"""A forward pass over a cache, cut into parts that the ops take at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from almostgpt.kernels.kv_cache import MAX_QUERIES
from almostgpt.kernels.kv_layer import KVLayer


@dataclass(frozen=True)
class Part:
    """Tokens of a forward pass that go through the ops at once.

    Attributes:
        tokens: which ones of the pass.
        lengths: (B,) int32, tokens before them; None: those of the cache.
        new_lengths: as of ``kernels.kv_append``.
        in_order: where flash_attention takes them, of how many tokens the keys lie in order then.
    """

    tokens: slice
    lengths: Tensor | None
    new_lengths: Tensor | None
    in_order: int | None


def planned(layer: KVLayer, lengths: list[int], new: list[int]) -> list[Part]:
    """How the tokens go through the ops; what that takes on the device is made here, once.

    Args:
        layer: any one of the cache.
        lengths: of each row, tokens before.
        new: of each row, tokens to come.
    """
    length = max(lengths) if lengths else 0
    tokens = max(new) if new else 0
    # Compared one by one: hashed, they would be constants to torch.compile, and every token a graph.
    together = all(had == length for had in lengths)
    ordered = layer.reach - length if together and tokens > MAX_QUERIES else 0
    plan, numbers, start = [], [], 0
    while start < tokens:
        before = [had + start for had in lengths]  # means nothing where no more is there
        most = MAX_QUERIES
        if start < ordered:
            most = min(ordered - start, layer.capacity - layer.sink_tokens)
        stop = min(tokens, start + min(most, layer.capacity - layer.sink_tokens))
        if layer.window is None:  # a row that gets nothing more is nowhere beyond its slots
            before = [min(had, layer.capacity) for had in before]
        now = [min(max(more - start, 0), stop - start) for more in new]
        moved, padded = before != lengths, min(now) < stop - start
        plan.append((start, stop, start < ordered, moved, padded))
        numbers += [before] * moved + [now] * padded
        start = stop
    tensors = iter(on_device(numbers, layer.lengths))
    return [
        Part(
            slice(start, stop),
            next(tensors) if moved else None,
            next(tensors) if padded else None,
            length + stop if in_order else None,
        )
        for start, stop, in_order, moved, padded in plan
    ]


def on_device(numbers: list[list[int]], like: Tensor) -> Sequence[Tensor]:
    """Each as a (B,) int32 tensor where ``like`` is, all of them in one transfer that nothing waits for."""
    if not numbers:
        return []
    tensor = torch.tensor(numbers, dtype=torch.int32)
    return tensor.to(like.device, non_blocking=True).unbind(0)
