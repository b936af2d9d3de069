"""kv_append and decode_attention in C++ for a processor: float32, with slots of float32 or int8.

A token has little to compute, and in plain PyTorch takes 10 or 20 ops of some microseconds each; here one
for each of the two. Work is divided by tokens, and by key heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from almostgpt.kernels import cpu
from almostgpt.kernels.attention_options import empty_heads_like
from almostgpt.kernels.kv_cache_reference import Options
from almostgpt.kernels.kv_layer import KVLayer


def _append_fake(q, k, v, keys, values, ks, vs, lengths, new_lengths, turns, sinks, reach, two):
    nothing = q.new_empty(0)
    if turns is None:
        return nothing, nothing.clone()
    return q.new_empty(q.shape), q.new_empty(q.shape) if two else nothing


def _decode_fake(q, *_):
    return empty_heads_like(q)


cpu.define(
    "cpu_kv_append",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? key_scales, "
    "Tensor(d!)? value_scales, Tensor lengths, Tensor? new_lengths, Tensor? turns, int sink_tokens, "
    "int reach, bool two, int instruction_set) -> (Tensor q_out, Tensor q_sink)",
    fake=_append_fake,
)
cpu.define(
    "cpu_decode_attention",
    "(Tensor q, Tensor? q_sink, Tensor keys, Tensor values, Tensor? key_scales, "
    "Tensor? value_scales, Tensor lengths, Tensor? new_lengths, Tensor? alibi_slopes, "
    "Tensor? sink_logits, int reach, int sink_tokens, float scale, float softcap, "
    "int instruction_set) -> Tensor",
    fake=_decode_fake,
)


def run_append(q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, *, new_lengths=None, turns=None):
    """``kv_append``; of its arguments, which are known to be right."""
    if turns is not None and turns.shape[0] == 0:
        turns = None  # of no dimension
    two = turns is not None and layer.window is not None and layer.sink_tokens > 0
    rotated, rotated_sink = torch.ops.almostgpt.cpu_kv_append.default(
        *(q, k, v, layer.keys, layer.values, layer.key_scales, layer.value_scales),
        *(layer.lengths, new_lengths, turns, layer.sink_tokens, layer.reach, two, cpu.BEST),
    )
    if turns is None:
        return q, q
    return rotated, rotated_sink if two else rotated


def run_decode(q: Tensor, layer: KVLayer, *, q_sink=None, new_lengths=None, **options):
    """``decode_attention``; of its arguments, which are known to be right."""
    chosen, D = Options(**options), q.shape[3]
    missing = layer.keys.shape[3] - D
    if q_sink is q or layer.sink_tokens == 0:
        q_sink = None
    scale = chosen.scale_for(q)
    if missing:
        q, q_sink = pad(q, (0, missing)), None if q_sink is None else pad(q_sink, (0, missing))
    slopes, sinks = chosen.alibi_slopes, chosen.sink_logits
    out = torch.ops.almostgpt.cpu_decode_attention.default(
        *(q, q_sink, layer.keys, layer.values, layer.key_scales, layer.value_scales),
        *(layer.lengths, new_lengths),
        *(None if t is None else t.float().contiguous() for t in (slopes, sinks)),
        *(layer.reach, layer.sink_tokens, float(scale), float(chosen.softcap), cpu.BEST),
    )
    return out[..., :D] if missing else out


def refuse_append(q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, *, new_lengths=None, turns=None):
    """Why the kernel cannot serve, or None."""
    return _refuse(q, layer, new_lengths, turns)


def refuse_decode(q: Tensor, layer: KVLayer, *, q_sink=None, new_lengths=None, **options):
    """Why the kernel cannot serve, or None."""
    scale, softcap, *_ = Options(**options)
    if 0 < softcap < 1e-30 or (scale is not None and scale > 1e30):
        return "the C++ kernels compute in float32: softcaps below 1e-30 and scales above 1e30 leave it"
    return _refuse(q, layer, new_lengths, None)


def _refuse(q: Tensor, layer: KVLayer, new_lengths, turns) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile makes more of plain PyTorch"
    if q.dtype != torch.float32:
        return f"the C++ kernels of the cache compute in float32, not {q.dtype}"
    tensors = (layer.keys, layer.values, layer.key_scales, layer.value_scales, layer.lengths)
    if not all(t is None or t.is_contiguous() for t in (*tensors, new_lengths, turns)):
        return "the C++ kernels of the cache take contiguous slots"
    return None
