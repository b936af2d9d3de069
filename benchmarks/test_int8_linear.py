"""A linear layer whose weight is int8, for the few rows of a decoding step.

``int8_linear`` on our best backend against the layer that it stands for, ``F.linear`` with a weight of
16 bits (on a CPU float32), and against its own definition: plain, compiled, and by PyTorch's int8 kernel
where it has one. What takes time is reading the weight, so the figure that counts is the share of the
bandwidth that a plain copy reaches on the same device in the same run. Each row's bytes are its own: the
weight once, in the bits that it has, scales, bias, x once and y once.

What we aim at on an H200; nothing is asserted: 75 % of a copy for 1 to 8 rows and weights of 30 MB and
more. Smaller ones take as long as a launch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt import kernels
from almostgpt.kernels.int8_linear import reference

from . import harness

ON_CUDA = harness.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
SECONDS = 0.5

# Outputs and inputs of layers.
if ON_CUDA:
    SIZES = {
        "gpt2, out of attention": (768, 768),
        "gpt2, into the MLP": (3072, 768),
        "gpt2, out of the MLP": (768, 3072),
        "gpt2, vocabulary": (50257, 768),
        "gpt2-xl, into attention": (4800, 1600),
        "gpt2-xl, out of the MLP": (1600, 6400),
        "gpt2-xl, vocabulary": (50257, 1600),
        "8B, into the MLP": (28672, 4096),
    }
    ROWS = (1, 4, 8, 16)
else:
    SIZES = {"gpt2, out of attention": (768, 768), "gpt2, into the MLP": (3072, 768)}
    ROWS = (1, 8)


class Inputs(NamedTuple):
    """x (rows, K); a layer of N outputs, and the same with int8 codes."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    codes: Tensor
    scales: Tensor

    def moved(self, weight: Tensor) -> int:
        """Bytes at the least, with this weight."""
        rows, (N, K) = self.x.shape[0], weight.shape
        int8 = weight.dtype == torch.int8
        return N * K * weight.itemsize + 4 * N * int8 + (rows * (K + N) + N) * DTYPE.itemsize


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_int8_linear(size, rows, race, report, benchmark, copy_bandwidth):
    N, K = SIZES[size]
    inputs = harness.input_sets(lambda: make_inputs(rows, N, K), N * K)
    example = next(inputs)
    layers, notes = peers(example)
    results = {name: (layer(example),) for name, layer in layers.items() if name != "F.linear"}
    held = kernels.dequantize_rows(example.codes, example.scales, DTYPE)
    results["a layer of what the codes stand for"] = (F.linear(example.x, held, example.bias),)
    harness.check_equal(results, float32=1e-4)  # on a processor ours takes x in 16 bits
    contestants = {name: peer(layer, inputs) for name, layer in layers.items()}
    calls = 16 if ON_CUDA else 4
    result = race(contestants, harness.device_timer(calls), seconds=SECONDS)

    ours = next(iter(layers))
    title = f"{size}, {rows} x {K} by {N}, {DTYPE}; a copy moves {copy_bandwidth / 1e9:.0f} GB/s"

    def row(name: str) -> list[str | float]:
        moved = example.moved(example.weight if name == "F.linear" else example.codes)
        rate = moved / result.median(name)
        return [
            name,
            1e6 * result.median(name),
            100 * result.spread(name),
            rate / 1e9,
            100 * rate / copy_bandwidth,
            result.speedup(ours, over=name),
        ]

    columns = ("", "us", "± %", "GB/s", "% of copy", "ours is faster by")
    report(harness.Table(title, columns, [row(name) for name in layers], notes))
    benchmark.extra_info["bytes_per_second"] = example.moved(example.codes) / result.median(ours)
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


def make_inputs(rows: int, N: int, K: int) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=harness.DEVICE, dtype=DTYPE)

    weight = normal(N, K)
    return Inputs(normal(rows, K), weight, normal(N), *kernels.quantize_rows(weight))


# ---------------------------------------------------------------- peers

Layer = Callable[[Inputs], Tensor]


def peers(example: Inputs) -> tuple[dict[str, Layer], list[str]]:
    """Those that run here, ours first; and why the others do not."""
    quantised = (example.codes, example.scales, example.bias)
    backend = kernels.explain("int8_linear", example.x, *quantised).backend
    found: dict[str, Layer] = {
        f"almostgpt ({backend})": lambda i: kernels.int8_linear(i.x, i.codes, i.scales, i.bias),
        "F.linear": lambda i: F.linear(i.x, i.weight, i.bias),
    }
    if backend != "reference":
        found["reference"] = lambda i: reference(i.x, i.codes, i.scales, i.bias)
    notes = []
    if trouble := harness.compile_trouble():
        notes.append(f"no compiled reference: {trouble}")
    else:
        torch.compiler.reset()  # else the eighth shape would find the limit of recompilations
        compiled = torch.compile(reference, dynamic=False)
        found["compiled reference"] = lambda i: compiled(i.x, i.codes, i.scales, i.bias)

    def by_torch(i: Inputs) -> Tensor:
        return torch._weight_int8pack_mm(i.x, i.codes, i.scales.to(i.x.dtype)) + i.bias

    try:
        by_torch(example)
    except Exception as error:  # of another device, dtype or release
        notes.append(f"no torch._weight_int8pack_mm: {str(error).splitlines()[0][:100]}")
    else:
        found["torch int8pack"] = by_torch
    return found, notes


def peer(layer: Layer, inputs) -> harness.Peer:
    def get_ready() -> harness.Work:
        each = next(inputs)

        @torch.no_grad()
        def work():
            return layer(each)

        return work

    return get_ready
