"""Attention, forward and backward: causal and full, grouped heads, a window, packed documents.

Our best backend against each backend of ``scaled_dot_product_attention`` and a compiled
``flex_attention``. Attention computes, so the figure that counts is FLOPs a second, as a share of
what a large matrix product reaches on the same device in the same run. FLOPs are the usual count:
4 · D for each pair of a query and a key that it sees (of T²/2 pairs where causal), and 2.5 times
that in backward, whatever a kernel computes besides.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from almostgpt import kernels
from almostgpt.kernels.attention_ladder import ATTENTION_LADDER, STEPS, attention_ladder

from . import harness

ON_CUDA = harness.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
SECONDS = 0.5 if ON_CUDA else 1.0
TILE = 128  # queries and keys, for counting the tiles that a mask leaves

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v, dout


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Case:
    """One attention: q (B, H, T, D), k and v (B, Hkv, T, D).

    Attributes:
        window: how many keys each query sees, its own the last; None: all.
        packed: the tokens are documents one after the other, and see none of another.
        flex: whether flex_attention, which takes long to compile, is among the peers.
        deterministic: whether our deterministic backward is.
    """

    name: str
    B: int
    H: int
    Hkv: int
    T: int
    D: int
    causal: bool = True
    window: int | None = None
    packed: bool = False
    flex: bool = False
    deterministic: bool = False

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.Hkv else f"H{self.H}-Hkv{self.Hkv}"
        return f"{self.name}-B{self.B}-{heads}-T{self.T}-D{self.D}"

    @property
    def masked(self) -> bool:
        """Whether more is hidden than what comes later."""
        return self.window is not None or self.packed

    @functools.cached_property
    def borders(self) -> list[int]:
        """Where documents begin, and the end: lengths of T/256 to T/4, short ones as likely as long."""
        generator = torch.Generator().manual_seed(0)
        borders = [0]
        while borders[-1] < self.T:
            length = self.T // 256 * 2 ** (6 * torch.rand((), generator=generator).item())
            borders.append(min(self.T, borders[-1] + max(1, int(length))))
        return borders

    def first_seen(self) -> torch.Tensor:
        """(T,): the first key that each query of a causal attention sees."""
        first = torch.zeros(self.T, dtype=torch.int64)
        if self.packed:
            for begin, end in itertools.pairwise(self.borders):
                first[begin:end] = begin
        if self.window is not None:
            first = first.maximum(torch.arange(self.T) - self.window + 1)
        return first

    def flops(self, direction: str) -> float:
        pairs = float(self.T**2)
        if self.masked:
            pairs = (torch.arange(1, self.T + 1) - self.first_seen()).sum().item()
        elif self.causal:
            pairs /= 2
        forward = 4 * self.B * self.H * self.D * pairs
        return forward if direction == "forward" else 2.5 * forward

    def kept_tiles(self) -> float:
        """Of the tiles of causal attention, the share in which some query sees some key."""
        first_tiles = self.first_seen()[::TILE] // TILE
        here = torch.arange(len(first_tiles))
        return ((here - first_tiles + 1).sum() / (here + 1).sum()).item()

    @functools.cached_property
    def options(self) -> dict:
        """As ``kernels.flash_attention`` takes them."""
        options: dict = {"causal": self.causal}
        if self.window is not None:
            options["window"] = (self.window - 1, 0)
        if self.packed:
            borders = torch.tensor(self.borders, dtype=torch.int32)
            options["cu_seqlens"] = borders.to(harness.DEVICE)
        return options


def dense(T: int, D: int, causal: bool = True, **options) -> Case:
    """A model 2048 wide, 16k tokens in all, 32k of the longest."""
    name = "causal" if causal else "full"
    return Case(name, max(1, 16384 // T), 2048 // D, 2048 // D, T, D, causal, **options)


if ON_CUDA:
    CASES = [
        dense(512, 128),
        dense(1024, 128),
        dense(2048, 128, deterministic=True),
        dense(4096, 128),
        dense(8192, 128, flex=True, deterministic=True),
        dense(16384, 128),
        dense(32768, 128),
        *(dense(T, D) for D in (64, 256) for T in (2048, 16384)),
        dense(2048, 128, causal=False),
        *(dense(16384, D, causal=False) for D in (64, 128, 256)),
        # Llama's heads, the case of cuDNN's published figures (docs/benchmarks.md).
        Case("grouped-causal", 2, 64, 8, 2048, 128),
        Case("grouped-causal", 2, 64, 8, 8192, 128, deterministic=True),
        Case("grouped-causal", 2, 64, 8, 16384, 128),
        Case("grouped-full", 2, 64, 8, 8192, 128, causal=False),
        Case("window1024", 1, 16, 16, 16384, 128, window=1024, flex=True),
        Case("packed", 1, 16, 16, 16384, 128, packed=True, flex=True),
    ]
else:
    CASES = [
        Case("causal", 1, 4, 4, 512, 64),
        Case("full", 1, 4, 4, 512, 64, causal=False),
        Case("grouped-causal", 1, 8, 2, 256, 64),
        Case("window128", 1, 4, 4, 512, 64, window=128),
        Case("packed", 1, 4, 4, 512, 64, packed=True),
    ]


@pytest.fixture(scope="module")
def matmul_rate() -> float:
    """FLOPs a second, measured once in this run."""
    return harness.matmul_rate(DTYPE)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case, direction, race, report, benchmark, matmul_rate):
    example = make_inputs(case)
    functions, notes = peers(case, direction, example)
    if direction == "backward":
        harness.check_equal({name: with_gradients(f, example) for name, f in functions.items()})
    else:
        harness.check_equal({name: (run(f, example),) for name, f in functions.items()})

    ours = next(iter(functions))
    flops = dict.fromkeys(functions, case.flops(direction))
    if case.masked:  # how much faster than with nothing hidden but what comes later
        functions["almostgpt, all keys"] = functools.partial(kernels.flash_attention, causal=True)
        flops["almostgpt, all keys"] = replace(case, window=None, packed=False).flops(direction)
    timer = harness.device_timer(calls_of(max(flops.values())))
    inputs = harness.input_sets(
        lambda: make_inputs(case), sum(t.numel() * t.element_size() for t in example)
    )
    del example
    peer = forward_peer if direction == "forward" else backward_peer
    result = race({name: peer(f, inputs) for name, f in functions.items()}, timer, seconds=SECONDS)

    if case.masked:
        ideal = case.kept_tiles() * result.median("almostgpt, all keys")
        notes.append(
            f"{case.kept_tiles():.1%} of the {TILE} x {TILE} tiles of all keys hold a pair that is "
            f"seen: at their speed {1e6 * ideal:.0f} us"
        )
    report(
        harness.Table(
            f"attention {direction}, {case}, {DTYPE}; "
            f"a matrix product does {matmul_rate / 1e12:.3g} TFLOP/s",
            ("", "us", "± %", "TFLOP/s", "% of product", "over SDPA flash", "ours is faster by"),
            [
                [
                    name,
                    1e6 * result.median(name),
                    100 * result.spread(name),
                    flops[name] / result.median(name) / 1e12,
                    100 * flops[name] / result.median(name) / matmul_rate,
                    result.speedup(name, over="SDPA flash") if "SDPA flash" in functions else "-",
                    result.speedup(ours, over=name),
                ]
                for name in functions
            ],
            notes,
        )
    )
    benchmark.extra_info["flops_per_second"] = case.flops(direction) / result.median(ours)
    benchmark.extra_info["matmul_flops_per_second"] = matmul_rate


def test_ladder(race, report, benchmark, matmul_rate):
    """The steps for readers (csrc/attention/ladder/), up to the kernel that models run here."""
    case = Case("full", 1, 16, 16, 2048, 128, causal=False)
    example = make_inputs(case)
    q, k, v, _ = example
    answer = ATTENTION_LADDER.explain(q, k, v, step="naive")
    if answer.backend != "cuda":
        pytest.skip(f"only a GPU is timed: {answer.reasons['cuda']}")
    functions: dict[str, Attention] = {
        f"almostgpt ({kernels.explain('flash_attention', q, k, v).kernel})": kernels.flash_attention,
        **{step: functools.partial(attention_ladder, step) for step in STEPS},
    }
    harness.check_equal({name: (run(f, example),) for name, f in functions.items()})
    inputs = itertools.repeat(example)
    contestants = {name: forward_peer(function, inputs) for name, function in functions.items()}
    result = race(contestants, harness.device_timer(2), seconds=SECONDS)
    flops = case.flops("forward")
    report(
        harness.Table(
            f"the ladder, forward, {case}, {DTYPE}",
            ("", "us", "± %", "TFLOP/s", "% of product", "over naive"),
            [
                [
                    name,
                    1e6 * result.median(name),
                    100 * result.spread(name),
                    flops / result.median(name) / 1e12,
                    100 * flops / result.median(name) / matmul_rate,
                    result.speedup(name, over="naive"),
                ]
                for name in functions
            ],
        )
    )
    benchmark.extra_info["flops_per_second"] = flops / result.median(next(iter(functions)))


# ---------------------------------------------------------------- running one


def make_inputs(case: Case) -> Inputs:
    """q, k, v and the gradient of the output, in memory (B, T, H, D) as a model's layers leave them."""

    def heads(count: int) -> torch.Tensor:
        shape = (case.B, case.T, count, case.D)
        return torch.randn(shape, device=harness.DEVICE, dtype=DTYPE).transpose(1, 2)

    return heads(case.H), heads(case.Hkv), heads(case.Hkv), heads(case.H)


