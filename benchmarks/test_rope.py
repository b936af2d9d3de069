"""RoPE on the queries and keys of a fused projection, forward and backward.

Our best backend against the formula written out, compiled, and Liger's Triton kernel. The op moves
bytes and hardly computes, so the figure that counts is the share of the bandwidth that a plain copy
reaches on the same device in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from almostgpt import kernels
from almostgpt.kernels.rope import reference

from . import harness

ON_CUDA = harness.DEVICE.type == "cuda"
if ON_CUDA:
    BF16, FP32 = torch.bfloat16, torch.float32
    # B, T, heads of q and k, D: GPT-2 small, Llama 8B (32 + 8 heads), Llama 1B
    CASES = [(16, 1024, 24, 64, BF16), (8, 4096, 40, 128, BF16), (8, 4096, 40, 64, FP32)]
else:
    CASES = [(12, 64, 8, 32, torch.float32), (1, 256, 24, 64, torch.float32)]
CALLS = 8 if ON_CUDA else 4
SECONDS = 1.5


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "B, T, heads, D, dtype",
    CASES,
    ids=[f"{B}x{T}x{H}x{D}-{str(d).removeprefix('torch.')}" for B, T, H, D, d in CASES],
)
def test_rope(B, T, heads, D, dtype, direction, race, report, benchmark, copy_bandwidth):
    moved = 2 * B * T * heads * D * dtype.itemsize  # x and y, or dy and dx

    def make() -> Inputs:
        return make_inputs(B, T, heads, D, dtype)

    inputs = harness.input_sets(make, moved)
    functions, notes = peers(next(inputs))
    peer = forward_peer if direction == "forward" else backward_peer
    contestants = {name: peer(function, inputs) for name, function in functions.items()}
    example = make()
    results = {name: with_gradient(function, example) for name, function in functions.items()}
    harness.check_equal(results)
    result = race(contestants, harness.device_timer(CALLS), seconds=SECONDS)

    ours = next(iter(functions))
    title = f"rope {direction}, {B} x {T} x {heads} heads of {D}, {dtype}"
    report(harness.bandwidth_table(title, result, moved, copy_bandwidth, notes))
    benchmark.extra_info["bytes_per_second"] = moved / result.median(ours)
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


# ---------------------------------------------------------------- peers

# Queries and keys as a view of the projection, cos, sin, and the gradient of the result.
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(B: int, T: int, heads: int, D: int, dtype: torch.dtype) -> Inputs:
    values = heads // 4
    qkv = torch.randn(B, T, heads + values, D, device=harness.DEVICE, dtype=dtype)
    turns = 10000.0 ** -(torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    angles = torch.outer(torch.arange(T, dtype=torch.float64), turns)
    cos, sin = (table.float().to(harness.DEVICE) for table in (angles.cos(), angles.sin()))
    dy = torch.randn(B, T, heads, D, device=harness.DEVICE, dtype=dtype)
    return qkv[:, :, :heads], cos, sin, dy


def peers(example: Inputs) -> tuple[dict[str, Callable], list[str]]:
    """Functions of (x, cos, sin), ours first; and why a peer is absent."""
    x, cos, sin, _ = example
    backend = kernels.explain("rope", x, cos, sin).backend
    functions = {f"almostgpt ({backend})": kernels.rope, "four products": four_products}
    notes = []
    if trouble := harness.compile_trouble():
        notes.append(f"no compiled reference: {trouble}")
    else:
        torch.compiler.reset()  # else the eighth shape would find the limit of recompilations
        functions["compiled reference"] = torch.compile(reference, dynamic=False)
    if trouble := harness.liger_trouble():
        notes.append(f"no Liger: {trouble}")
    else:
        functions["Liger"] = liger_rope
    return functions, notes


def four_products(x, cos, sin):
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def liger_rope(x, cos, sin):
    from liger_kernel.ops import LigerRopeFunction

    # It takes (B, heads, T, D), tables of the whole width, queries and keys apart, and writes into
    # them: so into copies, as what a model's projection gives it is its own.
    wide = (torch.cat([table, table], dim=-1)[None] for table in (cos, sin))
    q, k = x.transpose(1, 2).clone().split([x.shape[2] - x.shape[2] // 5, x.shape[2] // 5], dim=1)
    return torch.cat(LigerRopeFunction.apply(q, k, *wide), dim=1).transpose(1, 2).contiguous()


def forward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        x, cos, sin, _ = next(inputs)

        @torch.no_grad()
        def work():
            return function(x, cos, sin)

        return work

    return get_ready


def backward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        x, cos, sin, dy = next(inputs)
        x = x.detach().requires_grad_()
        y = function(x, cos, sin)  # a graph for one backward
        return lambda: torch.autograd.grad(y, x, dy)

    return get_ready


def with_gradient(function: Callable, example: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    x, cos, sin, dy = example
    x = x.detach().requires_grad_()
    y = function(x, cos, sin)
    return y, torch.autograd.grad(y, x, dy)[0]
