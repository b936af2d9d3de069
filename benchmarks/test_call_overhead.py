"""What a call costs besides its work, in eager mode: ours against torch's own op, on a tiny tensor.

Argument checks, the choice of a backend, autograd and, on a GPU, the launches. Small models are
limited by it.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels
from almostgpt.kernels.rms_norm import _RMSNorm

from . import harness

SHAPE = (8, 64)
CALLS = 100
EPS = 1e-5
DIRECTIONS = ["no gradient", "forward", "forward and backward"]


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    """x, weight and the gradient of y."""
    x, dy = (torch.randn(SHAPE, device=harness.DEVICE) for _ in range(2))
    return x, torch.randn(SHAPE[1], device=harness.DEVICE), dy


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rms_norm_overhead(direction, tensors, race, report, benchmark):
    x, weight, _ = tensors
    functions = {
        f"almostgpt ({kernels.explain('rms_norm', x, weight).backend})": kernels.rms_norm,
        "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
    }
    measure("a call of rms_norm", functions, direction, tensors, race, report, benchmark)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attaching_the_backward(direction, tensors, race, report, benchmark):
    """Two ways to give the same ops a gradient; on a CPU the ops are the reference maths."""
    ops = torch.ops.almostgpt
    if harness.DEVICE.type == "cuda" and (why := kernels.native.NATIVE.refuse()):
        pytest.skip(why)
    functions = {
        "autograd.Function": lambda x, weight: _RMSNorm.apply(ops, x, None, weight, EPS),
        "register_autograd": lambda x, weight: ops.rms_norm_forward(x, weight, EPS)[0],
    }
    measure("the ops of rms_norm", functions, direction, tensors, race, report, benchmark)


def measure(what, functions, direction, tensors, race, report, benchmark) -> None:
    """Races functions of (x, weight), ours first."""
    x, weight, dy = tensors
    harness.check_equal({name: (function(x, weight),) for name, function in functions.items()})
    if direction != "no gradient":
        x.requires_grad_(), weight.requires_grad_()

    def peer(function) -> harness.Peer:
        def forward():
            return function(x, weight)

        def forward_and_backward():
            return torch.autograd.grad(function(x, weight), (x, weight), dy)

        work = forward_and_backward if direction == "forward and backward" else forward
        return lambda: torch.no_grad()(work) if direction == "no gradient" else work

    contestants = {name: peer(function) for name, function in functions.items()}
    result = race(contestants, harness.wall_timer(CALLS), seconds=1)
    ours = next(iter(functions))
    report(
        harness.Table(
            f"{what} on {SHAPE[0]} x {SHAPE[1]}, {direction}",
            ("", "us", "± %", "ours is faster by"),
            [
                [
                    name,
                    1e6 * result.median(name),
                    100 * result.spread(name),
                    result.speedup(ours, over=name),
                ]
                for name in functions
            ],
        )
    )
    benchmark.extra_info["us_per_call"] = 1e6 * result.median(ours)
