"""What transformers' masks say, in a form that attention kernels take. Loaded by ``register``.

transformers describes a mask by a function of (query, key) and a padding mask. Where the function
is one that we know, causal or a causal window, over all keys or within packed sequences, and where
padding lies around one run of tokens a row, no (T, T) matrix is needed; any other mask is the
boolean one of transformers' own sdpa.

The padding's own outputs are as if it were sequences of its own (in sdpa it sees real keys too);
nothing that is attended to depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils as theirs


class Visible(NamedTuple):
    """Which keys a query of causal attention sees, aligned at the bottom right.

    transformers hands a mask on to its layers untouched only if it is a tensor of four dimensions,
    and to read a tensor's values waits for the GPU: so this one is said in the shape of a tensor.
    Its dtype, int32, tells it from masks, which are boolean or floating.

    Attributes:
        keys: how many there are; what a static cache holds beyond is not there yet.
        window: how many keys a query sees, its own being the last; None: all up to its own.
        cu_seqlens: (n + 1,) int32, where each sequence starts in all rows laid end to end; then
            there are as many queries as keys. None: each row is one.
    """

    keys: int
    window: int | None = None
    cu_seqlens: Tensor | None = None

    def as_tensor(self, device: torch.device | str) -> Tensor:
        """(1, keys, 0, window), or (1, 1 + window, 1, n + 1) that repeats cu_seqlens in place."""
        window = self.window or 0
        if self.cu_seqlens is None:
            return torch.empty(1, self.keys, 0, window, dtype=torch.int32, device=device)
        return self.cu_seqlens.expand(1, 1 + window, 1, -1)

    @classmethod
    def of_tensor(cls, mask: Tensor, queries: int) -> Visible | None:
        """What ``as_tensor`` made, or None for any other mask."""
        if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[0] != 1:
            return None
        if mask.shape[2] == 0:
            return cls(mask.shape[1], mask.shape[3] or None)
        if mask.shape[2] == 1:
            return cls(queries, mask.shape[1] - 1 or None, mask[0, 0, 0])
        return None


class Pattern(NamedTuple):
    """What a mask function is known to say; ``packed`` (B, T) numbers the sequences of a row."""

    window: int | None = None
    packed: Tensor | None = None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = theirs.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config=None,
    device: torch.device | str = "cpu",
    **options,
) -> Tensor | None:
    """The mask of our attention, as ``AttentionMaskInterface`` asks for it.

    Args:
        batch_size, q_length, kv_length: B, Tq, Tk.
        q_offset, kv_offset: the places of the first query and of the first key; a static cache
            gives q_offset as a tensor.
        mask_function: of a batch, a head, a query's place and a key's; True: it is seen.
        attention_mask: (B, at most Tk + kv_offset) booleans, False at padding.
        local_size: what a window or a chunk holds.
        allow_is_causal_skip: False where the caller wants the whole matrix (or packs sequences).
        config, device, options: as of transformers' ``sdpa_mask``.

    Returns:
        None: causal over all keys, bottom-right (or, of a bidirectional mask, everything is seen);
        an int32 tensor: see ``Visible``; a boolean one: (B, 1, Tq, Tk).
    """

    def whole() -> Tensor | None:
        return theirs.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            config=config,
            device=device,
            **options,
        )

    tracing = theirs.is_tracing(attention_mask)
    if tracing and (attention_mask is not None or isinstance(q_offset, Tensor)):
        return whole()  # their values are not there
    if tracing:
        chunked = getattr(config, "attention_chunk_size", None) is not None
        pattern = _traced(mask_function, None if chunked else local_size)
    else:
        pattern = _pattern(mask_function)
    if pattern is None or (pattern.packed is None and not allow_is_causal_skip):
        return whole()
    seen = int(q_offset) + q_length - kv_offset  # by the last query
    if not q_length <= seen <= kv_length:
        return whole()
    cu_seqlens = None if pattern.packed is None else _borders_of_packed(pattern.packed)
    if attention_mask is not None:
        padding_mask = theirs.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        real = padding_mask[:, kv_offset : kv_offset + seen]
        begins = real[:, 1:] & ~real[:, :-1]
        runs = real[:, 0] + begins.sum(1)
        on_the_right, one_run = torch.stack([~begins.any(), (runs <= 1).all()]).tolist()
        # Padding on the right comes after all that is real, which so does not see it anyway.
        if not on_the_right:
            if not one_run or seen != q_length:
                return whole()
            cu_seqlens = _borders_of_padding(real)
    window = pattern.window if pattern.window is not None and pattern.window < seen else None
    if cu_seqlens is None and window is None and seen == kv_length:
        return None
    return Visible(seen, window, cu_seqlens).as_tensor(device)


# --- the mask functions that we know -----------------------------------------------------------------
# Functions of one factory share their code object; what they were made with is in their closures.

_AND = theirs.and_masks().__code__
_WINDOW = theirs.sliding_window_overlay(1).__code__
_PACKED = theirs.packed_sequence_mask_function(None).__code__
_REMAPPED = theirs.remap_positions_for_packed_sequence(None, None).__code__


def _enclosed(function: Callable, name: str):
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _pattern(function: Callable) -> Pattern | None:
    if function is theirs.causal_mask_function:
        return Pattern()
    if getattr(function, "__code__", None) is not _AND:
        return None
    parts = _enclosed(function, "mask_functions")
    codes = [getattr(part, "__code__", None) for part in parts]
    if codes == [_WINDOW, theirs.causal_mask_function.__code__]:
        return Pattern(window=_enclosed(parts[0], "sliding_window"))
    if codes == [_PACKED, _REMAPPED]:
        # Within a sequence positions go up by one, so that distances are those of places.
        inner = _pattern(_enclosed(parts[1], "mask_function"))
        if inner is not None and inner.packed is None:
            return inner._replace(packed=_enclosed(parts[0], "packed_sequence_mask"))
    return None


def _traced(function: Callable, local_size: int | None) -> Pattern | None:
    """The same while torch.compile traces, which has no closures; sequences are not told apart.

    Args:
        function: of a caller who allows ``is_causal`` in its place: causal, window or chunk.
        local_size: of the window; None where it may be that of a chunk.
    """
    if function is theirs.causal_mask_function:
        return Pattern()
    if local_size is not None and function.__code__ is _AND:
        return Pattern(window=local_size)
    return None


# --- sequences in rows laid end to end ---------------------------------------------------------------


def _borders_of_packed(numbers: Tensor) -> Tensor:
    """(B, T) numbers of sequences → cu_seqlens (B·T + 1,): the end is repeated, so nothing waits."""
    B, T = numbers.shape
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    places = torch.arange(B * T + 1, dtype=torch.int32, device=numbers.device)
    end = torch.full_like(places, B * T)
    end[:-1] = torch.where(starts.flatten(), places[:-1], end[:-1])
    return end.sort().values


def _borders_of_padding(real: Tensor) -> Tensor:
    """(B, T), at most one run of True a row → cu_seqlens (2·B + 1,): before it, and from it on."""
    B, T = real.shape
    rows = torch.arange(B, device=real.device) * T
    borders = torch.stack([rows, rows + real.int().argmax(1)], dim=1)
    return torch.cat([borders.flatten(), rows.new_tensor([B * T])]).int()
