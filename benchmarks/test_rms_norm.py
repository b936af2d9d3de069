"""RMSNorm, forward and backward, alone and with the residual connection before it.

Our best backend against torch's own, a compiled reference and Liger's Triton kernel. The op moves
bytes and hardly computes, so the figure that counts is the share of the bandwidth that a plain copy
reaches on the same device in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels
from almostgpt.kernels import emulator
from almostgpt.kernels.rms_norm import reference

from . import harness

EPS = 1e-5
ON_CUDA = harness.DEVICE.type == "cuda"
if ON_CUDA:
    BF16, FP32 = torch.bfloat16, torch.float32
    CASES = [(16384, 4096, BF16), (8192, 8192, BF16), (32768, 768, BF16), (16384, 4096, FP32)]
else:
    CASES = [(768, 128, torch.float32), (2048, 768, torch.float32)]
CALLS = 8 if ON_CUDA else 4
SECONDS = 1.5

# Tensors of x's size that are read or written at the least, each once.
MOVED = {
    ("rms_norm", "forward"): ("x", "y"),
    ("rms_norm", "backward"): ("dy", "x", "dx"),
    ("add_rms_norm", "forward"): ("x", "residual", "sum", "y"),
    ("add_rms_norm", "backward"): ("dy", "dsum", "sum", "dx"),
}


@pytest.mark.parametrize("variant, direction", MOVED, ids=map("-".join, MOVED))
@pytest.mark.parametrize(
    "rows, width, dtype",
    CASES,
    ids=[f"{r}x{w}-{str(d).removeprefix('torch.')}" for r, w, d in CASES],
)
def test_rms_norm(rows, width, dtype, variant, direction, race, report, benchmark, copy_bandwidth):
    tensor_bytes = rows * width * dtype.itemsize
    moved = tensor_bytes * len(MOVED[variant, direction])

    def make() -> Inputs:
        return make_inputs(rows, width, dtype, variant)

    inputs = harness.input_sets(make, moved)
    functions, notes = peers(next(inputs))
    peer = forward_peer if direction == "forward" else backward_peer
    contestants = {name: peer(function, inputs) for name, function in functions.items()}
    example = make()
    results = {name: with_gradients(function, example) for name, function in functions.items()}
    harness.check_equal(results)
    result = race(contestants, harness.device_timer(CALLS), seconds=SECONDS)

    ours = next(iter(functions))
    title = f"{variant} {direction}, {rows} x {width}, {dtype}"
    report(harness.bandwidth_table(title, result, moved, copy_bandwidth, notes))
    benchmark.extra_info["bytes_per_second"] = moved / result.median(ours)
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


@pytest.mark.skipif(ON_CUDA, reason="the emulator runs on the CPU")
@pytest.mark.parametrize("variant", ["rms_norm", "add_rms_norm"])
def test_emulator(variant, race, report):
    """The CUDA source, run and checked thread by thread: how long tests that use it take."""
    if trouble := emulator.refuse():
        pytest.skip(trouble)
    rows, width = 8, 1024
    example = make_inputs(rows, width, torch.bfloat16, variant)

    def emulated(x, weight, residual):
        with kernels.use_backend("emulator"):
            return kernels.rms_norm(x, weight, EPS, residual)

    functions = {
        "emulator": emulated,
        "reference": lambda x, weight, residual: reference(x, weight, EPS, residual),
    }
    results = {name: with_gradients(function, example) for name, function in functions.items()}
    harness.check_equal(results)
    contestants = {
        name: lambda function=function: lambda: with_gradients(function, example)
        for name, function in functions.items()
    }
    result = race(contestants, harness.wall_timer(1), seconds=SECONDS)
    report(
        harness.Table(
            f"{variant} in the emulator, forward and backward, {rows} x {width}, bfloat16",
            ("", "ms", "± %"),
            [[name, 1e3 * result.median(name), 100 * result.spread(name)] for name in functions],
        )
    )


# ---------------------------------------------------------------- peers

# x, weight, residual or None, and the gradients of the outputs
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]


def make_inputs(rows: int, width: int, dtype: torch.dtype, variant: str) -> Inputs:
    x, residual, dy, dsum = (
        torch.randn(rows, width, device=harness.DEVICE, dtype=dtype) for _ in range(4)
    )
    weight = torch.randn(width, device=harness.DEVICE, dtype=dtype)
    if variant == "rms_norm":
        return x, weight, None, (dy,)
    return x, weight, residual, (dy, dsum)


def peers(example: Inputs) -> tuple[dict[str, Callable], list[str]]:
    """Functions of (x, weight, residual), ours first; and why a peer is absent."""
    x, weight, residual, _ = example
    backend = kernels.explain("rms_norm", x, weight, EPS, residual).backend
    functions = {
        f"almostgpt ({backend})": lambda x, w, residual: kernels.rms_norm(x, w, EPS, residual),
        "F.rms_norm" if residual is None else "add, F.rms_norm": torch_rms_norm,
    }
    notes = []
    if trouble := harness.compile_trouble():
        notes.append(f"no compiled reference: {trouble}")
    else:
        torch.compiler.reset()  # else the eighth shape would find the limit of recompilations
        compiled = torch.compile(reference, dynamic=False)
        functions["compiled reference"] = lambda x, w, residual: compiled(x, w, EPS, residual)
    if trouble := harness.liger_trouble():
        notes.append(f"no Liger: {trouble}")
    else:
        functions["Liger"] = liger_rms_norm
    return functions, notes


def torch_rms_norm(x, weight, residual):
    if residual is None:
        return F.rms_norm(x, weight.shape, weight, EPS)
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def liger_rms_norm(x, weight, residual):
    from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerRMSNormFunction

    # in_place would write dx over dy, which the other peers read, too.
    if residual is None:
        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def forward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        x, weight, residual, _ = next(inputs)

        @torch.no_grad()
        def work():
            return function(x, weight, residual)

        return work

    return get_ready


def backward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        leaves, outputs, upstream = forward(function, next(inputs))  # a graph for one backward
        return lambda: torch.autograd.grad(outputs, leaves, upstream)

    return get_ready


def with_gradients(function: Callable, example: Inputs) -> tuple[torch.Tensor, ...]:
    leaves, outputs, upstream = forward(function, example)
    return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))


def forward(function: Callable, example: Inputs) -> tuple[list, tuple, tuple]:
    """The inputs as leaves of a graph, the outputs, and their gradients."""
    *inputs, upstream = example
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = function(*inputs)
    leaves = [t for t in inputs if t is not None]
    return leaves, outputs if isinstance(outputs, tuple) else (outputs,), upstream