@torch.no_grad()
def run(function: Attention, example: Inputs) -> torch.Tensor:
    return function(*example[:3])


def with_gradients(function: Attention, example: Inputs) -> tuple[torch.Tensor, ...]:
    out, leaves, dout = forward(function, example)
    return out, *torch.autograd.grad(out, leaves, dout)


def forward(function: Attention, example: Inputs) -> tuple[torch.Tensor, list, torch.Tensor]:
    """The output, with a graph for one backward; its leaves; the output's gradient."""
    *qkv, dout = example
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    return function(*leaves), leaves, dout


def forward_peer(function: Attention, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        example = next(inputs)
        return lambda: run(function, example)

    return get_ready


def backward_peer(function: Attention, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        out, leaves, dout = forward(function, next(inputs))
        return lambda: torch.autograd.grad(out, leaves, dout)

    return get_ready


def calls_of(flops: float) -> int:
    """So many that they take some 10 ms, where a GPU does 300 TFLOP/s."""
    return int(min(8, max(1, 3e12 / flops))) if ON_CUDA else 1


# ---------------------------------------------------------------- peers


def peers(case: Case, direction: str, example: Inputs) -> tuple[dict[str, Attention], list[str]]:
    """Those that run here, ours first; and why the others do not."""
    backend = kernels.explain("flash_attention", *example[:3], **case.options).backend
    ours = functools.partial(kernels.flash_attention, **case.options)
    functions: dict[str, Attention] = {f"almostgpt ({backend})": ours}
    if case.deterministic and direction == "backward":
        functions["almostgpt, deterministic"] = functools.partial(ours, deterministic=True)
    makers = {
        "SDPA math": functools.partial(sdpa, SDPBackend.MATH),
        "SDPA efficient": functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "SDPA flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    }
    if case.flex:
        makers["flex_attention"] = flex
    notes = []
    for name, make in makers.items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                function = make(case)
                if direction == "forward":
                    run(function, example)
                else:
                    with_gradients(function, example)
            except Exception as error:  # each has its own way to say what it does not take
                notes.append(f"no {name}: {reason(error, warned)}")
            else:
                functions[name] = function
    return functions, notes


def reason(error: Exception, warned: list[warnings.WarningMessage]) -> str:
    """Why a peer does not run. SDPA says it in warnings, those about what we turned off among them."""
    said = [str(warning.message).partition(" (Triggered")[0] for warning in warned]
    said = [text for text in said if "disabled" not in text and " not used because" not in text]
    return " ".join((said[-1] if said else str(error) or type(error).__name__).split())[:150]


def sdpa(backend: SDPBackend, case: Case) -> Attention:
    if not ON_CUDA and backend not in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        raise RuntimeError("it needs a GPU")
    scores = case.B * case.H * case.T**2 * 4
    if backend == SDPBackend.MATH and scores > 2**30:  # and several calls are under way
        raise RuntimeError(f"its scores take {scores / 2**30:.0f} GiB a call")
    mask = additive_mask(case) if case.masked else None

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=case.causal and mask is None, enable_gqa=case.H != case.Hkv
            )

    return attention


@functools.lru_cache(maxsize=1)  # half a GB at 16k
def additive_mask(case: Case) -> torch.Tensor:
    """(T, T): 0 where the query sees the key, else -inf, as SDPA's kernels take it."""
    key = torch.arange(case.T, device=harness.DEVICE)
    seen = (key <= key[:, None]) & (key >= case.first_seen().to(harness.DEVICE)[:, None])
    return torch.zeros(seen.shape, device=harness.DEVICE, dtype=DTYPE).masked_fill(
        ~seen, -torch.inf
    )


def flex(case: Case) -> Attention:
    if trouble := harness.compile_trouble():
        raise RuntimeError(trouble)
    first_seen = case.first_seen().to(harness.DEVICE)

    def sees(batch, head, query, key):
        return (key <= query) & (key >= first_seen[query])

    def sees_causally(batch, head, query, key):
        return key <= query

    mask = None
    if case.causal:
        rule = sees if case.masked else sees_causally
        mask = create_block_mask(rule, None, None, case.T, case.T, device=harness.DEVICE)
    torch.compiler.reset()  # else the eighth shape would find the limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=case.H != case.Hkv)
