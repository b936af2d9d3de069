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
    torch.manual_seed(0)
    x, residual, dy, dsum = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
    weight = torch.randn(shape[-1], device="cuda", dtype=dtype)
    inputs, upstream = (x, weight), (dy,)
    if with_residual:
        inputs, upstream = (x, weight, residual), (dy, dsum)
    exact = gradients(plain_rms_norm, [t.double() for t in inputs], [t.double() for t in upstream])
    plain = gradients(plain_rms_norm, inputs, upstream)
    with kernels.use_backend("cuda"):
        ours = gradients(our_rms_norm, inputs, upstream)
    # dweight sums a term for every row, so its rounding is relative to the sum of their sizes.
    total = (x + residual if with_residual else x).double()
    x_hat = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    terms = (dy.double() * x_hat).abs().reshape(-1, shape[-1]).sum(0)
    # And a gradient is a difference, so that of its terms, which may be much larger than itself.
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    slopes = (rstd * dy.double() * weight.double()).abs()
    names = ("y", "sum", "dx", "dweight", "dresidual") if with_residual else ("y", "dx", "dweight")
    for name, got, peer, truth in zip(names, ours, plain, exact, strict=True):
        error, bound = largest(got - truth), 2 * largest(peer - truth)
        relative_to = {"dweight": terms, "dx": slopes, "dresidual": slopes}.get(name, truth)
        size = max(1.0, largest(relative_to))
        bound += 4 * torch.finfo(dtype).eps * size
        record_property(f"{name} error", f"{error:.3g}")
        record_property(f"{name} bound", f"{bound:.3g}")
        assert error <= bound, name


def plain_rms_norm(x, weight, residual=None):
    total = x if residual is None else x + residual
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight
    return y if residual is None else (y, total)


def our_rms_norm(x, weight, residual=None):
    return kernels.rms_norm(x, weight, residual=residual)


def gradients(norm, inputs, upstream) -> tuple[torch.Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = norm(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, upstream)


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
