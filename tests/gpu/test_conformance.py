"""Every op's CUDA kernel against float64 on a fixed grid of shapes; the errors are recorded.

The rule: at most twice the error of the same maths by PyTorch in the kernel's own dtype, plus a few
units in the last place of the largest term. ``--junitxml`` keeps the measured errors.
"""

from __future__ import annotations

import pytest
import torch

from almostgpt import kernels

pytestmark = pytest.mark.conformance

RMS_NORM_SHAPES = [
    *((1, n) for n in (1, 7, 8, 33, 128, 768, 1000, 4096, 8192, 65536)),
    *((m, 768) for m in (2, 31, 113, 1023, 16384)),
    (3, 5, 203),
    (0, 128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", RMS_NORM_SHAPES, ids=str)
def test_rms_norm(shape, dtype, record_property):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device="cuda", dtype=dtype)
    exact = gradients(plain_rms_norm, x.double(), weight.double(), dy.double())
    plain = gradients(plain_rms_norm, x, weight, dy)
    with kernels.use_backend("cuda"):
        ours = gradients(kernels.rms_norm, x, weight, dy)
    # dweight sums a term for every row, so its rounding is relative to the sum of their sizes.
    x_hat = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    terms = (dy.double() * x_hat).abs().reshape(-1, shape[-1]).sum(0)
    sizes = (exact[0].abs(), exact[1].abs(), terms)
    for name, got, peer, truth, size in zip(
        ("y", "dx", "dweight"), ours, plain, exact, sizes, strict=True
    ):
        error, bound = largest(got - truth), 2 * largest(peer - truth)
        # A gradient is a difference of terms of about the size of 1.
        bound += 4 * torch.finfo(dtype).eps * max(1.0, largest(size))
        record_property(f"{name} error", f"{error:.3g}")
        record_property(f"{name} bound", f"{bound:.3g}")
        assert error <= bound, name


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def gradients(norm, x, weight, dy) -> tuple[torch.Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = norm(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
