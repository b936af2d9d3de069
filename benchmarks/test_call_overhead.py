"""What a call costs besides its work, in eager mode: ours against torch's own op, on a tiny tensor.

Argument checks, the choice of a backend, autograd and, on a GPU, the launches. Small models are
limited by it.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels

from . import harness

SHAPE = (8, 64)
CALLS = 100


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_rms_norm_overhead(direction, race, report, benchmark):
    x, dy = (torch.randn(SHAPE, device=harness.DEVICE) for _ in range(2))
    weight = torch.randn(SHAPE[1], device=harness.DEVICE)
    ours = f"almostgpt ({kernels.explain('rms_norm', x, weight).backend})"
    functions = {
        ours: kernels.rms_norm,
        "F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
    }
    harness.check_equal({name: (function(x, weight),) for name, function in functions.items()})

    def peer(function) -> harness.Peer:
        def forward():
            return function(x, weight)

        def forward_and_backward():
            return torch.autograd.grad(function(x, weight), (x, weight), dy)

        if direction == "forward":
            return lambda: forward
        x.requires_grad_(), weight.requires_grad_()
        return lambda: forward_and_backward

    contestants = {name: peer(function) for name, function in functions.items()}
    result = race(contestants, harness.wall_timer(CALLS), seconds=1)
    report(
        harness.Table(
            f"a call of rms_norm on {SHAPE[0]} x {SHAPE[1]}, {direction}",
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
