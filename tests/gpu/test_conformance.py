"""Every op's CUDA kernel against float64 on a fixed grid of shapes; the errors are recorded.

The rule: at most twice the error of the same maths by PyTorch in the kernel's own dtype, plus a few
units in the last place of the largest term. ``--junitxml`` keeps the measured errors.
"""

from __future__ import annotations

import pytest
import torch
from rms_norm_truth import deviations, make

from almostgpt import kernels

pytestmark = pytest.mark.conformance

RMS_NORM_SHAPES = [
    *((1, n) for n in (1, 7, 8, 33, 128, 768, 1000, 4096, 8192, 65536)),
    # one plan of threads and vectors after the other, and the rows that fit no plan
    *((300, n) for n in (16, 256, 1024, 1600, 2048, 5120, 8192, 16384, 24576, 32768, 40000)),
    *((m, 768) for m in (2, 31, 113, 1023, 16384)),
    (3, 5, 203),
    (0, 128),
]


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", RMS_NORM_SHAPES, ids=str)
def test_rms_norm(shape, dtype, with_residual, record_property):
    *leading, n = shape
    x, weight, residual, dy, dsum = make(leading, n, dtype, device="cuda")
    inputs, upstream = (
        ((x, weight, residual), (dy, dsum)) if with_residual else ((x, weight), (dy,))
    )
    for deviation in deviations(our_rms_norm, inputs, upstream):
        record_property(f"{deviation.name} error", f"{deviation.error:.3g}")
        record_property(f"{deviation.name} bound", f"{deviation.bound:.3g}")
        assert deviation.error <= deviation.bound, deviation


def our_rms_norm(x, weight, residual=None):
    with kernels.use_backend("cuda"):
        return kernels.rms_norm(x, weight, residual=residual)
