"""A cache in generation: attention of the newest tokens over all of it, and appending them.

``decode_attention`` on our best backend, slots of 16 bits and of int8, against each backend of
``scaled_dot_product_attention`` and a compiled ``flex_attention``, which get the slots that are taken
as a slice, without a copy; ``kv_append`` against PyTorch's own steps. Both move bytes and hardly
compute, so the figure that counts is the share of the bandwidth that a plain copy reaches on the same
device in the same run. Bytes are counted at the floor: every key and value once (of int8 the codes and
their scales), queries once, and what comes out once.

What we aim at on an H200; nothing is asserted:

    decode_attention, 32k keys, batch 8 and more    85 % of a copy
    decode_attention, 32k keys, one sequence        60 % of a copy
    4 tokens at once                                1.3 times as long as one
    kv_append of a long prompt                      80 % of a copy

Both ops in one file, though it is long: they share layers, sizes, and how inputs are rotated.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from almostgpt import kernels
from almostgpt.kernels import KVLayer
from almostgpt.kernels.kv_cache_reference import quantized
from almostgpt.kernels.rope import turns_of

from . import harness
from .test_attention import reason

ON_CUDA = harness.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
TOKENS = (1, 4, 16) if ON_CUDA else (1, 4)
SECONDS = 0.5
LLAMA, GPT2 = (64, 8, 128), (12, 12, 64)  # query heads, key heads, width


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Case:
    """``keys`` slots of each sequence, all taken. flex: whether flex_attention is among the peers."""

    B: int
    H: int
    Hkv: int
    D: int
    keys: int
    flex: bool = False

    def __str__(self) -> str:
        return f"B{self.B}-H{self.H}-Hkv{self.Hkv}-D{self.D}-keys{self.keys}"

    def moved(self, tokens: int, int8: bool = False) -> int:
        """Bytes that must be read or written at the least."""
        row = self.D + 4 if int8 else self.D * DTYPE.itemsize
        queries = self.B * self.H * tokens * self.D * DTYPE.itemsize
        return 2 * (self.B * self.Hkv * self.keys * row + queries)


if ON_CUDA:
    CASES = [
        Case(B, *heads, keys, flex=(B, keys) == (8, 32_768))
        for heads in (LLAMA, GPT2)
        for keys in (2048, 32_768, 131_072)
        for B in (1, 8, 64)
    ]
else:
    CASES = [Case(1, 12, 12, 64, 1024), Case(4, 8, 2, 64, 512)]


class Example(NamedTuple):
    """Queries (B, H, T, D) by T, and layers that hold the same keys and values."""

    queries: dict[int, Tensor]
    layer: KVLayer
    int8: KVLayer


Attention = Callable[[Example], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to attend, of so many tokens."""

    tokens: int
    attend: Attention
    int8: bool = False


# On a CPU what makes copies of the whole cache slows whoever comes after it: a race of its own.
CONTESTS = ["all"] if ON_CUDA else ["PyTorch", "other slots"]


