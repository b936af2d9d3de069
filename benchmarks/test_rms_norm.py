"""RMSNorm, forward and backward: our best backend against torch's own and a compiled reference.

It moves bytes and hardly computes, so the figure that counts is the share of the bandwidth that a
plain copy reaches on the same device in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels
from almostgpt.kernels.rms_norm import reference

from . import harness

EPS = 1e-5
ON_CUDA = harness.DEVICE.type == "cuda"
SHAPES = [(16384, 4096), (8192, 8192), (32768, 768)] if ON_CUDA else [(768, 128), (2048, 768)]
DTYPES = [torch.bfloat16, torch.float32] if ON_CUDA else [torch.float32]
CALLS = 8 if ON_CUDA else 4


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rms_norm(shape, dtype, direction, race, report, benchmark, copy_bandwidth):
    rows, width = shape
    tensor_bytes = rows * width * dtype.itemsize
    # Each input read once, each output written once: x, y; or dy, x, dx.
    moved = tensor_bytes * (2 if direction == "forward" else 3)

    def make() -> tuple[torch.Tensor, ...]:
        x = torch.randn(shape, device=harness.DEVICE, dtype=dtype)
        weight = torch.randn(width, device=harness.DEVICE, dtype=dtype)
        return x, weight, torch.randn_like(x)

    inputs = harness.input_sets(make, 2 * tensor_bytes)
    functions, notes = peers(*next(inputs)[:2])
    peer = forward_peer if direction == "forward" else backward_peer
    contestants = {name: peer(function, inputs) for name, function in functions.items()}
    result = race(contestants, harness.device_timer(CALLS), seconds=3)

    ours = next(iter(functions))
    report(
        harness.Table(
            f"rms_norm {direction}, {rows} x {width}, {dtype}; "
            f"a copy moves {copy_bandwidth / 1e9:.0f} GB/s",
            ("", "us", "± %", "GB/s", "% of copy", "ours is faster by"),
            [
                [
                    name,
                    1e6 * result.median(name),
                    100 * result.spread(name),
                    moved / result.median(name) / 1e9,
                    100 * moved / result.median(name) / copy_bandwidth,
                    result.speedup(ours, over=name),
                ]
                for name in functions
            ],
            notes,
        )
    )
    benchmark.extra_info["bytes_per_second"] = moved / result.median(ours)
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


def peers(x: torch.Tensor, weight: torch.Tensor) -> tuple[dict[str, Callable], list[str]]:
    """Functions of (x, weight), ours first; and why a peer is absent."""
    functions = {
        f"almostgpt ({kernels.explain('rms_norm', x, weight, EPS).backend})": (
            lambda x, weight: kernels.rms_norm(x, weight, EPS)
        ),
        "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    }
    trouble = harness.compile_trouble()
    if trouble:
        return functions, [f"no compiled reference: {trouble}"]
    compiled = torch.compile(reference, dynamic=False)
    functions["compiled reference"] = lambda x, weight: compiled(x, weight, EPS)
    return functions, []


def forward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        x, weight, _ = next(inputs)

        @torch.no_grad()
        def work():
            return function(x, weight)

        return work

    return get_ready


def backward_peer(function: Callable, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        x, weight, dy = next(inputs)
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function(x, weight)  # its graph serves one backward
        return lambda: torch.autograd.grad(y, (x, weight), dy)

    return get_ready
