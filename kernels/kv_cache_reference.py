"""The cache in plain PyTorch: what runs where no kernel does, and the maths of the ops on a CPU.

Where the tokens of all sequences lie in order and every query sees all before it, as they do in a
cache that is not full, a part of it is cut out and handed to attention as it is. Otherwise each slot
is asked which token it holds: nothing then depends on a value on the host, whatever the lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from almostgpt.kernels.flash_attention_reference import grouped_matmul, has_values, reference
from almostgpt.kernels.rope import angles_at, rotated

if TYPE_CHECKING:
    from almostgpt.kernels.kv_layer import KVLayer


class Options(NamedTuple):
    """What ``decode_attention`` takes that makes a score; see there."""

    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sink_logits: Tensor | None = None

    def scale_for(self, q: Tensor) -> float:
        """The factor on q · k."""
        return q.shape[3] ** -0.5 if self.scale is None else self.scale


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: KVLayer,
    new_lengths: Tensor | None,
    turns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``kv_append``; of its arguments, which are known to be right."""
    T = q.shape[2]
    positions = layer.lengths.long()[:, None] + torch.arange(T, device=q.device)  # (B, T)
    start = _common_length(layer) if new_lengths is None else None
    q_sink = q
    if turns is not None:
        unrotated, heads = q, [q.shape[1], k.shape[1]]
        qk = torch.cat([q, k], dim=1)
        if layer.key_scales is not None:  # int8 is made of what 16 bits have not rounded
            qk = qk.to(torch.promote_types(qk.dtype, torch.float32))
        q, k = _rotated(qk, positions, turns).split(heads, dim=1)
        q = q.to(unrotated.dtype)
        q_sink = q
        near = start is not None and start + T <= layer.reach  # all queries stand near the sinks
        if layer.sink_tokens > 0 and not near:
            q_sink = _rotated(unrotated, positions.clamp(max=layer.reach - 1), turns)
    if start is not None and start + T <= layer.capacity:
        there = slice(start, start + T)
    else:
        there = _slots(positions, layer)
    there_too = (
        None if new_lengths is None else torch.arange(T, device=q.device) < new_lengths[:, None]
    )
    for x, slots, scales in (
        (k, layer.keys, layer.key_scales),
        (v, layer.values, layer.value_scales),
    ):
        D = x.shape[3]
        if scales is not None:
            x, scale = quantized(x)
            _write(scales, there, there_too, scale)
        _write(slots[..., :D], there, there_too, x)
    return q, q_sink


def _rotated(x: Tensor, positions: Tensor, turns: Tensor) -> Tensor:
    """x (B, H, T, D) by the angles of positions (B, T)."""
    angles = angles_at(positions, turns)[:, :, None]
    y = rotated(x.transpose(1, 2), angles.cos().float(), angles.sin().float())
    return y.transpose(1, 2)


def _slots(positions: Tensor, layer: KVLayer) -> Tensor:
    S = layer.sink_tokens
    return torch.where(positions < S, positions, S + (positions - S) % (layer.capacity - S))


def _write(slots: Tensor, where: slice | Tensor, there: Tensor | None, x: Tensor) -> None:
    """x (B, Hkv, T, …) into slots (B, Hkv, C, …) at ``where``, a slice or (B, T), if ``there`` (B, T)."""
    if isinstance(where, slice):
        slots[:, :, where] = x
        return
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    x = x.transpose(1, 2)  # (B, T, Hkv, …): what two indices around a slice give
    if there is not None:
        there = there[(...,) + (None,) * (x.dim() - 2)]
        x = torch.where(there, x, slots[rows, :, where])
    slots[rows, :, where] = x


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(…, D) → int8 (…, D) and the float32 scale (…) of each row."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    codes = x / scale[..., None]
    # Not finite in a row of zeros, or in one that is not finite itself.
    codes = torch.where(codes.isfinite(), codes, 0.0)
    # Of a row of subnormal numbers the scale is rounded so much that codes could be beyond 127.
    return codes.clamp(-127, 127).round().to(torch.int8), scale


def dequantized(codes: Tensor, scale: Tensor | None, D: int, dtype: torch.dtype) -> Tensor:
    """(…, D') and the scales (…), or None → (…, D) in ``dtype``."""
    if scale is None:
        return codes[..., :D].to(dtype)
    return (codes[..., :D].to(scale.dtype) * scale[..., None]).to(dtype)


