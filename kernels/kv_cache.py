"""The keys and values of earlier tokens, kept: appending new ones, and attention over all of them.

A cache of one layer has C slots for each sequence and key head. Token p of a sequence is kept in
slot p as long as p < S, the number of sink tokens, and in slot S + (p − S) mod (C − S) otherwise:
the first S tokens stay for ever, the others take the place of those C − S before them.

         sinks    ring
    slot 0 1 2 3  4  5  6  7  8  9         S = 4, C = 10, after 15 tokens
    token 0 1 2 3 10 11 12 13 14 9

With a window of W tokens, the query at position t sees the sinks and the last W − S positions; it
sees all positions as long as they are no more than W. Distances are those inside the cache, as if
the sinks stood right before the window (StreamingLLM):

    t − p             to the key of a position p ≥ S
    min(t, W − 1) − p to a sink p < S

so no distance is ever longer than W − 1. Keys are stored rotated by their own positions, and a query
comes in two copies, rotated by t and by min(t, W − 1): nothing is rotated again when it is read.

Stored as int8, a key (or value) x of one token and head becomes round(x / s) with s = max |x| / 127
in float32, x being the rotated key before it is rounded to 16 bits: no element is off by more than
s / 2. A key whose elements are not all finite has a scale that is not either, so that what is wrong
shows.

Sources: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453;
keys split among blocks, Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from almostgpt.errors import UserError
from almostgpt.kernels import kv_cache_cpu
from almostgpt.kernels.attention_options import (
    check_scores,
    empty_heads_like,
    refuse_heads,
    refuse_scores,
)
from almostgpt.kernels.autocast import autocast_dtype
from almostgpt.kernels.cpu import cpu_kernel
from almostgpt.kernels.csrc import csrc_kernels, define
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.kv_cache_reference import Options, append, decode, decode_slots
from almostgpt.kernels.kv_layer import KVLayer, check_lengths, check_queries

MAX_QUERIES = 16  # tokens of a sequence that one decode_attention takes


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: KVLayer,
    *,
    new_lengths: Tensor | None = None,
    turns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Store the keys and values of new tokens, rotated where the model rotates, in one launch.

    Under autocast q, k and v are taken in the dtype of the slots, or of int8 ones in autocast's.

    Args:
        q: (B, H, T, D), of tokens ``layer.lengths`` … of each sequence; any strides.
        k, v: (B, Hkv, T, D) in q's dtype. ``layer`` stores that dtype, or int8.
        layer: has room for T tokens beside its sinks.
        new_lengths: (B,) int32: of a sequence only so many of the T are there; None: all.
        turns: (R/2,) int64 of ``kernels.rope.turns_of``, R ≤ D: what pairs of q and k turn by for
            each position (see ``kernels.rope``); None: they are left as they are.

    Returns:
        (q, q_sink): for ``decode_attention``, rotated by each query's position and by the position
        that it has for the sinks. They are one tensor where there is no difference.

    Raises:
        UserError: shapes, dtypes or devices that do not fit together, no room, or a gradient asked
            for: what is stored has none.
    """
    options = {"new_lengths": new_lengths, "turns": turns}
    if (dtype := _autocast_dtype(q, layer)) is None:
        return KV_APPEND(q, k, v, layer, **options)
    with torch.autocast(q.device.type, enabled=False):
        return KV_APPEND(q.to(dtype), k.to(dtype), v.to(dtype), layer, **options)


