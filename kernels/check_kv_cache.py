"""What ``info --check`` holds the cache's ops to: their definitions, and layers with something in them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from almostgpt.kernels.kv_layer import KVLayer


def held(layer: KVLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of all slots, (B, Hkv, C, D') each; of int8 what the codes stand for."""
    keys, values = (
        slots if scales is None else slots * scales[..., None]
        for slots, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales))
    )
    return keys, values


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(…, D) → codes and their scales (…), by float32."""
    x = x.float()
    scales = x.abs().amax(-1) / 127
    return (x / scales[..., None]).round().to(torch.int8), scales


def _slots(positions: Tensor, layer: KVLayer) -> Tensor:
    S = layer.sink_tokens
    return torch.where(positions < S, positions, S + (positions - S) % (layer.capacity - S))


def plain_kv_append(q, k, v, layer, *, turns):
    """``kv_append`` as it is defined, in the arithmetic of q: one sequence after the other."""
    frequencies = turns.cpu().double() * (2 * math.pi / 2**64)
    T, D = q.shape[2:]

    def rotated(x, positions):  # (heads, T, D) and (T,)
        angles = torch.outer(positions.double(), frequencies)
        cos, sin = (table.to(x.device, x.dtype) for table in (angles.cos(), angles.sin()))
        a, b, rest = x.split([len(frequencies)] * 2 + [D - 2 * len(frequencies)], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    out, out_sink = [], []
    for b, length in enumerate(layer.lengths.tolist()):
        positions = torch.arange(length, length + T)
        out.append(rotated(q[b], positions))
        out_sink.append(rotated(q[b], positions.clamp(max=layer.reach - 1)))
        where = _slots(positions, layer).to(q.device)
        for x, slots, scales in (
            (rotated(k[b], positions), layer.keys, layer.key_scales),
            (v[b], layer.values, layer.value_scales),
        ):
            if scales is not None:
                x, scales[b, :, where] = _int8(x)
            slots[b, :, where, :D] = x
    return torch.stack(out), torch.stack(out_sink)


def plain_decode_attention(q, layer, *, sink_logits=None):
    """``decode_attention`` likewise; the keys are in the order of their positions."""
    H, T, D = q.shape[1:]
    keys, values = (slots[..., :D].to(q.dtype) for slots in held(layer))
    S, window = layer.sink_tokens, layer.reach - layer.sink_tokens
    out = []
    for b, length in enumerate(layer.lengths.tolist()):
        query = torch.arange(length, length + T, device=q.device)[:, None]
        p = torch.arange(length + T, device=q.device)
        p = p[(p < S) | (p > length - window)]
        where = _slots(p, layer)
        k, v = (t[b, :, where].repeat_interleave(H // t.shape[1], 0) for t in (keys, values))
        sees = (p <= query) & ((p < S) | (p > query - window))
        scores = (q[b] @ k.mT / math.sqrt(D)).masked_fill(~sees, -math.inf)
        if sink_logits is not None:
            logits = sink_logits.to(q.dtype)[:, None, None].expand(H, T, 1)
            scores = torch.cat([scores, logits], dim=-1)
        out.append(scores.softmax(-1)[..., : len(p)] @ v)
    return torch.stack(out)


def layer_for(
    shape: tuple[int, ...], normal: Callable[..., Tensor], tokens: int, int8: bool, sinks: bool
) -> KVLayer:
    """Slots that are full with the last ``tokens`` of (B, H, keys, D), or with sinks a ring of them.

    ``normal(shape)`` draws what is in them. The sequences of a ring have had several times as many
    tokens as it takes, each another number.
    """
    B, H, keys, D = shape
    tensor = normal((0,))
    layer = KVLayer.empty(
        *(B, kv_heads(H), keys + (tokens - 1 if sinks else 0), D),
        dtype=torch.int8 if int8 else tensor.dtype,
        window=keys if sinks else None,
        sink_tokens=min(4, keys - 1) if sinks else 0,
        device=tensor.device,
    )
    layer.lengths.fill_(keys - tokens)
    if sinks:
        layer.lengths.add_(2 * keys + torch.arange(B, device=tensor.device))
    for slots, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales)):
        x = normal((*slots.shape[:3], D))
        if scales is not None:
            x, scales[:] = _int8(x)
        slots[..., :D] = x
    return layer


def kv_heads(heads: int) -> int:
    """Of so many query heads, up to four of which share a key head."""
    return heads // math.gcd(heads, 4)