def _common_length(layer: KVLayer) -> int | None:
    """Of all sequences, where the host may look at it without waiting for a GPU."""
    if layer.lengths.device.type != "cpu" or not has_values(layer.lengths):
        return None
    lengths = layer.lengths.tolist()
    return lengths[0] if lengths and lengths.count(lengths[0]) == len(lengths) else None


def decode(
    q: Tensor,
    q_sink: Tensor,
    layer: KVLayer,
    new_lengths: Tensor | None,
    options: Options,
) -> Tensor:
    """``decode_attention``; of its arguments, which are known to be right."""
    start = _common_length(layer) if new_lengths is None else None
    one_query = q_sink is q or layer.sink_tokens == 0
    if one_query and start is not None and start + q.shape[2] <= layer.reach:
        k, v = in_order(layer, range(start + q.shape[2]), q)
        return reference(q, k, v, causal=True, **options._asdict())
    return decode_slots(q, q_sink, layer, new_lengths, options)


def in_order(layer: KVLayer, positions: range, q: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of these positions, none of which has lost its slot: (B, Hkv, positions, D).

    With sinks they must begin at 0 and end before the ring comes round.
    """

    def slots_of(stored: Tensor | None) -> Tensor | None:
        if stored is None or positions.stop <= layer.capacity:
            return None if stored is None else stored[:, :, positions.start : positions.stop]
        slots = torch.arange(positions.start, positions.stop, device=stored.device)
        return stored.index_select(2, slots % layer.capacity)

    sides = ((layer.keys, layer.key_scales), (layer.values, layer.value_scales))
    k, v = (
        dequantized(slots_of(stored), slots_of(scales), q.shape[3], q.dtype)
        for stored, scales in sides
    )
    return k, v


def decode_slots(
    q: Tensor,
    q_sink: Tensor,
    layer: KVLayer,
    new_lengths: Tensor | None,
    options: Options,
) -> Tensor:
    """The maths as it is written, over all slots, in float32 (float64 for float64)."""
    B, H, T, D = q.shape
    S, W, C = layer.sink_tokens, layer.reach, layer.capacity
    wide = torch.promote_types(q.dtype, torch.float32)
    k = dequantized(layer.keys, layer.key_scales, D, wide)
    v = dequantized(layer.values, layer.value_scales, D, wide)
    new = torch.full_like(layer.lengths, T) if new_lengths is None else new_lengths
    query = layer.lengths.long()[:, None] + torch.arange(T, device=q.device)  # (B, T) positions
    token = _tokens_of_slots(layer.lengths.long() + new, layer)  # (B, C) positions, −1: none
    t, p = query[:, :, None], token[:, None, :]  # (B, T, C) together
    sees = (p >= 0) & (p <= t) & ((p < S) | (p > t - (W - S)))
    sees &= (torch.arange(T, device=q.device) < new[:, None])[:, :, None]
    scores = grouped_matmul(q.to(wide), k.mT)
    if S > 0 and q_sink is not q:
        scores = torch.cat([grouped_matmul(q_sink.to(wide), k[:, :, :S].mT), scores[..., S:]], -1)
    scores = scores * options.scale_for(q)
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        distance = torch.where(p < S, t.clamp(max=W - 1), t) - p
        scores = scores - options.alibi_slopes.to(wide)[:, None, None] * distance[:, None].to(wide)
    sees = sees[:, None]
    scores = scores.masked_fill(~sees, -torch.inf)
    blind = ~sees.any(-1, keepdim=True)
    if options.sink_logits is not None:
        sink = options.sink_logits.to(wide)
        scores = torch.cat([scores, sink.view(1, H, 1, 1).expand(B, H, T, 1)], -1)
    weights = scores.masked_fill(blind, 0.0).softmax(-1)[..., :C].masked_fill(blind, 0.0)
    # A slot that nobody sees may hold anything.
    v = v.masked_fill(~sees.any(2)[..., None], 0.0)
    return grouped_matmul(weights, v).to(q.dtype)


def _tokens_of_slots(totals: Tensor, layer: KVLayer) -> Tensor:
    """(B,) tokens in all → (B, C), the position of the newest token of each slot, or −1."""
    S = layer.sink_tokens
    slot = torch.arange(layer.capacity, device=totals.device)
    last = totals[:, None] - 1
    newest = last - (last - slot) % (layer.capacity - S)
    newest = torch.where(slot < S, slot, newest)
    there = (newest <= last) & ((slot < S) | (newest >= S))
    return torch.where(there, newest, -1)
