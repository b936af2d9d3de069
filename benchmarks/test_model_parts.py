"""Parts of a model against the same written the plain way, and against what they take the place of.

Attention that does not look at every key is worth its name where it takes less time than full attention:
so that races with it, at several lengths, in training and for one token of a decoding step. What is
compared for equality is each kind and its plain form: scores of all keys under a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from almostgpt import GPTConfig, kernels
from almostgpt.config_model import resolve_model
from almostgpt.kernels.block_sparse_attention import random_blocks
from almostgpt.model.experts import MixtureOfExperts
from almostgpt.model.feedforward import SwiGLU

from . import harness

ON_CUDA = harness.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
B, H, D = (4, 16, 64) if ON_CUDA else (1, 4, 32)
LENGTHS = (1024, 4096, 16384) if ON_CUDA else (256, 1024)
WINDOW, BLOCK = (512, 64) if ON_CUDA else (64, 16)  # of a block-sparse row: 6 blocks
CALLS = 4 if ON_CUDA else 1
SECONDS = 1.5

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernels.flash_attention(q, k, v, causal=True)


def masked(mask: Tensor) -> Attention:
    """Attention by PyTorch with every score made, and those that nobody sees masked."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, mask)


def block_mask(pattern: kernels.BlockPattern, T: int) -> Tensor:
    """(H, T, T) booleans, from the definition."""
    token = torch.arange(T, device=harness.DEVICE)
    i, j = token[:, None] // pattern.block, token // pattern.block
    sees = (j < pattern.global_blocks) | (j > i - pattern.window)
    drawn = pattern.random[:, : -(-T // pattern.block)]
    at_random = torch.zeros(H, T, T, dtype=torch.bool, device=harness.DEVICE)
    for n in range(drawn.shape[2]):
        at_random |= drawn[:, i[:, 0], n][:, :, None] == j
    return (sees | at_random) & (token <= token[:, None])


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention as it is written, a product of each two tokens."""
    products = (q.float() @ k.float().mT).tril()
    return (products @ v.float() / (products.sum(-1, keepdim=True) + 1e-6)).to(q.dtype)


def kind(name: str, T: int) -> tuple[Attention, Attention]:
    """A kind of attention by our op, and the plain way."""
    token = torch.arange(T, device=harness.DEVICE)
    if name == "sliding_window":
        distance = token[:, None] - token
        window = (WINDOW - 1, 0)
        return (
            lambda q, k, v: kernels.flash_attention(q, k, v, causal=True, window=window),
            masked((distance >= 0) & (distance < WINDOW)),
        )
    if name == "block_sparse":
        drawn = random_blocks(0, H, -(-T // BLOCK), 3, 1, 2).to(harness.DEVICE)
        pattern = kernels.BlockPattern(BLOCK, 3, 1, drawn)
        return (
            lambda q, k, v: kernels.block_sparse_attention(q, k, v, pattern),
            masked(block_mask(pattern, T)),
        )
    return kernels.linear_attention, quadratic


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("name", ["sliding_window", "block_sparse", "linear"])
def test_attention_forward_and_backward(name, T, race, report, benchmark):
    ours, plain = kind(name, T)

    def make() -> tuple[Tensor, ...]:
        q, k, v, dout = (
            torch.randn(B, H, T, D, device=harness.DEVICE, dtype=DTYPE) for _ in "qkvd"
        )
        if name == "linear":  # features
            q, k = q.abs(), k.abs()
        return *(x.requires_grad_() for x in (q, k, v)), dout

    inputs = harness.input_sets(make, 4 * B * H * T * D * DTYPE.itemsize)
    peers = {f"{name}, almostgpt": ours, "all scores, masked": plain, "full attention": full}
    example = make()
    harness.check_equal(
        {peer: with_gradients(peers[peer], example) for peer in list(peers)[:2]}, float32=1e-4
    )

    def prepared(function: Attention) -> harness.Peer:
        def peer() -> harness.Work:
            own = next(inputs)
            return lambda: with_gradients(function, own)

        return peer

    works = {peer: prepared(function) for peer, function in peers.items()}
    result = race(works, harness.device_timer(CALLS), seconds=SECONDS)
    title = f"attention forward and backward, {B} x {H} heads x {T} x {D}, {DTYPE}"
    report(table(title, result))
    benchmark.extra_info["tokens_per_second"] = B * T / result.median(next(iter(peers)))


def with_gradients(function: Attention, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *leaves, dout = inputs
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("T", LENGTHS)
def test_attention_of_one_token(T, race, report):
    """A decoding step after T tokens: what does not grow with T, and what does."""
    heads = {"device": harness.DEVICE, "dtype": DTYPE}
    q, k, v = (torch.rand(B, H, 1, D, **heads) for _ in "qkv")
    lengths = torch.full((B,), T, dtype=torch.int32, device=harness.DEVICE)

    def layer(slots: int, window: int | None) -> kernels.KVLayer:
        made = kernels.KVLayer.empty(B, H, slots, D, window=window, **heads)
        made.lengths.copy_(lengths)
        return made

    everything, ring = layer(T + 1, None), layer(2 * WINDOW, WINDOW)
    drawn = random_blocks(0, H, -(-(T + 1) // BLOCK), 3, 1, 2).to(harness.DEVICE)
    pattern = kernels.BlockPattern(BLOCK, 3, 1, drawn)
    keys, values = (torch.randn(B, H, T + 1, D, **heads) for _ in "kv")
    state = kernels.LinearState.empty(B, H, D, **heads)

    def block_sparse() -> Tensor:
        return kernels.block_sparse_attention(q, keys, values, pattern, start=lengths)

    works = {
        "linear": lambda: kernels.linear_attention(q, k, v, state=state),
        "sliding_window": lambda: kernels.decode_attention(q, ring),
        "block_sparse": block_sparse,
        "full": lambda: kernels.decode_attention(q, everything),
    }
    peers = {name: lambda work=work: torch.no_grad()(work) for name, work in works.items()}
    result = race(peers, harness.device_timer(16), seconds=SECONDS)
    report(table(f"attention of 1 token after {T}, {B} x {H} heads of {D}, {DTYPE}", result))


@pytest.mark.parametrize("tokens", [8192] if ON_CUDA else [16, 768])
def test_experts_forward_and_backward(tokens, race, report):
    """8 experts, 2 a token: against a loop over experts, and a dense layer of a token's matrices."""
    width = 1024 if ON_CUDA else 128
    torch.manual_seed(0)
    config = resolve_model(GPTConfig(n_embd=width, n_head=4, feedforward="moe"))
    experts = MixtureOfExperts(config).to(harness.DEVICE)
    dense = SwiGLU(resolve_model(GPTConfig(n_embd=width, n_head=4))).to(harness.DEVICE)
    for parameter in [*experts.parameters(), *dense.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(1, tokens, width, device=harness.DEVICE, requires_grad=True)
    upstream = torch.randn_like(x)

    def gradients(layer: Callable[[Tensor], Tensor], module: torch.nn.Module) -> list[Tensor]:
        with torch.autocast(harness.DEVICE.type, torch.bfloat16, enabled=ON_CUDA):
            y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream.to(y.dtype))]

    peers = {
        "almostgpt": lambda: gradients(lambda x: experts(x)[0], experts),
        "a loop over experts": lambda: gradients(lambda x: looped(experts, x), experts),
        "dense": lambda: gradients(lambda x: dense(x)[0], dense),
    }
    harness.check_equal({name: peers[name]() for name in list(peers)[:2]}, float32=1e-4)
    works = {name: lambda work=work: work for name, work in peers.items()}
    result = race(works, harness.device_timer(CALLS), seconds=SECONDS)
    report(table(f"mixture of experts, {tokens} tokens of {width}, forward and backward", result))


def looped(experts: MixtureOfExperts, x: Tensor) -> Tensor:
    """As models of transformers do it: of each expert its tokens, found on the host."""
    rows = x.flatten(0, 1)
    logits = rows.float() @ experts.router.weight.T
    weight, chosen = logits.softmax(-1).topk(experts.k)
    weight = weight / weight.sum(-1, keepdim=True)
    out = torch.zeros_like(rows)
    for e in range(experts.n_experts):
        token, place = torch.where(chosen == e)
        hidden = kernels.swiglu(torch.nn.functional.linear(rows[token], experts.gate_up.weight[e]))
        y = torch.nn.functional.linear(hidden, experts.down.weight[e])
        out = out.index_add(0, token, (y * weight[token, place, None]).to(out.dtype))
    return out.view_as(x)


def table(title: str, race: harness.Race) -> harness.Table:
    ours = next(iter(race.peers))
    rows = [
        [name, 1e6 * race.median(name), 100 * race.spread(name), race.speedup(ours, over=name)]
        for name in race.peers
    ]
    return harness.Table(title, ("", "us", "± %", f"{ours} is faster by"), rows)
