"""The loss of a model: output projection and cross-entropy, and cross-entropy alone.

Time and memory count alike: the logits of a large vocabulary are the largest tensor of a training
step. Peaks are what a call takes beyond its inputs; the weight's gradient, which everybody makes,
is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels

from . import harness

ON_CUDA = harness.DEVICE.type == "cuda"


@dataclass(frozen=True)
class Case:
    tokens: int
    width: int
    vocab_size: int
    padded: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}x{self.vocab_size}"


if ON_CUDA:
    CASES = [
        Case(16384, 768, 50257, 50304, torch.bfloat16),  # GPT-2
        Case(8192, 4096, 128256, 128256, torch.bfloat16),  # Llama 3, as in Liger's figures
    ]
    ROWS = [(16384, 50304, torch.bfloat16), (4096, 128256, torch.bfloat16)]
else:
    CASES = [
        Case(768, 128, 65, 128, torch.float32),
        Case(2048, 768, 50257, 50304, torch.float32),
    ]
    ROWS = [(256, 50304, torch.float32)]
CALLS = 4 if ON_CUDA else 1
SECONDS = 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_cross_entropy(case: Case, race, report, benchmark):
    """Forward and backward, as a training step runs them."""
    functions, notes = linear_peers(case)
    hidden = torch.randn(case.tokens, case.width, device=harness.DEVICE, dtype=case.dtype)
    weight = 0.02 * torch.randn(case.padded, case.width, device=harness.DEVICE, dtype=case.dtype)
    targets = torch.randint(case.vocab_size, (case.tokens,), device=harness.DEVICE)
    inputs = [hidden.requires_grad_(), weight.requires_grad_(), targets]
    works = {name: work(function, inputs) for name, function in functions.items()}
    harness.check_equal({name: run() for name, run in works.items()})
    peaks = {name: harness.peak_bytes(run) for name, run in works.items()}
    result = race(
        {name: lambda run=run: run for name, run in works.items()},
        harness.device_timer(CALLS),
        seconds=SECONDS,
    )
    ours = next(iter(functions))
    # h·Wᵀ, dz·W and dzᵀ·h.
    flops = 3 * 2 * case.tokens * case.width * case.padded
    floor = flops / harness.matmul_rate(case.dtype)
    report(
        harness.Table(
            f"linear cross-entropy forward and backward, {case}, {case.dtype}; "
            f"its products at the rate of a large one take {1e3 * floor:.3g} ms",
            ("", "ms", "± %", "% of product", "peak MiB", "ours is faster by", "and smaller by"),
            [
                [
                    name,
                    1e3 * result.median(name),
                    100 * result.spread(name),
                    100 * floor / result.median(name),
                    peaks[name] / 2**20,
                    result.speedup(ours, over=name),
                    peaks[name] / max(peaks[ours], 1),
                ]
                for name in functions
            ],
            notes,
        )
    )
    benchmark.extra_info["peak_bytes"] = peaks[ours]


def work(function: Callable, inputs: list) -> harness.Work:
    """The loss, and the gradients of hidden states and weight."""

    def run():
        loss = function(*inputs)
        leaves = [t for t in inputs if t.requires_grad]
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return run


def linear_peers(case: Case) -> tuple[dict[str, Callable], list[str]]:
    """Functions of (hidden, weight, targets), ours first; and why a peer is absent."""
    V = case.vocab_size

    def plain(hidden, weight, targets):
        return F.cross_entropy(F.linear(hidden, weight)[:, :V].float(), targets)

    example = (torch.empty(64, case.width, device=harness.DEVICE, dtype=case.dtype),) * 2
    targets = torch.zeros(64, dtype=torch.int64, device=harness.DEVICE)
    backend = kernels.explain("linear_cross_entropy", *example, targets).backend
    functions = {
        f"almostgpt ({backend})": lambda *inputs: kernels.linear_cross_entropy(
            *inputs, vocab_size=V
        ),
        "plain": plain,
    }
    notes = []
    if trouble := harness.compile_trouble():
        notes.append(f"no compiled peer: {trouble}")
    else:
        torch.compiler.reset()
        functions["plain, compiled"] = torch.compile(plain, dynamic=False)
    if trouble := harness.liger_trouble():
        notes.append(f"no Liger: {trouble}")
    elif V != case.padded:
        notes.append("no Liger: it has no padded vocabulary")
    else:
        functions["Liger"] = liger
    return functions, notes


def liger(hidden, weight, targets):
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("rows, columns, dtype", ROWS, ids=[f"{r}x{c}" for r, c, _ in ROWS])
def test_cross_entropy(rows, columns, dtype, race, report, benchmark, copy_bandwidth):
    """On logits that are there, forward and backward: read them twice, write their gradient."""
    logits = torch.randn(rows, columns, device=harness.DEVICE, dtype=dtype).requires_grad_()
    targets = torch.randint(columns, (rows,), device=harness.DEVICE)
    functions = {
        f"almostgpt ({kernels.explain('cross_entropy', logits, targets).backend})": (
            kernels.cross_entropy
        ),
        "plain": lambda logits, targets: F.cross_entropy(logits.float(), targets),
    }
    notes = []
    if trouble := harness.compile_trouble():
        notes.append(f"no compiled peer: {trouble}")
    else:
        torch.compiler.reset()
        functions["plain, compiled"] = torch.compile(functions["plain"], dynamic=False)
    works = {name: work(function, [logits, targets]) for name, function in functions.items()}
    harness.check_equal({name: run() for name, run in works.items()})
    result = race(
        {name: lambda run=run: run for name, run in works.items()},
        harness.device_timer(CALLS),
        seconds=SECONDS,
    )
    moved = 3 * rows * columns * dtype.itemsize
    ours = next(iter(functions))
    title = f"cross-entropy forward and backward, {rows} x {columns}, {dtype}"
    report(harness.bandwidth_table(title, result, moved, copy_bandwidth, notes))
    benchmark.extra_info["bytes_per_second"] = moved / result.median(ours)
