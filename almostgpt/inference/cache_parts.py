"""A forward pass over a cache, cut into parts that the ops take at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from almostgpt.inference.cache_layers import Slots
from almostgpt.kernels.kv_cache import MAX_QUERIES


@dataclass(frozen=True)
class Part:
    """Tokens of a forward pass that go through the ops at once.

    Attributes:
        tokens: which ones of the pass.
        lengths: (B,) int32, tokens before them; None: those of the cache.
        new_lengths: as of ``kernels.kv_append``.
        keys: where flash_attention takes them, the positions of the keys that it reads, in order.
    """

    tokens: slice
    lengths: Tensor | None
    new_lengths: Tensor | None
    keys: range | None


def planned(slots: Slots, lengths: list[int], new: list[int], like: Tensor) -> list[Part]:
    """How the tokens go through the ops; what that takes on the device is made here, once.

    Args:
        slots: of the layers that this is for.
        lengths: of each row, tokens before.
        new: of each row, tokens to come.
        like: a tensor where the layers are.
    """
    length = max(lengths) if lengths else 0
    tokens = max(new) if new else 0
    # Compared one by one: hashed, they would be constants to torch.compile, and every token a graph.
    together = all(had == length for had in lengths)
    reach = slots.capacity if slots.window is None else slots.window
    # In order lie the keys from the first one on until the window moves on; and without sinks as
    # many as are left when the next ones are appended.
    by_flash = together and tokens > MAX_QUERIES
    ordered = reach - length if by_flash else 0
    by_window = by_flash and slots.sink_tokens == 0 and slots.at_once > MAX_QUERIES
    room = slots.capacity - slots.sink_tokens
    plan, numbers, start = [], [], 0
    while start < tokens:
        before = [had + start for had in lengths]  # means nothing where no more is there
        first = length + start  # the position of this part's first token, where all are together
        keys_from = 0
        if start < ordered:
            most, keys = min(ordered - start, room), True
        elif by_window:
            most, keys, keys_from = slots.at_once, True, first - slots.window + 1
        else:
            most, keys = MAX_QUERIES, False
        stop = min(tokens, start + min(most, room))
        if slots.window is None:  # a row that gets nothing more is nowhere beyond its slots
            before = [min(had, slots.capacity) for had in before]
        now = [min(max(more - start, 0), stop - start) for more in new]
        moved, padded = before != lengths, min(now) < stop - start
        seen = range(keys_from, length + stop) if keys else None
        plan.append((start, stop, seen, moved, padded))
        numbers += [before] * moved + [now] * padded
        start = stop
    tensors = iter(on_device(numbers, like))
    return [
        Part(
            slice(start, stop),
            next(tensors) if moved else None,
            next(tensors) if padded else None,
            seen,
        )
        for start, stop, seen, moved, padded in plan
    ]


def on_device(numbers: list[list[int]], like: Tensor) -> Sequence[Tensor]:
    """Each as a (B,) int32 tensor where ``like`` is, all of them in one transfer that nothing waits for."""
    if not numbers:
        return []
    tensor = torch.tensor(numbers, dtype=torch.int32)
    return tensor.to(like.device, non_blocking=True).unbind(0)
