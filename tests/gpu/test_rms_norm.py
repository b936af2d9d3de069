"""The CUDA kernels of RMSNorm against float64, on a GPU."""

import pytest
import torch

from almostgpt import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SHAPES = [(1, 1), (0, 8), (7,), (113, 203), (3, 5, 768), (2, 65536), (70000, 33), (4096, 1)]


def plain(x, weight, eps=1e-5):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def magnitudes(x, weight, dy, eps=1e-5):
    """The largest terms that y, dx and dweight are sums of: what their rounding is relative to."""
    x, weight, dy = x.double(), weight.double(), dy.double()
    x_hat = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    scale = (dy * weight * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)).abs()
    return (x_hat * weight).abs(), scale, (dy * x_hat).abs().reshape(-1, x.shape[-1]).sum(0)


def with_gradients(norm, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = norm(x, weight)
    return y, *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))


def by_cuda(x, weight):
    with kernels.use_backend("cuda"):
        return kernels.rms_norm(x, weight)


def assert_close_to_float64(x, weight, dy):
    exact = with_gradients(plain, x.double(), weight.double(), dy)
    peer = with_gradients(plain, x, weight, dy)
    got = with_gradients(by_cuda, x, weight, dy)
    sizes = magnitudes(x, weight, dy)
    names = ("y", "dx", "dweight")
    for name, ours, same, truth, size in zip(names, got, peer, exact, sizes, strict=True):
        if truth.numel():
            slack = 4 * torch.finfo(ours.dtype).eps * size.max()
            error = (ours.double() - truth).abs().max()
            assert error <= 2 * (same.double() - truth).abs().max() + slack, name


@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, wide_weight):
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device="cuda").to(torch.float32 if wide_weight else dtype)
    assert_close_to_float64(x, weight, dy)


def test_strides():
    torch.manual_seed(0)
    wide = torch.randn(6, 5, 100, device="cuda")
    weight = torch.randn(40, device="cuda")
    rows = wide[:, :, 10:50]  # one row stride, read in place
    every_other = wide[:, ::2, 10:50]  # no single row stride: copied
    across = torch.randn(40, 30, device="cuda").t()
    expanded = torch.randn(1, 40, device="cuda").expand(9, 40)
    for x in (rows, every_other, across, expanded):
        assert_close_to_float64(x, weight, torch.randn(x.shape, device="cuda"))
        assert_close_to_float64(x, weight, torch.ones(1, device="cuda").expand(x.shape))


def test_the_same_bits_every_run():
    x, dy = torch.randn(2, 5000, 768, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(768, device="cuda")
    first = with_gradients(by_cuda, x, weight, dy)
    for _ in range(5):
        for a, b in zip(first, with_gradients(by_cuda, x, weight, dy), strict=True):
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
    y, dx, _ = with_gradients(by_cuda, x, weight, dy)
    tail_y, tail_dx, _ = with_gradients(by_cuda, x[-50:].clone(), weight, dy[-50:].clone())
    assert torch.equal(y[-50:], tail_y) and torch.equal(dx[-50:], tail_dx)


def test_compiles_whole():
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    weight = torch.randn(256, device="cuda", requires_grad=True)
    compiled = torch.compile(kernels.rms_norm, fullgraph=True)
    compiled(x, weight).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert kernels.explain("rms_norm", x, weight).backend == "cuda"