def decode_attention(
    q: Tensor,
    layer: KVLayer,
    *,
    q_sink: Tensor | None = None,
    new_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens over its cache, theirs already appended.

    Under autocast q is taken as ``kv_append`` takes it.

    Args:
        q: (B, H, T, D) with T from 1 to ``MAX_QUERIES``: of tokens ``layer.lengths`` …; any strides.
        layer: as it was given to ``kv_append`` with these tokens. With a window of W, C ≥ W + T − 1:
            the last of the new tokens must not have taken a slot that the first one sees.
        q_sink: like q, what scores the sink tokens; None: q itself.
        new_lengths: as of ``kv_append``; the other queries give zeros.
        scale, softcap, alibi_slopes, sink_logits: as of ``flash_attention``.

    Returns:
        (B, H, T, D) in q's dtype.

    Raises:
        UserError: shapes, dtypes, devices or options that do not fit together, or a gradient asked
            for, which this op does not have.
    """
    options = {
        "new_lengths": new_lengths,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sink_logits": sink_logits,
    }
    if (dtype := _autocast_dtype(q, layer)) is None:
        return DECODE_ATTENTION(q, layer, q_sink=q_sink, **options)
    same, q = q_sink is None or q_sink is q, q.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        return DECODE_ATTENTION(q, layer, q_sink=q if same else q_sink.to(dtype), **options)


def _autocast_dtype(q: Tensor, layer: KVLayer) -> torch.dtype | None:
    """What q is to be cast to: the dtype of the slots, of int8 ones autocast's; None without autocast.

    Without it tensors stay as they are, and a dtype that does not fit is an error.
    """
    if not isinstance(q, Tensor) or (dtype := autocast_dtype(q)) is None:
        return None
    stored = layer.keys.dtype
    return dtype if stored == torch.int8 else stored


# --- checks --------------------------------------------------------------------------------------


def _check_append(q, k, v, layer, *, new_lengths=None, turns=None) -> None:
    name = "kv_append"
    check_queries(name, q, layer)
    if (
        k.shape != v.shape
        or k.dim() != 4
        or k.shape[::2] != q.shape[::2]
        or k.shape[3] != q.shape[3]
    ):
        raise UserError(
            f"{name}: k and v must be (B, Hkv, T, D) like q, not {tuple(k.shape)} and "
            f"{tuple(v.shape)} for q of {tuple(q.shape)}"
        )
    if k.shape[1] != layer.keys.shape[1]:
        raise UserError(f"{name}: {k.shape[1]} key heads for a cache of {layer.keys.shape[1]}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise UserError(
            f"{name}: q, k and v must have one dtype and device, not {q.dtype} on {q.device}, "
            f"{k.dtype} on {k.device} and {v.dtype} on {v.device}"
        )
    T, room = q.shape[2], layer.capacity - layer.sink_tokens
    if T > room:
        raise UserError(f"{name}: {T} tokens at once do not fit into {room} slots")
    if turns is not None and (
        turns.dim() != 1 or turns.dtype != torch.int64 or 2 * turns.shape[0] > q.shape[3]
    ):
        raise UserError(
            f"{name}: turns must be int64 and (R/2,) with R at most {q.shape[3]}, not {turns.dtype} "
            f"and {tuple(turns.shape)}"
        )
    check_lengths(name, q, layer, new_lengths, {"turns": turns})
    _refuse_gradients(name, q, k, v)


def _check_decode(q, layer, *, q_sink=None, new_lengths=None, **options) -> None:
    name = "decode_attention"
    check_queries(name, q, layer)
    H, T = q.shape[1:3]
    if not 1 <= T <= MAX_QUERIES:
        raise UserError(
            f"{name}: 1 to {MAX_QUERIES} tokens at once, not {T}; more go through flash_attention, "
            "or in parts"
        )
    if q_sink is not None and (q_sink.shape, q_sink.dtype, q_sink.device) != (
        *(q.shape, q.dtype, q.device),
    ):
        raise UserError(f"{name}: q_sink must be like q, not {tuple(q_sink.shape)} {q_sink.dtype}")
    if layer.window is not None and layer.capacity < layer.window + T - 1:
        raise UserError(
            f"{name}: {T} tokens at once with a window of {layer.window} need "
            f"{layer.window + T - 1} slots, and the cache has {layer.capacity}"
        )
    chosen = Options(**options)
    check_scores(name, q, chosen)
    check_lengths(name, q, layer, new_lengths, {})
    _refuse_gradients(name, q, q_sink, chosen.alibi_slopes, chosen.sink_logits)


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise UserError(
            f"{name}: a cache is for inference, and here a gradient is asked for: call it under "
            "torch.no_grad(), or run without a cache"
        )


# --- torch.ops.almostgpt.* and torch.ops.almostgpt_emulator.* ------------------------------------
# D is that of the slots. ``sink_position``: W − 1, or −1 where q needs no second copy. Outputs that
# nobody needs are empty.


def _append_cpu(
    q, k, v, keys, values, key_scales, value_scales, lengths, new_lengths, turns, sinks, at
):
    window = None if at < 0 else at + 1
    layer = KVLayer(keys, values, lengths, key_scales, value_scales, window, sinks)
    out, out_sink = append(q, k, v, layer, new_lengths, turns)
    return _append_outputs(out, out_sink, turns, at, _in_memory)


def _append_fake(q, k, v, keys, values, ks, vs, lengths, new_lengths, turns, sinks, at):
    return _append_outputs(q, q, turns, at, empty_heads_like)


def _append_outputs(q, q_sink, turns, at, make):
    nothing = q.new_empty(0)
    if turns is None:
        return nothing, nothing.clone()
    return make(q), make(q_sink) if at >= 0 else nothing


def _decode_cpu(
    q, q_sink, keys, values, key_scales, value_scales, lengths, new_lengths, slopes, sink,
    tickets, window, sink_tokens, scale, softcap
):  # fmt: skip
    layer = KVLayer(keys, values, lengths, key_scales, value_scales, window, sink_tokens)
    q_sink = q if q_sink is None else q_sink
    options = Options(scale, softcap, slopes, sink)
    return _in_memory(decode_slots(q, q_sink, layer, new_lengths, options))


def _decode_fake(q, *_):
    return empty_heads_like(q)


def _in_memory(x: Tensor) -> Tensor:
    return empty_heads_like(x).copy_(x)


define(
    "kv_append",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? key_scales, "
    "Tensor(d!)? value_scales, Tensor lengths, Tensor? new_lengths, Tensor? turns, int sink_tokens, "
    "int sink_position) -> (Tensor q_out, Tensor q_sink)",
    fake=_append_fake,
    cpu=_append_cpu,
)
define(
    "decode_attention",
    "(Tensor q, Tensor? q_sink, Tensor keys, Tensor values, Tensor? key_scales, "
    "Tensor? value_scales, Tensor lengths, Tensor? new_lengths, Tensor? alibi_slopes, "
    "Tensor? sink_logits, Tensor(a!) tickets, int window, int sink_tokens, float scale, "
    "float softcap) -> Tensor",
    fake=_decode_fake,
    cpu=_decode_cpu,
)


# --- kernels -------------------------------------------------------------------------------------


def _widened(layer: KVLayer, *tensors: Tensor) -> list[Tensor]:
    """With columns of zeros up to the width of a slot: the same scores, and zeros in out."""
    missing = layer.keys.shape[3] - tensors[0].shape[3]
    return list(tensors) if missing == 0 else [pad(t, (0, missing)) for t in tensors]


def _append_csrc(ops, q, k, v, layer: KVLayer, *, new_lengths=None, turns=None):
    D = q.shape[3]
    if turns is not None and turns.shape[0] == 0:
        turns = None  # of no dimension
    two = turns is not None and layer.window is not None and layer.sink_tokens > 0
    wide_q, wide_k, wide_v = _widened(layer, q, k, v)
    rotated, rotated_sink = ops.kv_append(
        *(wide_q, wide_k, wide_v, layer.keys, layer.values, layer.key_scales, layer.value_scales),
        *(layer.lengths, new_lengths, turns, layer.sink_tokens, layer.reach - 1 if two else -1),
    )
    if turns is None:
        return q, q
    rotated = rotated[..., :D]
    return rotated, rotated_sink[..., :D] if two else rotated


def _decode_csrc(ops, q, layer: KVLayer, *, q_sink=None, new_lengths=None, **options):
    chosen, D = Options(**options), q.shape[3]
    if q_sink is q or layer.sink_tokens == 0:
        q_sink = None
    wide = _widened(layer, q) if q_sink is None else _widened(layer, q, q_sink)
    tickets = layer.tickets
    needed = (
        q.shape[0] * layer.keys.shape[1] * -(-q.shape[1] * q.shape[2] // (layer.keys.shape[1] * 16))
    )
    if tickets is None or tickets.numel() < needed:
        tickets = layer.lengths.new_zeros(needed)
    out = ops.decode_attention(
        *(wide[0], None if q_sink is None else wide[1]),
        *(layer.keys, layer.values, layer.key_scales, layer.value_scales),
        *(layer.lengths, new_lengths),
        *(None if t is None else t.float() for t in (chosen.alibi_slopes, chosen.sink_logits)),
        *(tickets, layer.reach, layer.sink_tokens),
        *(float(chosen.scale_for(q)), float(chosen.softcap)),
    )
    return out[..., :D]


def _append_reference(q, k, v, layer: KVLayer, *, new_lengths=None, turns=None):
    with torch.no_grad():
        return append(q, k, v, layer, new_lengths, turns)


def _decode_reference(q, layer: KVLayer, *, q_sink=None, new_lengths=None, **options):
    return decode(q, q if q_sink is None else q_sink, layer, new_lengths, Options(**options))


def _refuse_append(card, q, *args, **kwargs) -> str | None:
    return refuse_heads(q)


def _refuse_decode(card, q, layer, *, q_sink=None, new_lengths=None, **options) -> str | None:
    scale, softcap, *_ = Options(**options)
    return refuse_heads(q) or refuse_scores(scale, softcap)


KV_APPEND = Op(
    "kv_append",
    _check_append,
    (
        *csrc_kernels("kv_append", _refuse_append, _append_csrc),
        cpu_kernel("kv_append", kv_cache_cpu.refuse_append, kv_cache_cpu.run_append),
        Kernel("reference", "plain PyTorch", lambda *a, **k: None, _append_reference),
    ),
)
DECODE_ATTENTION = Op(
    "decode_attention",
    _check_decode,
    (
        *csrc_kernels("decode_attention_sm80", _refuse_decode, _decode_csrc),
        cpu_kernel("decode_attention", kv_cache_cpu.refuse_decode, kv_cache_cpu.run_decode),
        Kernel("reference", "plain PyTorch", lambda *a, **k: None, _decode_reference),
    ),
)
