"""RMSNorm: the reference and the torch ops against float64, their fakes and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rms_norm_truth import assert_close_to_float64, make, plain, with_gradients
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels.rms_norm import _run_csrc

FORWARD = torch.ops.almostgpt.rms_norm_forward.default
ADD_FORWARD = torch.ops.almostgpt.add_rms_norm_forward.default
BACKWARD = torch.ops.almostgpt.rms_norm_backward.default


def op(x, weight):
    return FORWARD(x, weight, 1e-5)[0]


def op_add(x, weight, residual):
    return ADD_FORWARD(x, residual, weight, 1e-5)[:2]


def public_add(x, weight, residual):
    return kernels.rms_norm(x, weight, residual=residual)


def through_function(norm):
    """The eager path of the CUDA and emulator kernels, with the ops of the CPU."""

    def run(x, weight, residual=None):
        return _run_csrc(torch.ops.almostgpt, x, weight, 1e-5, residual)

    return run


DRAWN = given(
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 300),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.booleans(),
    st.sampled_from(range(3)),
    st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=60)
@DRAWN
def test_error_is_within_twice_that_of_plain_maths(leading, n, dtype, wide, path, seed):
    x, weight, _, dy, _ = make(leading, n, dtype, wide, seed)
    norm = (kernels.rms_norm, op, through_function(op))[path]
    assert_close_to_float64(norm, (x, weight), (dy,))


@settings(deadline=None, max_examples=60)
@DRAWN
def test_error_with_a_residual_is_within_twice_that_of_plain_maths(
    leading, n, dtype, wide, path, seed
):
    x, weight, residual, dy, dsum = make(leading, n, dtype, wide, seed)
    norm = (public_add, op_add, through_function(op_add))[path]
    assert_close_to_float64(norm, (x, weight, residual), (dy, dsum))
    assert torch.equal(norm(x, weight, residual)[1], x + residual)


def test_output_dtypes_and_strides():
    x = torch.randn(6, 4, dtype=torch.bfloat16).t()  # strided
    weight = torch.randn(6)
    y = kernels.rms_norm(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    torch.testing.assert_close(y, kernels.rms_norm(x.contiguous(), weight))
    y, rstd = FORWARD(x, weight, 1e-5)
    assert y.is_contiguous() and rstd.shape == (4,) and rstd.dtype == torch.float32


def test_gradients_in_float64():
    x, residual = (torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for norm in (kernels.rms_norm, op, through_function(op)):
        assert gradcheck(norm, (x, weight))
        assert gradgradcheck(norm, (x, weight))
    for norm in (public_add, op_add, through_function(op_add)):
        assert gradcheck(norm, (x, weight, residual))
        assert gradgradcheck(norm, (x, weight, residual))


@pytest.mark.parametrize("used", ["y", "sum"])
def test_gradients_where_only_one_of_the_two_outputs_is_used(used):
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    inputs, index = (x, weight, residual), ("y", "sum").index(used)

    def gradients(norm):
        loss = norm(*inputs)[index].square().sum()
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    for norm in (public_add, op_add, through_function(op_add)):
        for got, truth in zip(gradients(norm), gradients(plain), strict=True):
            torch.testing.assert_close(got, truth)


def test_a_row_of_zeros_has_finite_gradients():
    y, dx, dweight = with_gradients(
        kernels.rms_norm, (torch.zeros(2, 4), torch.ones(4)), (torch.ones(2, 4),)
    )
    assert (y == 0).all() and (dweight == 0).all()
    torch.testing.assert_close(dx, torch.full((2, 4), 1e-5**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 16), (7,), (0, 4)])
def test_opcheck(dtype, shape):
    x, residual, dy, dsum = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(4))
    weight = torch.randn(shape[-1], requires_grad=True)
    opcheck(FORWARD, (x, weight, 1e-5))
    opcheck(ADD_FORWARD, (x, residual, weight, 1e-5))
    rstd = FORWARD(x, weight, 1e-5)[1].detach()
    opcheck(BACKWARD, (dy, None, x, weight, rstd))
    opcheck(BACKWARD, (dy, dsum, x, weight, rstd))


def test_fakes_give_shapes_and_dtypes():
    x = torch.empty(2, 3, 8, dtype=torch.float16, device="meta")
    weight = torch.empty(8, device="meta")
    y, rstd = FORWARD(x, weight, 1e-5)
    assert (y.shape, y.dtype) == (x.shape, torch.float16)
    assert (rstd.shape, rstd.dtype) == ((2, 3), torch.float32)
    y, total, rstd = ADD_FORWARD(x, x, weight, 1e-5)
    assert (y.shape, total.shape, total.dtype) == (x.shape, x.shape, torch.float16)
    dx, dweight = BACKWARD(y, None, x, weight, rstd)
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


@pytest.mark.parametrize(
    "residual, says",
    [
        (torch.zeros(2, 5), r"shape of x, \(2, 4\)"),
        (torch.zeros(2, 4, dtype=torch.float16), "float32 on cpu as x is, not torch.float16"),
        (torch.zeros(2, 4, device="meta"), "not torch.float32 on meta"),
    ],
)
def test_bad_residuals_are_named(residual, says):
    with pytest.raises(UserError, match=says):
        kernels.rms_norm(torch.zeros(2, 4), torch.zeros(4), residual=residual)


@pytest.mark.parametrize("norm", [kernels.rms_norm, op, through_function(op)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_compiles_whole_with_dynamic_shapes_forward_and_backward(norm, with_residual):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    if with_residual:
        norm = {kernels.rms_norm: public_add, op: op_add}.get(norm, norm)
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend=count)
    for rows in (2, 3, 5):
        x, residual, dy, dsum = (torch.randn(rows, 8) for _ in range(4))
        inputs = (x, torch.randn(8), residual) if with_residual else (x, torch.randn(8))
        upstream = (dy, dsum) if with_residual else (dy,)
        got = with_gradients(compiled, inputs, upstream)
        for a, b in zip(got, with_gradients(norm, inputs, upstream), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1
