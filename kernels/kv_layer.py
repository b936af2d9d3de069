"""One layer's slots of a cache: which tensors they are, and what fits them. See kv_cache.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.kernels.flash_attention_reference import has_values

MAX_POSITION = 2**30  # beyond it 32 bits could overflow
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ALIGNED = 16  # the width of a slot is a multiple of so many elements: whole vectors, also of int8


@dataclass(frozen=True)
class KVLayer:
    """One layer's slots, and how many tokens each sequence has had.

    ``KVLayer.empty`` makes one. The ops write into its tensors, and never into ``lengths``.

    Attributes:
        keys, values: (B, Hkv, C, D') in a floating dtype or int8, D' the head width D rounded up to
            a multiple of 16; what is beyond D is zeros.
        lengths: (B,) int32, tokens before those of the call.
        key_scales, value_scales: (B, Hkv, C) float32, with int8 only.
        window: W, of how many tokens a query sees the keys at most; None: of all, and there must be
            no more of them than slots.
        sink_tokens: S, below W; 0 without a window.
        tickets: int32 zeros that blocks of the kernel count with, and leave zeros; None: made anew.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    window: int | None = None
    sink_tokens: int = 0
    tickets: Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        sink_tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> KVLayer:
        """Slots for ``capacity`` tokens, none of them taken; int8 stores in 8 bits."""
        width = -(-head_dim // _ALIGNED) * _ALIGNED
        slots = (batch, kv_heads, capacity)
        scaled = dtype == torch.int8
        # Made under inference_mode, they could not be written into outside of it.
        with torch.inference_mode(False):
            return cls(
                torch.zeros(*slots, width, dtype=dtype, device=device),
                torch.zeros(*slots, width, dtype=dtype, device=device),
                torch.zeros(batch, dtype=torch.int32, device=device),
                torch.zeros(slots, device=device) if scaled else None,
                torch.zeros(slots, device=device) if scaled else None,
                window,
                sink_tokens,
                torch.zeros(batch * kv_heads * _MAX_ROW_BLOCKS, dtype=torch.int32, device=device),
            )

    @property
    def capacity(self) -> int:
        """C, slots of a sequence."""
        return self.keys.shape[2]

    @property
    def reach(self) -> int:
        """W, or where there is no window the capacity, which then is as good."""
        return self.capacity if self.window is None else self.window


_MAX_ROW_BLOCKS = 8  # of 16 query rows of a key head; for more, tickets are made at every call


# --- checks --------------------------------------------------------------------------------------


def check_queries(name: str, q: Tensor, layer: KVLayer) -> None:
    if not isinstance(layer, KVLayer):
        raise UserError(f"{name}: layer must be a KVLayer, not {type(layer).__name__}")
    keys, values = layer.keys, layer.values
    if keys.dim() != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise UserError(
            f"{name}: keys and values of the cache must be two (B, Hkv, C, D') of one dtype, not "
            f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}"
        )
    if q.dim() != 4 or q.dtype not in _DTYPES:
        raise UserError(
            f"{name}: q must be (B, H, T, D) of a floating dtype of 16 bits or more, not "
            f"{tuple(q.shape)} {q.dtype}"
        )
    B, H, _, D = q.shape
    if keys.shape[0] != B or keys.shape[1] == 0 or H % keys.shape[1] != 0:
        raise UserError(
            f"{name}: q of {tuple(q.shape)} does not fit a cache of {tuple(keys.shape)}: one batch "
            "size, and query heads in a whole ratio to key heads"
        )
    if keys.shape[3] != -(-D // _ALIGNED) * _ALIGNED:
        raise UserError(
            f"{name}: heads {D} wide take slots of {-(-D // _ALIGNED) * _ALIGNED}, not of "
            f"{keys.shape[3]}"
        )
    scales = (layer.key_scales, layer.value_scales)
    if keys.dtype == torch.int8:
        if any(s is None or s.shape != keys.shape[:3] or s.dtype != torch.float32 for s in scales):
            raise UserError(
                f"{name}: an int8 cache needs scales of {tuple(keys.shape[:3])} float32"
            )
    elif keys.dtype != q.dtype:
        raise UserError(f"{name}: q is {q.dtype}, but the cache stores {keys.dtype}")
    S, window = layer.sink_tokens, layer.window
    if window is None:
        if S != 0:
            raise UserError(f"{name}: sink_tokens are for a window, and there is none")
    elif not (isinstance(window, int) and 0 <= S < window <= layer.capacity):
        raise UserError(
            f"{name}: a window of {window} tokens, {S} of them sinks, does not fit into "
            f"{layer.capacity} slots: 0 ≤ sink_tokens < window ≤ slots"
        )


def check_lengths(name: str, q, layer: KVLayer, new_lengths, others: dict) -> None:
    B, _, T, _ = q.shape
    for key, tensor in {"lengths": layer.lengths, "new_lengths": new_lengths}.items():
        if tensor is not None and (tensor.shape != (B,) or tensor.dtype != torch.int32):
            raise UserError(
                f"{name}: {key} must be int32 and ({B},), not {tensor.dtype} and "
                f"{tuple(tensor.shape)}"
            )
    parts = {
        "the cache": layer.keys,
        "its values": layer.values,
        "its keys' scales": layer.key_scales,
        "its values' scales": layer.value_scales,
        "lengths": layer.lengths,
        "new_lengths": new_lengths,
        **others,
    }
    for key, tensor in parts.items():
        if tensor is not None and tensor.device != q.device:
            raise UserError(f"{name}: q is on {q.device}, and {key} on {tensor.device}")
    # On a GPU looking would cost a sync: the kernels keep to the cache's memory whatever the values.
    if B == 0 or q.device.type != "cpu" or not has_values(layer.lengths):
        return
    lengths = layer.lengths.tolist()  # of a few numbers faster than two reductions
    new = [T] * B
    if new_lengths is not None and has_values(new_lengths):
        new = new_lengths.tolist()
        if min(new) < 0 or max(new) > T:
            raise UserError(f"{name}: new_lengths must be within 0 … {T}, not {new}")
    most = layer.capacity if layer.window is None else MAX_POSITION
    for length, more in zip(lengths, new, strict=True):
        if length < 0 or length + more > most:
            raise UserError(
                f"{name}: {more} more tokens after {length} are not within the {most} that the "
                f"cache {'has slots for' if layer.window is None else 'can count'}"
            )
