"""SwiGLU, GELU and ReLU², forward and backward.

Our best backend against torch's own ops, a compiled reference and Liger's Triton kernels. They move
bytes and hardly compute, so the figure that counts is the share of the bandwidth that a plain copy
reaches on the same device in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt import kernels
from almostgpt.kernels.activations_reference import plain

from . import harness

ON_CUDA = harness.DEVICE.type == "cuda"
if ON_CUDA:
    BF16, FP32 = torch.bfloat16, torch.float32
    CASES = [(16384, 4096, BF16), (8192, 11008, BF16), (32768, 2048, BF16), (16384, 4096, FP32)]
else:
    CASES = [(256, 2048, torch.float32), (768, 352, torch.float32)]
CALLS = 8 if ON_CUDA else 4
SECONDS = 1.5

# Tensors of the result's size that are read or written at the least, each once.
MOVED = {
    ("swiglu", "forward"): 3,  # gate, up, y
    ("swiglu", "backward"): 5,  # dy, gate, up, dgate, dup
    ("gelu", "forward"): 2,  # x, y
    ("gelu", "backward"): 3,  # dy, x, dx
    ("relu_squared", "forward"): 2,
    ("relu_squared", "backward"): 3,
}


@pytest.mark.parametrize("op, direction", MOVED, ids=map("-".join, MOVED))
@pytest.mark.parametrize(
    "rows, hidden, dtype",
    CASES,
    ids=[f"{r}x{h}-{str(d).removeprefix('torch.')}" for r, h, d in CASES],
)
def test_activation(rows, hidden, dtype, op, direction, race, report, benchmark, copy_bandwidth):
    moved = rows * hidden * dtype.itemsize * MOVED[op, direction]

    def make() -> Inputs:
        columns = 2 * hidden if op == "swiglu" else hidden
        return tuple(
            torch.randn(rows, width, device=harness.DEVICE, dtype=dtype)
            for width in (columns, hidden)
        )

    inputs = harness.input_sets(make, moved)
    functions, notes = peers(op, next(inputs)[0])
    peer = forward_peer if direction == "forward" else backward_peer
    contestants = {name: peer(function, inputs) for name, function in functions.items()}
    example = make()
    results = {name: with_gradient(function, example) for name, function in functions.items()}
    harness.check_equal(results)
    result = race(contestants, harness.device_timer(CALLS), seconds=SECONDS)

    ours = next(iter(functions))
    title = f"{op} {direction}, {rows} x {hidden}, {dtype}"
    report(harness.bandwidth_table(title, result, moved, copy_bandwidth, notes))
    benchmark.extra_info["bytes_per_second"] = moved / result.median(ours)
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


# ---------------------------------------------------------------- peers

Inputs = tuple[Tensor, Tensor]  # x, and the gradient of the result
OURS = {"swiglu": kernels.swiglu, "gelu": kernels.gelu, "relu_squared": kernels.relu_squared}


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


TORCH = {
    "swiglu": ("chunk, F.silu, ·", torch_swiglu),
    "gelu": ("F.gelu", F.gelu),
    "relu_squared": ("F.relu, square", lambda x: F.relu(x).square()),
}


def liger_swiglu(gate_up: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    # It takes the halves as tensors of their own, and writes their gradients over them.
    return LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))


def peers(op: str, x: Tensor) -> tuple[dict[str, Callable], list[str]]:
    """Functions of x, ours first; and why a peer is absent."""
    name, eager = TORCH[op]
    functions = {f"almostgpt ({kernels.explain(op, x).backend})": OURS[op], name: eager}
    notes = []
    if trouble := harness.compile_trouble():
        notes.append(f"no compiled reference: {trouble}")
    else:
        torch.compiler.reset()  # else the eighth shape would find the limit of recompilations
        activation, gated = ("silu", True) if op == "swiglu" else (op, False)
        functions["compiled reference"] = torch.compile(
            partial(plain, activation=activation, gated=gated), dynamic=False
        )
    if op == "swiglu":
        if trouble := harness.liger_trouble():
            notes.append(f"no Liger: {trouble}")
        else:
            functions["Liger"] = liger_swiglu
    return functions, notes


def forward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        x, _ = next(inputs)
        return torch.no_grad()(lambda: function(x))

    return get_ready


def backward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        x, dy = next(inputs)
        leaf = x.detach().requires_grad_()
        y = function(leaf)  # a graph for one backward
        return lambda: torch.autograd.grad(y, leaf, dy)

    return get_ready


def with_gradient(function: Callable, example: Inputs) -> tuple[Tensor, ...]:
    x, dy = example
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y, *torch.autograd.grad(y, leaf, dy)
