#!/usr/bin/env python3
"""Write docs/backends.md: which kernel runs each op, by options, dtype and compute capability.

Every entry is the answer of ``kernels.explain`` for a call on tensors without data, so no GPU is
needed and the page cannot say what the code does not do.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from almostgpt import kernels
from almostgpt.kernels import BlockPattern, KVLayer, LinearState
from almostgpt.kernels.dispatch import BACKENDS, CARDS, Card, Explanation

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backends.md"
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
CPU = None  # the capability of no card
Place = Card | None

Call = tuple[tuple, dict]
Empty = Callable[..., Tensor]


def _rms_norm(x: Tensor, **options) -> Call:
    weight = options.pop("weight", x.new_empty(x.shape[-1]))
    return (x, weight), options


def _attention(empty: Empty, Tq=512, Tk=512, kv_heads=8, B=2, D=64, expand=0, **options) -> Call:
    k = empty(B, kv_heads, Tk, D)
    if expand:
        k = k.expand(B, expand, Tk, D)
    return (empty(B, 8, Tq, D), k, k), {"causal": True, **options}


def _rope(empty: Empty, D=64, R=None, **options) -> Call:
    """Queries and keys in the output of a fused projection."""
    qkv = empty(2, 512, 24, D)
    table = empty(1024, (R or D) // 2, dtype=torch.float32)
    positions = options.pop("positions", 0)
    return (qkv[:, :, :16], table, table, positions), options


def _cross_entropy(empty: Empty, V=1024) -> Call:
    return (empty(128, V), empty(128, dtype=torch.int64)), {}


def _linear_cross_entropy(empty: Empty, **options) -> Call:
    weight = options.pop("weight", empty(1024, 256))
    return (empty(128, 256), weight, empty(128, dtype=torch.int64)), options


def _layer(q: Tensor, int8: bool = False, **options) -> KVLayer:
    """Of 1024 slots and 2 key heads, for q (B, H, T, D)."""
    dtype = torch.int8 if int8 else q.dtype
    return KVLayer.empty(q.shape[0], 2, 1024, q.shape[3], dtype=dtype, device=q.device, **options)


def _append(empty: Empty, D=64, turned=True, new_lengths=None, **options) -> Call:
    q, k = empty(2, 8, 16, D), empty(2, 2, 16, D)
    turns = empty(D // 2, dtype=torch.int64) if turned else None
    return (q, k, k, _layer(q, **options)), {"turns": turns, "new_lengths": new_lengths}


def _decode(empty: Empty, T=1, H=8, D=64, layer=None, **options) -> Call:
    q = empty(2, H, T, D)
    return (q, _layer(q, **(layer or {}))), options


def _sample(empty: Empty, V=1024, **options) -> Call:
    rows = (empty(8, dtype=torch.int64),) * 3
    return (empty(8, V), *rows), options


def _int8_linear(empty: Empty, rows=1, K=1024, **options) -> Call:
    weight, scales = empty(4096, K, dtype=torch.int8), empty(4096, dtype=torch.float32)
    return (empty(rows, K), weight, scales), options


def _linear_attention(empty: Empty, T=512, state=False, documents=False) -> Call:
    q, k = empty(2, 8, T, 64), empty(2, 2, T, 64)
    options = {}
    if state:
        options["state"] = LinearState.empty(2, 2, 64, dtype=q.dtype, device=q.device)
    if documents:
        options["documents"] = empty(2, T, dtype=torch.int32)
    return (q, k, k), options


def _expert_linear(empty: Empty, width=256) -> Call:
    return (empty(128, width), empty(4, 512, width), empty(4, dtype=torch.int32)), {}


def _block_sparse(empty: Empty, T=512, **options) -> Call:
    k = empty(2, 2, 512, 64)
    pattern = BlockPattern(64, 2, 1, empty(8, 8, 2, dtype=torch.int32))
    return (empty(2, 8, T, 64), k, k, pattern), options


_SINKS = {"window": 512, "sink_tokens": 4}

# Of each op the calls that may differ in their kernel: from a source of tensors, the arguments.
CALLS: dict[str, dict[str, Callable[[Empty], Call]]] = {
    "rms_norm": {
        "alone": lambda empty: _rms_norm(empty(64, 1024)),
        "with a residual": lambda empty: _rms_norm(empty(64, 1024), residual=empty(64, 1024)),
        "weight in fp32": lambda empty: _rms_norm(
            empty(64, 1024), weight=empty(1024, dtype=torch.float32)
        ),
        "rows of odd length": lambda empty: _rms_norm(empty(64, 1023)),
    },
    "rope": {
        "from a position": lambda empty: _rope(empty),
        "packed documents": lambda empty: _rope(empty, positions=empty(2, 512, dtype=torch.int32)),
        "a part of the dimensions": lambda empty: _rope(empty, R=16),
        "heads of 20": lambda empty: _rope(empty, D=20),
        "in place": lambda empty: _rope(empty, inplace=True),
    },
    "flash_attention": {
        "full": lambda empty: _attention(empty, causal=False),
        "causal": lambda empty: _attention(empty),
        "grouped queries": lambda empty: _attention(empty, kv_heads=2),
        "one query on a cache": lambda empty: _attention(empty, Tq=1, kv_heads=2),
        "expanded keys": lambda empty: _attention(empty, kv_heads=1, expand=8),
        "window": lambda empty: _attention(empty, window=(128, 0)),
        "softcap": lambda empty: _attention(empty, softcap=30.0),
        "ALiBi": lambda empty: _attention(empty, alibi_slopes=empty(8, dtype=torch.float32)),
        "sinks": lambda empty: _attention(empty, sink_logits=empty(8, dtype=torch.float32)),
        "packed documents": lambda empty: _attention(
            empty, B=1, cu_seqlens=empty(5, dtype=torch.int32)
        ),
        "deterministic": lambda empty: _attention(empty, deterministic=True),
        "with the lse": lambda empty: _attention(empty, return_lse=True),
        "heads of 20": lambda empty: _attention(empty, D=20),
        "heads of 128": lambda empty: _attention(empty, D=128),
        "heads of 256": lambda empty: _attention(empty, D=256),
        "heads of 264": lambda empty: _attention(empty, D=264),
    },
    "cross_entropy": {
        "contiguous": lambda empty: _cross_entropy(empty),
        "rows of odd length": lambda empty: _cross_entropy(empty, V=1023),
    },
    "linear_cross_entropy": {
        "mean": lambda empty: _linear_cross_entropy(empty),
        "a padded vocabulary": lambda empty: _linear_cross_entropy(empty, vocab_size=1001),
        "each token's": lambda empty: _linear_cross_entropy(empty, reduction="none"),
        "softcap": lambda empty: _linear_cross_entropy(empty, softcap=30.0),
        "weight in fp32": lambda empty: _linear_cross_entropy(
            empty, weight=empty(1024, 256, dtype=torch.float32)
        ),
    },
    "swiglu": {
        "contiguous": lambda empty: ((empty(64, 2048),), {}),
        "rows of odd length": lambda empty: ((empty(64, 2 * 1023),), {}),
        "strided": lambda empty: ((empty(2048, 64).t(),), {}),
    },
    "gelu": {
        "exact": lambda empty: ((empty(64, 1024),), {}),
        "by tanh": lambda empty: ((empty(64, 1024), "tanh"), {}),
    },
    "relu_squared": {"contiguous": lambda empty: ((empty(64, 1024),), {})},
    "kv_append": {
        "heads of 64": lambda empty: _append(empty),
        "heads of 80": lambda empty: _append(empty, D=80),
        "heads of 256": lambda empty: _append(empty, D=256),
        "int8": lambda empty: _append(empty, int8=True),
        "window with sinks": lambda empty: _append(empty, **_SINKS),
        "int8, window with sinks": lambda empty: _append(empty, int8=True, **_SINKS),
        "no rotation": lambda empty: _append(empty, turned=False),
        "some tokens missing": lambda empty: _append(
            empty, new_lengths=empty(2, dtype=torch.int32)
        ),
        "heads of 264": lambda empty: _append(empty, D=264),
    },
    "decode_attention": {
        "one token": lambda empty: _decode(empty, H=2),
        "16 tokens": lambda empty: _decode(empty, T=16, H=2),
        "grouped queries": lambda empty: _decode(empty, T=4),
        "heads of 80": lambda empty: _decode(empty, D=80),
        "heads of 256": lambda empty: _decode(empty, D=256),
        "int8": lambda empty: _decode(empty, layer={"int8": True}),
        "window with sinks": lambda empty: _decode(empty, layer=_SINKS, q_sink=empty(2, 8, 1, 64)),
        "int8, window with sinks": lambda empty: _decode(empty, layer={"int8": True, **_SINKS}),
        "softcap": lambda empty: _decode(empty, softcap=30.0),
        "ALiBi": lambda empty: _decode(empty, alibi_slopes=empty(8, dtype=torch.float32)),
        "sink logits": lambda empty: _decode(empty, sink_logits=empty(8, dtype=torch.float32)),
        "some tokens missing": lambda empty: _decode(
            empty, new_lengths=empty(2, dtype=torch.int32)
        ),
        "heads of 264": lambda empty: _decode(empty, D=264),
    },
    "linear": {
        "one row": lambda empty: ((empty(1, 256), empty(1024, 256), empty(1024)), {}),
        "16 rows": lambda empty: ((empty(16, 256), empty(1024, 256)), {}),
        "17 rows": lambda empty: ((empty(17, 256), empty(1024, 256)), {}),
    },
    "sample": {
        "temperature": lambda empty: _sample(empty),
        "greedy": lambda empty: _sample(empty, temperature=0),
        "top-k": lambda empty: _sample(empty, top_k=50),
        "top-p and min-p": lambda empty: _sample(empty, top_p=0.9, min_p=0.05),
        "repetition penalty": lambda empty: _sample(
            empty, repetition_penalty=1.2, seen=empty(8, 1024, dtype=torch.bool)
        ),
        "log-probabilities": lambda empty: _sample(empty, logprobs=True),
        "a vocabulary of 50257": lambda empty: _sample(empty, V=50257),
    },
    "int8_linear": {
        "one token": lambda empty: _int8_linear(empty),
        "16 tokens": lambda empty: _int8_linear(empty, rows=16),
        "17 tokens": lambda empty: _int8_linear(empty, rows=17),
        "bias": lambda empty: _int8_linear(empty, bias=empty(4096)),
        "rows of 1000": lambda empty: _int8_linear(empty, K=1000),
    },
    "linear_attention": {
        "a sequence": lambda empty: _linear_attention(empty),
        "packed documents": lambda empty: _linear_attention(empty, documents=True),
        "one token on a state": lambda empty: _linear_attention(empty, T=1, state=True),
    },
    "block_sparse_attention": {
        "a sequence": lambda empty: _block_sparse(empty),
        "ALiBi": lambda empty: _block_sparse(empty, alibi_slopes=empty(8, dtype=torch.float32)),
        "packed documents": lambda empty: _block_sparse(
            empty, documents=empty(2, 512, dtype=torch.int32)
        ),
        "one query on a cache": lambda empty: _block_sparse(
            empty, T=1, start=empty(2, dtype=torch.int32)
        ),
    },
    "expert_linear": {
        "rows of 256": lambda empty: _expert_linear(empty),
        "rows of odd length": lambda empty: _expert_linear(empty, width=255),
    },
}

HEAD = """# Which kernel runs where

