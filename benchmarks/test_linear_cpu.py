"""Linear layers of decoding on a processor: our C++ kernels against PyTorch's own.

A step of decoding reads every weight once, so the figure that counts is bytes of weights a second. Each
call has a weight that no cache holds: the layers of the model together are larger than those. The
weights of int8 are a quarter of the bytes, and read by an own kernel.

What we aim at on 2 cores of an AMD EPYC (Zen 4), one row; nothing is asserted:

    float32     twice F.linear
    int8        3 times our float32
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels
from almostgpt.kernels import cpu

from . import harness

pytestmark = [
    pytest.mark.skipif(harness.DEVICE.type != "cpu", reason="the C++ kernels are for a processor"),
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ kernels: {cpu.missing()}"),
]
# (K, N) of gpt2's layers: queries, keys and values; the output projections; the head.
LAYERS = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768)}
BYTES = 256 << 20  # of float32 weights, several times what caches hold
SECONDS = 2


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_linear(name, rows, race, report, benchmark):
    K, N = LAYERS[name]
    x, bias = torch.randn(rows, K), torch.randn(N)
    weights = [torch.randn(N, K) for _ in range(max(2, BYTES // (4 * N * K)))]
    quantized = [kernels.quantize_rows(weight) for weight in weights]
    dense, small = itertools.cycle(weights), itertools.cycle(quantized)

    def ours():
        weight = next(dense)
        return lambda: kernels.linear(x, weight, bias)

    def pytorch():
        weight = next(dense)
        return lambda: F.linear(x, weight, bias)

    def int8():
        codes, scales = next(small)
        return lambda: kernels.int8_linear(x, codes, scales, bias)

    harness.check_equal({"ours": (ours()(),), "again": (F.linear(x, weights[0], bias),)})
    peers = {
        f"linear ({kernels.explain('linear', x, weights[0], bias).backend})": ours,
        "F.linear": pytorch,
        f"int8_linear ({cpu.best()})": int8,
    }
    with torch.no_grad():
        result = race(peers, harness.wall_timer(min(len(weights), 16)), seconds=SECONDS)
    moved = {label: N * K * (1 if label.startswith("int8") else 4) for label in peers}
    first = next(iter(peers))
    report(
        harness.Table(
            f"{name}, {rows} x {K} by {N} x {K}, {torch.get_num_threads()} threads",
            ("", "us", "± %", "GB/s of weight", "times F.linear"),
            [
                [
                    label,
                    1e6 * result.median(label),
                    100 * result.spread(label),
                    moved[label] / result.median(label) / 1e9,
                    result.speedup(label, over="F.linear"),
                ]
                for label in peers
            ],
        )
    )
    benchmark.extra_info["bytes_per_second"] = moved[first] / result.median(first)
