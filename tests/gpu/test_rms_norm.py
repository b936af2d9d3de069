"""The CUDA kernels of RMSNorm against float64, on a GPU."""

import pytest
import torch
from rms_norm_truth import assert_close_to_float64, make, with_gradients

from almostgpt import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPES = [(1, 1), (0, 8), (7,), (113, 203), (3, 5, 768), (2, 65536), (70000, 33), (4096, 1)]


def by_cuda(x, weight, residual=None):
    with kernels.use_backend("cuda"):
        return kernels.rms_norm(x, weight, residual=residual)


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, wide_weight):
    *leading, n = shape
    x, weight, residual, dy, dsum = make(leading, n, dtype, wide_weight, device="cuda")
    assert_close_to_float64(by_cuda, (x, weight), (dy,))
    assert_close_to_float64(by_cuda, (x, weight, residual), (dy, dsum))


def test_strides():
    torch.manual_seed(0)
    wide = torch.randn(6, 5, 100, device="cuda")
    weight = torch.randn(40, device="cuda")
    rows = wide[:, :, 10:50]  # one row stride, read in place
    every_other = wide[:, ::2, 10:50]  # no single row stride: copied
    across = torch.randn(40, 30, device="cuda").t()
    expanded = torch.randn(1, 40, device="cuda").expand(9, 40)
    for x in (rows, every_other, across, expanded):
        for dy in (
            torch.randn(x.shape, device="cuda"),
            torch.ones(1, device="cuda").expand(x.shape),
        ):
            assert_close_to_float64(by_cuda, (x, weight), (dy,))


def test_the_same_bits_every_run():
    x, dy = torch.randn(2, 5000, 768, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(768, device="cuda")
    first = with_gradients(by_cuda, (x, weight), (dy,))
    for _ in range(5):
        for a, b in zip(first, with_gradients(by_cuda, (x, weight), (dy,)), strict=True):
            assert torch.equal(a, b)


def test_it_runs_on_the_current_stream():
    x, weight = torch.randn(4096, 4096, device="cuda"), torch.randn(4096, device="cuda")
    expected = by_cuda(x, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x.mul(2.0).div(2.0)
        got = by_cuda(late, weight)
    stream.synchronize()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("columns", [33, 2**16])
def test_more_than_2_to_the_31_elements(columns):
    rows = 2**31 // columns + 100
    if torch.cuda.mem_get_info()[0] < 5 * rows * columns * 2:
        pytest.skip("needs 22 GB of free GPU memory")
    weight = torch.randn(columns, device="cuda")
    x = torch.ones(rows, columns, device="cuda", dtype=torch.bfloat16)
    x[-50:] = torch.randn(50, columns, device="cuda").bfloat16()
    dy = x.flip(1)
    y, dx, _ = with_gradients(by_cuda, (x, weight), (dy,))
    tail_y, tail_dx, _ = with_gradients(by_cuda, (x[-50:].clone(), weight), (dy[-50:].clone(),))
    assert torch.equal(y[-50:], tail_y) and torch.equal(dx[-50:], tail_dx)


def test_compiles_whole():
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    weight = torch.randn(256, device="cuda", requires_grad=True)
    compiled = torch.compile(kernels.rms_norm, fullgraph=True)
    compiled(x, weight).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert kernels.explain("rms_norm", x, weight).backend == "cuda"