@pytest.mark.parametrize("contest", CONTESTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention(case, contest, race, report, benchmark, copy_bandwidth):
    least = case.moved(1, int8=True)
    inputs = input_sets(lambda: make_example(case), least, held=least + case.moved(1))
    example = next(inputs)
    contestants, notes = attentions(case, example, contest)
    check(contestants, example)
    ours = next(iter(contestants))
    timer = harness.device_timer(calls_of(case.moved(1)))
    peers = {name: attention_peer(each.attend, inputs) for name, each in contestants.items()}
    result = race(peers, timer, seconds=SECONDS)
    alike = {T: next(n for n, c in contestants.items() if c.tokens == T) for T in TOKENS}  # ours

    def row(name: str, each: Contestant) -> list[str | int | float]:
        rate = case.moved(each.tokens, each.int8) / result.median(name)
        first = name.replace(tokens_text(each.tokens), tokens_text(1))
        return [
            name,
            1e6 * result.median(name),
            100 * result.spread(name),
            rate / 1e9,
            100 * rate / copy_bandwidth,
            result.speedup(first, over=name) if first in contestants else "-",
            result.speedup(alike[each.tokens], over=name),
        ]

    report(
        harness.Table(
            f"decode attention, {case}, {DTYPE}; a copy moves {copy_bandwidth / 1e9:.0f} GB/s",
            ("", "us", "± %", "GB/s", "% of copy", "times 1 token's", "ours is faster by"),
            [row(name, each) for name, each in contestants.items()],
            notes,
        )
    )
    benchmark.extra_info["bytes_per_second"] = case.moved(1) / result.median(ours)
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


def make_example(case: Case) -> Example:
    shape = (case.B, case.Hkv, case.keys, case.D)
    layer = KVLayer.empty(*shape, dtype=DTYPE, device=harness.DEVICE)
    int8 = KVLayer.empty(*shape, dtype=torch.int8, device=harness.DEVICE)
    for slots, codes, scales in (
        (layer.keys, int8.keys, int8.key_scales),
        (layer.values, int8.values, int8.value_scales),
    ):
        slots.normal_()
        for b in range(case.B):  # its float32 would be twice the whole cache
            codes[b], scales[b] = quantized(slots[b])

    def drawn(T: int) -> Tensor:  # in memory (B, T, H, D), as a model's layers leave them
        shape = (case.B, T, case.H, case.D)
        return torch.randn(shape, device=harness.DEVICE, dtype=DTYPE).transpose(1, 2)

    return Example({T: drawn(T) for T in TOKENS}, layer, int8)


def attentions(
    case: Case, example: Example, contest: str
) -> tuple[dict[str, Contestant], list[str]]:
    """Those that run here, ours first; and why the others do not."""
    backend = kernels.explain("decode_attention", example.queries[1], example.layer).backend
    found = {}
    for T in TOKENS:
        text = tokens_text(T)
        before = torch.full((case.B,), case.keys - T, dtype=torch.int32, device=harness.DEVICE)
        found[f"almostgpt ({backend}){text}"] = Contestant(T, ours(T, before))
        if contest != "PyTorch":
            found[f"almostgpt, int8{text}"] = Contestant(T, ours(T, before, int8=True), int8=True)
        # Sequences of other lengths each: PyTorch has no slice that serves them all.
        if contest == "other slots" and case.B > 1:
            apart = before - torch.arange(case.B, dtype=torch.int32)
            found[f"almostgpt, lengths apart{text}"] = Contestant(T, ours(T, apart))
    if contest == "other slots":
        return found, []
    makers = {
        "SDPA math": functools.partial(sdpa, SDPBackend.MATH),
        "SDPA efficient": functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "SDPA flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    }
    if case.flex:
        makers["flex_attention"] = flex
    absent: dict[tuple[str, str], list[str]] = {}
    for (name, make), T in itertools.product(makers.items(), TOKENS):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                attend = make(case, T)
                with torch.no_grad():
                    attend(example)
            except Exception as error:  # each has its own way to say what it does not take
                absent.setdefault((name, reason(error, warned)), []).append(str(T))
            else:
                found[name + tokens_text(T)] = Contestant(T, attend)
    notes = [f"no {name} of {', '.join(T)} tokens: {why}" for (name, why), T in absent.items()]
    return found, notes


def tokens_text(tokens: int) -> str:
    return f", {tokens} token{'s' * (tokens > 1)}"


def ours(tokens: int, before: Tensor, int8: bool = False) -> Attention:
    def attend(example: Example) -> Tensor:
        layer = example.int8 if int8 else example.layer
        return kernels.decode_attention(example.queries[tokens], replace(layer, lengths=before))

    return attend


def sdpa(backend: SDPBackend, case: Case, tokens: int) -> Attention:
    """On the slots as they are: the slice of a full cache is all of it."""
    if not ON_CUDA and backend not in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        raise RuntimeError("it needs a GPU")
    scores = case.B * case.H * tokens * case.keys * 4
    if backend == SDPBackend.MATH and (scores > 2**30 or (ON_CUDA and case.moved(1) > 2**32)):
        raise RuntimeError("its scores and its keys, repeated for all heads, take too much memory")
    mask = None
    if tokens > 1:  # the last query sees every key
        if ON_CUDA and backend == SDPBackend.FLASH_ATTENTION:  # it takes no other mask
            mask = causal_lower_right(tokens, case.keys)
        else:
            square = torch.ones(tokens, case.keys, dtype=torch.bool, device=harness.DEVICE)
            mask = square.tril(case.keys - tokens)
    # It knows no groups: there the queries of a key head are rows of one head.
    as_rows = backend == SDPBackend.EFFICIENT_ATTENTION and case.H != case.Hkv
    if as_rows and mask is not None:
        mask = mask.repeat(case.H // case.Hkv, 1)

    def attend(example: Example) -> Tensor:
        q, taken = example.queries[tokens], slice(0, case.keys)
        k, v = example.layer.keys[:, :, taken], example.layer.values[:, :, taken]
        with sdpa_kernel(backend):
            if as_rows:
                rows = q.unflatten(1, (case.Hkv, -1)).flatten(2, 3)
                return F.scaled_dot_product_attention(rows, k, v, mask).view_as(q)
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=case.H != case.Hkv)

    return attend


def flex(case: Case, tokens: int) -> Attention:
    if trouble := harness.compile_trouble():
        raise RuntimeError(trouble)

    def sees(batch, head, query, key):
        return key <= query + case.keys - tokens

    mask = None
    if tokens > 1:
        mask = create_block_mask(sees, None, None, tokens, case.keys, device=harness.DEVICE)
    torch.compiler.reset()  # else the eighth shape would find the limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(example: Example) -> Tensor:
        layer, gqa = example.layer, case.H != case.Hkv
        return compiled(
            example.queries[tokens], layer.keys, layer.values, block_mask=mask, enable_gqa=gqa
        )

    return attend


@torch.no_grad()
def check(contestants: dict[str, Contestant], example: Example) -> None:
    """Those of as many tokens agree; int8 but for what it has rounded."""
    for T in TOKENS:
        outs = {
            name: each.attend(example)
            for name, each in contestants.items()
            if each.tokens == T and "apart" not in name
        }
        ours, *_ = outs.values()
        for name in [name for name in outs if contestants[name].int8]:
            off = (outs.pop(name) - ours).float().norm() / ours.float().norm()
            assert off <= 0.03, f"{name} is off by {off:.2e}"
        harness.check_equal({name: (out,) for name, out in outs.items()})


def attention_peer(attend: Attention, inputs: Iterator[Example]) -> harness.Peer:
    def get_ready() -> harness.Work:
        example, work = next(inputs), torch.no_grad()(attend)
        if (
            not ON_CUDA
        ):  # a CPU's cache as its own calls leave it, not as the one before in the race did
            work(example)
        return lambda: work(example)

    return get_ready


# ---------------------------------------------------------------- append


class New(NamedTuple):
    """q (B, H, T, D), k and v (B, Hkv, T, D) of the next tokens, and the layer that they go to."""

    q: Tensor
    k: Tensor
    v: Tensor
    layer: KVLayer


if ON_CUDA:  # B, T, heads: a token each, drafts, a prompt
    APPENDS = [
        (B, T, *heads)
        for heads in (LLAMA, GPT2)
        for B, T in ((1, 1), (64, 1), (64, 16), (8, 2048), (1, 16_384))
    ]
else:
    APPENDS = [(4, 1, 12, 12, 64), (1, 64, 12, 4, 64)]
BEFORE = 100  # tokens that are there already


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits" if ON_CUDA else "32 bits", "int8"])
@pytest.mark.parametrize("B, T, H, Hkv, D", APPENDS)
def test_kv_append(B, T, H, Hkv, D, int8, race, report, benchmark, copy_bandwidth):
    size = DTYPE.itemsize
    written = D + 4 if int8 else D * size  # of a key or a value
    moved = B * T * (2 * H * D * size + 2 * Hkv * (D * size + written))

    def make() -> New:
        fused = torch.randn(B, T, H + 2 * Hkv, D, device=harness.DEVICE, dtype=DTYPE)
        q, k, v = fused.transpose(1, 2).split([H, Hkv, Hkv], dim=1)
        dtype = torch.int8 if int8 else DTYPE
        layer = KVLayer.empty(B, Hkv, BEFORE + T, D, dtype=dtype, device=harness.DEVICE)
        layer.lengths.fill_(BEFORE)
        return New(q, k, v, layer)

    inputs = input_sets(make, moved, held=moved)
    functions, notes = appends(next(inputs))
    harness.check_equal({name: appended(f, make) for name, f in functions.items()})
    peers = {name: append_peer(function, inputs) for name, function in functions.items()}
    result = race(peers, harness.device_timer(calls_of(moved)), seconds=SECONDS)
    title = f"append, {B} x {T} tokens, {H} heads on {Hkv} of {D}, {DTYPE}{', int8' * int8}"
    report(harness.bandwidth_table(title, result, moved, copy_bandwidth, notes))
    benchmark.extra_info["bytes_per_second"] = moved / result.median(next(iter(functions)))
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


def appends(example: New) -> tuple[dict[str, Callable[..., Tensor]], list[str]]:
    """Functions of q, k, v and the layer that give q rotated, ours first; and why a peer is absent."""
    T, half = example.q.shape[2], example.q.shape[3] // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    turns = turns_of(frequencies).to(harness.DEVICE)
    backend = kernels.explain("kv_append", *example, turns=turns).backend
    # What a loop by PyTorch has at hand: the tables' rows of these positions, and the slots.
    slots = torch.arange(BEFORE, BEFORE + T, device=harness.DEVICE)
    angles = slots.double()[:, None].cpu() * frequencies
    cos, sin = (table.float().to(harness.DEVICE) for table in (angles.cos(), angles.sin()))

    def rotated(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def by_pytorch(q: Tensor, k: Tensor, v: Tensor, layer: KVLayer) -> Tensor:
        for x, data, scales in (
            (rotated(k), layer.keys, layer.key_scales),
            (v, layer.values, layer.value_scales),
        ):
            if scales is not None:
                largest = x.float().abs().amax(-1) / 127
                x = (x.float() / largest[..., None]).round().to(torch.int8)
                scales.index_copy_(2, slots, largest)
            data.index_copy_(2, slots, x)
        return rotated(q)

    functions: dict[str, Callable[..., Tensor]] = {
        f"almostgpt ({backend})": lambda *new: kernels.kv_append(*new, turns=turns)[0],
        "rotation and index_copy_": by_pytorch,
    }
    notes = []
    if not ON_CUDA:
        notes.append("no compiled rotation and index_copy_: it is for a GPU, and takes long here")
    elif trouble := harness.compile_trouble():
        notes.append(f"no compiled rotation and index_copy_: {trouble}")
    else:
        torch.compiler.reset()  # else the eighth shape would find the limit of recompilations
        functions["the same, compiled"] = torch.compile(by_pytorch, dynamic=False)
    return functions, notes


@torch.no_grad()
def appended(function: Callable[..., Tensor], make: Callable[[], New]) -> tuple[Tensor, ...]:
    """q rotated, and the new tokens' slots, of the same numbers for all; int8 as what it stands for."""
    torch.manual_seed(0)
    new = make()
    q, layer = function(*new), new.layer
    held = [
        slots if scales is None else (slots * scales[..., None]).bfloat16()
        for slots, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales))
    ]
    return q, *(slots[:, :, BEFORE:] for slots in held)


def append_peer(function: Callable[..., Tensor], inputs: Iterator[New]) -> harness.Peer:
    def get_ready() -> harness.Work:
        new = next(inputs)
        return torch.no_grad()(lambda: function(*new))

    return get_ready


# ---------------------------------------------------------------- both


def input_sets(make: Callable[[], tuple], moved: int, held: int) -> Iterator:
    """As the harness's; but of what no GPU's L2 could hold one set, since two may not fit.

    Args:
        make: makes one.
        moved: bytes of it that a call reads or writes at the least.
        held: bytes that it takes.
    """
    if ON_CUDA and 1.2 * held > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs {1.2 * held / 2**30:.0f} GiB of free GPU memory")
    return itertools.repeat(make()) if moved > 2**29 else harness.input_sets(make, moved)


def calls_of(moved: int) -> int:
    """So many that they take some 10 ms, where a GPU moves 4 TB/s."""
    return int(min(16, max(1, math.ceil(4e10 / moved)))) if ON_CUDA else 4