Generated from `kernels.explain` by `python scripts/backend_matrix.py`, and a test compares the two: after
a change to an op run it again, rather than edit the page.

A column is a card, by its compute capability ({cards}),
in an install that has every kernel. CPU is a processor with AVX2, and no gradient asked for; there the CUDA
kernels run when the `emulator` is forced. Every other device runs the `reference`, which is plain PyTorch.
`almostgpt info` says what runs on the machine at hand, `almostgpt info --config X` what each part of that
model uses ([kernels](kernels.md#of-a-whole-model)), and `almostgpt info --check` whether it is right.
"""


def page() -> str:
    """The whole page."""
    names = ("A100", "RTX 30", "RTX 40 and L4", "H100", "B200", "RTX 50")
    cards = ", ".join(f"{_number(card)} {name}" for card, name in zip(CARDS, names, strict=True))
    return "\n".join([HEAD.format(cards=cards), *(section(op) for op in kernels.OPS)])


def section(op: str) -> str:
    """The table of one op, equal columns and equal rows as one."""
    places = (*CARDS, CPU)
    found = {
        (option, dtype, place): _explain(op, call, DTYPES[dtype], place)
        for option, call in CALLS[op].items()
        for dtype in DTYPES
        for place in places
    }
    calls = list(itertools.product(CALLS[op], DTYPES))

    def column(place: Place) -> list[str]:
        return [_cell(found[option, dtype, place]) for option, dtype in calls]

    # Neighbouring cards with equal columns; the CPU, which comes last, is its own.
    groups = [list(g) for _, g in itertools.groupby(CARDS, key=column)] + [[CPU]]

    def cells(option: str, dtype: str) -> tuple[str, ...]:
        return tuple(_cell(found[option, dtype, group[0]]) for group in groups)

    # {cells: dtypes} of each option; options for which that is equal share their rows.
    rows: dict[tuple, list[str]] = {}
    for option in CALLS[op]:
        by_cells: dict[tuple[str, ...], list[str]] = {}
        for dtype in DTYPES:
            by_cells.setdefault(cells(option, dtype), []).append(dtype)
        rows.setdefault(tuple((", ".join(d), c) for c, d in by_cells.items()), []).append(option)

    lines = [f"## {op}\n", f"| call | dtype | {' | '.join(map(_heading, groups))} |"]
    lines.append("|---" * (2 + len(groups)) + "|")
    for row, options in rows.items():
        for dtypes, texts in row:
            lines.append(f"| {'; '.join(options)} | {dtypes} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", *_reasons(found, groups)])


def _explain(op: str, call: Callable[[Empty], Call], dtype: torch.dtype, place: Place):
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    args, kwargs = call(empty)
    return kernels.explain(op, *args, capability=place, **kwargs)


def _cell(explanation: Explanation) -> str:
    if explanation.backend == "reference":
        return "reference"
    return f"{explanation.backend}: `{explanation.kernel}`"


def _reasons(found: dict[tuple, Explanation], groups: list[list[Place]]) -> list[str]:
    """Why a place runs the reference, or a lesser kernel, of an op that has a kernel for its like."""
    why: dict[str, dict[str, None]] = {}  # reason -> dtypes, in order
    for (_, dtype, place), explanation in found.items():
        if explanation.backend != "reference":
            better = {k: v for k, v in explanation.reasons.items() if k not in BACKENDS}
            for kernel, reason in better.items():
                why.setdefault(f"not `{kernel}`: {reason}", {})[dtype] = None
            continue
        for backend in ("cpu",) if place is CPU else ("cuda", "triton"):
            reason = f"not {backend}: {explanation.reasons[backend]}"
            if reason != f"not {backend}: no {backend} kernel for this op":
                why.setdefault(reason, {})[dtype] = None
    return [f"- {', '.join(dtypes)}: {reason}" for reason, dtypes in why.items()] + [""] * bool(why)


def _heading(group: list[Place]) -> str:
    if group == [CPU]:
        return "CPU"
    return " to ".join(dict.fromkeys([_number(group[0]), _number(group[-1])]))


def _number(card: Card) -> str:
    return f"{card[0]}.{card[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    options = parser.parse_args(arguments)
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is stale: run python scripts/backend_matrix.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
