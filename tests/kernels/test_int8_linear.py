"""int8_linear: how weights become int8, the reference and the op against float64, what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_linear_truth import assert_close_to_float64, make
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels.int8_linear import reference

OP = torch.ops.almostgpt.int8_linear.default
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TINY = torch.finfo(torch.float32).tiny


def op(x, weight, scales, bias=None):
    return OP(x, weight, scales, bias)


# --- quantize_rows -------------------------------------------------------------------------------

# Numbers of any size, so that rows hold large ones beside small ones, zeros, and nothing but tiny ones.
NUMBERS = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1e-45, -TINY, 128 * TINY]),
)
MATRICES = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda size: st.lists(NUMBERS, min_size=size[0] * size[1], max_size=size[0] * size[1]).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.float32).view(size)
    )
)


@settings(deadline=None)
@given(MATRICES)
def test_no_element_is_off_by_more_than_half_a_step(weight):
    codes, scales = kernels.quantize_rows(weight)
    assert (codes.dtype, codes.shape) == (torch.int8, weight.shape) and codes.is_contiguous()
    assert (scales.dtype, scales.shape) == (torch.float32, weight.shape[:1])
    assert codes.abs().max() <= 127 and (scales > 0).all() and scales.isfinite().all()
    off = (codes.double() * scales.double()[:, None] - weight.double()).abs()
    assert (off <= scales.double()[:, None] / 2 * (1 + 1e-5)).all()
    # The largest of a row takes the whole range, in its own direction.
    for row, code, scale in zip(weight, codes, scales, strict=True):
        if row.abs().max() >= 128 * TINY:
            at = row.abs().argmax()
            assert code[at] == math.copysign(127, row[at]) and scale == row.abs().max() / 127


@settings(deadline=None)
@given(MATRICES)
def test_what_was_quantised_stays_as_it_is(weight):
    codes, scales = kernels.quantize_rows(weight)
    held = kernels.dequantize_rows(codes, scales)
    if held.isfinite().all():  # 127 · s may be rounded to beyond the largest float32
        again, scales_again = kernels.quantize_rows(held)
        assert torch.equal(again, codes)
        torch.testing.assert_close(scales_again, scales, rtol=3e-7, atol=0)


def test_rows_of_zeros_and_other_dtypes():
    codes, scales = kernels.quantize_rows(torch.zeros(2, 5, requires_grad=True))
    assert not codes.any() and torch.equal(scales, torch.ones(2)) and not scales.requires_grad
    weight = torch.randn(3, 7, dtype=torch.float64)
    for dtype in DTYPES:
        codes, scales = kernels.quantize_rows(weight.to(dtype))
        assert scales.dtype == torch.float32
        held = kernels.dequantize_rows(codes, scales, dtype)
        assert held.dtype == dtype
        half_a_step = scales.max().item() * 0.5001
        torch.testing.assert_close(
            held, weight.to(dtype), rtol=torch.finfo(dtype).eps, atol=half_a_step
        )
    codes, scales = kernels.quantize_rows(weight.t())  # strided
    assert codes.is_contiguous() and codes.shape == (7, 3)
    for shape in ((0, 5), (5, 0), (0, 0)):
        codes, scales = kernels.quantize_rows(torch.zeros(shape))
        assert codes.shape == shape and scales.shape == shape[:1]


@pytest.mark.parametrize(
    "weight, says",
    [
        (torch.zeros(3), "a floating-point matrix is quantised, not torch.float32 of"),
        (torch.zeros(2, 2, 2), "matrix"),
        (torch.zeros(2, 2, dtype=torch.int8), "not torch.int8"),
        (torch.tensor([[1.0, math.nan]]), "not finite"),
        (torch.tensor([[0.0], [-math.inf]]), "not finite"),
        (torch.tensor([[1e300]], dtype=torch.float64), "not finite"),  # nor is it in float32
    ],
)
def test_what_cannot_be_quantised_is_said(weight, says):
    with pytest.raises(UserError, match=says):
        kernels.quantize_rows(weight)


# --- the reference and the op ----------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    K=st.integers(0, 70),
    N=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, *DTYPES]),
    transposed=st.booleans(),
    linear=st.sampled_from([reference, op]),
    seed=st.integers(0, 2**31),
)
def test_against_float64(leading, K, N, dtype, bias, transposed, linear, seed):
    inputs = make(tuple(leading), K, N, dtype, bias, seed)
    if transposed and leading:
        inputs = inputs._replace(x=inputs.x.transpose(0, -1).contiguous().transpose(0, -1))
    assert_close_to_float64(linear, inputs)


def test_it_is_the_linear_layer_whose_weight_was_quantised():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 50), torch.randn(3, 64)
    y = kernels.int8_linear(x, *kernels.quantize_rows(layer.weight), layer.bias.detach())
    # Each weight is off by half a step at most, in any direction.
    bound = x.abs().sum(1, keepdim=True) * layer.weight.abs().amax(1) / 254
    error = (y - layer(x)).abs()
    assert (error <= bound + 1e-5).all() and error.max() > 1e-4


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0])
def test_sums_of_codes_beyond_float16_are_none_of_results(scale):
    """780,000 · 1e-3 fits into float16, as does every term."""
    x = torch.full((1, 768), 8.0, dtype=torch.float16)
    codes, scales = torch.full((2, 768), 127, dtype=torch.int8), torch.tensor([scale, 1e-3])
    y = kernels.int8_linear(x, codes, scales)
    truth = 768 * 8.0 * 127 * scales
    truth = truth.where(truth < 65504, torch.inf)
    torch.testing.assert_close(y[0].float(), truth, rtol=1e-3, atol=torch.finfo(torch.float16).tiny)


def test_autocast_takes_x_in_its_dtype():
    inputs = make((3,), 32, 5, torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.int8_linear(*inputs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, kernels.int8_linear(inputs.x.bfloat16(), *inputs[1:]))


X, CODES, SCALES = torch.zeros(2, 16), torch.zeros(3, 16, dtype=torch.int8), torch.ones(3)


@pytest.mark.parametrize(
    "inputs, says",
    [
        ((X, CODES.float(), SCALES), "contiguous int8 matrix, not torch.float32"),
        ((X, CODES[0], SCALES), "contiguous int8 matrix"),
        ((X, torch.zeros(16, 3, dtype=torch.int8).t(), SCALES), "contiguous int8 matrix"),
        ((X[:, :15], CODES, SCALES), r"x must be floating point and \(..., 16\), not .*\(2, 15\)"),
        ((torch.zeros(()), CODES, SCALES), "x must be"),
        ((X.int(), CODES, SCALES), "x must be floating point"),
        ((X, CODES, SCALES[:2]), r"scales must be float32 and \(3,\)"),
        ((X, CODES, SCALES.double()), "scales must be float32"),
        ((X, CODES, SCALES, torch.zeros(4)), r"bias must be floating point and \(3,\)"),
        ((X, CODES, SCALES, torch.zeros(3, dtype=torch.int32)), "bias must be floating point"),
        ((X, CODES.to("meta"), SCALES), "x is on cpu and weight on meta"),
        ((X, CODES, SCALES, torch.zeros(3, device="meta")), "x is on cpu and bias on meta"),
    ],
)
def test_bad_inputs_are_named(inputs, says):
    with pytest.raises(UserError, match=says):
        kernels.int8_linear(*inputs)


def test_there_is_no_gradient_and_so_none_is_promised():
    x, bias = X.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
    for inputs in ((x, CODES, SCALES), (X, CODES, SCALES, bias)):
        with pytest.raises(UserError, match="under torch.no_grad"):
            kernels.int8_linear(*inputs)
        with torch.no_grad():
            assert kernels.int8_linear(*inputs).shape == (2, 3)


def test_opcheck_and_fakes():
    for dtype, bias in ((torch.float32, None), (torch.bfloat16, torch.float32)):
        opcheck(OP, make((2, 3), 32, 5, dtype, bias))
        opcheck(OP, make((0,), 32, 5, dtype, bias))
    y = OP(X.to("meta", torch.float16), CODES.to("meta"), SCALES.to("meta"), None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3), torch.float16, "meta")


def test_compiles_whole_with_dynamic_rows():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    for linear in (kernels.int8_linear, op):
        compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=count)
        for rows in (2, 3, 30):
            inputs = make((rows,), 32, 5, torch.float32, torch.float32)
            torch.testing.assert_close(compiled(*inputs), linear(*inputs))
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "rows, K, dtype, reason",
    [
        (1, 16, torch.bfloat16, None),
        (16, 768, torch.float16, None),
        (17, 768, torch.bfloat16, "x has 17: a matrix product"),
        (1, 24, torch.bfloat16, "rows of 24 are no multiple"),
        (1, 0, torch.bfloat16, "rows of 0"),
        (1, 16, torch.float32, "not torch.float32"),
    ],
)
def test_a_card_serves_a_decoding_step_and_says_why_nothing_else(rows, K, dtype, reason):
    inputs = [t if t is None else t.to("meta") for t in make((1, rows), K, 50, dtype)]
    for card in kernels.dispatch.CARDS:
        explanation = kernels.explain("int8_linear", *inputs, capability=card)
        assert explanation.backend == ("reference" if reason else "cuda")
        assert reason is None or reason in explanation.reasons["cuda"]
