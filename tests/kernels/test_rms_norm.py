"""RMSNorm: the reference and the torch ops against float64, their fakes and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError

FORWARD = torch.ops.almostgpt.rms_norm_forward.default
BACKWARD = torch.ops.almostgpt.rms_norm_backward.default


def plain(x, weight, eps=1e-5):
    """The definition, in x's own dtype."""
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


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 300),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.booleans(),
    st.sampled_from([kernels.rms_norm, lambda x, w: FORWARD(x, w, 1e-5)[0]]),
    st.integers(0, 2**31),
)
def test_error_is_within_twice_that_of_plain_maths(leading, n, dtype, wide_weight, norm, seed):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(*leading, n, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(n, generator=generator).to(torch.float32 if wide_weight else dtype)
    exact = with_gradients(plain, x.double(), weight.double(), dy)
    got = with_gradients(norm, x, weight, dy)
    peer = with_gradients(plain, x, weight, dy)
    for ours, same, truth, size in zip(got, peer, exact, magnitudes(x, weight, dy), strict=True):
        assert ours.shape == truth.shape
        if truth.numel():
            slack = 4 * torch.finfo(ours.dtype).eps * size.max()
            error = (ours.double() - truth).abs().max()
            assert error <= 2 * (same.double() - truth).abs().max() + slack


def test_output_dtypes_and_strides():
    x = torch.randn(6, 4, dtype=torch.bfloat16).t()  # strided
    weight = torch.randn(6)
    y = kernels.rms_norm(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    torch.testing.assert_close(y, kernels.rms_norm(x.contiguous(), weight))
    y, rstd = FORWARD(x, weight, 1e-5)
    assert y.is_contiguous() and rstd.shape == (4,) and rstd.dtype == torch.float32


def test_gradients_in_float64():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for norm in (kernels.rms_norm, lambda x, w: FORWARD(x, w, 1e-5)[0]):
        assert gradcheck(norm, (x, weight))
        assert gradgradcheck(norm, (x, weight))


def test_a_row_of_zeros_has_finite_gradients():
    y, dx, dweight = with_gradients(
        kernels.rms_norm, torch.zeros(2, 4), torch.ones(4), torch.ones(2, 4)
    )
    assert (y == 0).all() and (dweight == 0).all()
    torch.testing.assert_close(dx, torch.full((2, 4), 1e-5**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 16), (7,), (0, 4)])
def test_opcheck(dtype, shape):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    opcheck(FORWARD, (x, weight, 1e-5))
    dy = torch.randn(shape, dtype=dtype, requires_grad=True)
    opcheck(BACKWARD, (dy, x, weight, FORWARD(x, weight, 1e-5)[1].detach()))


def test_fakes_give_shapes_and_dtypes():
    x = torch.empty(2, 3, 8, dtype=torch.float16, device="meta")
    weight = torch.empty(8, device="meta")
    y, rstd = FORWARD(x, weight, 1e-5)
    assert (y.shape, y.dtype) == (x.shape, torch.float16)
    assert (rstd.shape, rstd.dtype) == ((2, 3), torch.float32)
    dx, dweight = BACKWARD(y, x, weight, rstd)
    assert (dx.shape, dx.dtype, dweight.dtype) == (x.shape, torch.float16, torch.float32)


@pytest.mark.parametrize(
    "x, weight, says",
    [
        (torch.zeros(()), torch.zeros(1), "must be"),
        (torch.zeros(2, 0), torch.zeros(0), "n ≥ 1"),
        (torch.zeros(2, 4), torch.zeros(3), r"weight must be \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(4), "floating"),
        (torch.zeros(2, 4), torch.zeros(4, dtype=torch.float16), "float32"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), "on cpu and weight on meta"),
    ],
)
def test_bad_inputs_are_named(x, weight, says):
    with pytest.raises(UserError, match=says):
        kernels.rms_norm(x, weight)


def test_compiles_whole_with_dynamic_shapes_forward_and_backward():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(kernels.rms_norm, fullgraph=True, dynamic=True, backend=count)
    for rows in (2, 3, 5):
        x, weight, dy = torch.randn(rows, 8), torch.randn(8), torch.randn(rows, 8)
        got = with_gradients(compiled, x, weight, dy)
        for a, b in zip(got, with_gradients(kernels.rms_norm, x, weight, dy), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1
