"""expert_linear against float64 products of each row with its expert's weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import expert_linear
from almostgpt.kernels.expert_linear import (
    _linear_grouped,
    _linear_masked,
    _weight_grouped,
    _weight_masked,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
COUNTS = st.lists(st.sampled_from([0, 0, 1, 2, 7, 20]), min_size=1, max_size=6)


def make(counts, K, M, dtype, seed=0):
    """x, weight, offsets and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (sum(counts), K), (len(counts), M, K), (sum(counts), M)
    x, weight, dy = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    return x, weight, offsets, dy


def truth(x, weight, counts, dy):
    """y, dx and dweight in float64, row by row."""
    x, weight, dy = (t.double() for t in (x, weight, dy))
    own = [expert for expert, count in enumerate(counts) for _ in range(count)]
    y, dx, dweight = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(weight)
    for row, expert in enumerate(own):
        y[row] = weight[expert] @ x[row]
        dx[row] = weight[expert].t() @ dy[row]
        dweight[expert] += torch.outer(dy[row], x[row])
    return y, dx, dweight


def assert_close(got, wanted, dtype, terms):
    assert got.dtype == dtype and got.shape == wanted.shape
    if wanted.numel():
        # A rounding of the result, and in float32 (float16 and bfloat16 add up there) of each term.
        largest = wanted.abs().max() + terms
        assert (got - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * largest


@settings(deadline=None, max_examples=60)
@given(
    counts=COUNTS,
    K=st.integers(0, 20),
    M=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_outputs_and_gradients_against_each_row_alone(counts, K, M, dtype, seed):
    x, weight, offsets, dy = make(counts, K, M, dtype, seed)
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = expert_linear(*leaves, offsets)
    found = (y, *torch.autograd.grad(y, leaves, dy))
    exact = truth(x.detach(), weight.detach(), counts, dy)
    for got, wanted in zip(found, exact, strict=True):
        assert_close(got, wanted, dtype, terms=10)
    for expert, count in enumerate(counts):
        assert count or not found[2][expert].any()


@settings(deadline=None, max_examples=40)
@given(counts=COUNTS, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_without_reading_the_offsets_it_is_the_same(counts, dtype, seed):
    """The form for devices where reading them would mean to wait, as it runs there."""
    x, weight, offsets, dy = make(counts, 9, 5, dtype, seed)
    y, dx, dweight = truth(x, weight, counts, dy)
    assert_close(_linear_masked(x, weight, offsets), y, dtype, terms=10)
    assert_close(_linear_masked(dy, weight.mT, offsets), dx, dtype, terms=10)
    assert_close(_weight_masked(dy, x, offsets), dweight, dtype, terms=10)


@pytest.mark.parametrize("counts", [[3, 0, 9, 4], [0, 16], [5]])
def test_the_grouped_product_of_pytorch_is_the_same(counts):
    x, weight, offsets, dy = make(counts, 16, 24, torch.bfloat16)
    y, dx, dweight = truth(x, weight, counts, dy)
    assert_close(_linear_grouped(x, weight, offsets), y, torch.bfloat16, terms=10)
    assert_close(_linear_grouped(dy, weight.mT, offsets), dx, torch.bfloat16, terms=10)
    assert_close(_weight_grouped(dy, x, offsets), dweight, torch.bfloat16, terms=10)
    by_column = [t.t().contiguous().t() for t in (x, dy)]  # what is given to it lies row by row
    assert_close(_linear_grouped(by_column[0], weight, offsets), y, torch.bfloat16, terms=10)
    assert_close(_weight_grouped(*by_column[::-1], offsets), dweight, torch.bfloat16, terms=10)


def test_nothing_of_another_expert_is_in_a_row_or_a_gradient():
    x, weight, offsets, dy = make([3, 4, 2], 6, 5, torch.float32)
    before = (expert_linear(x, weight, offsets), _weight_masked(dy, x, offsets))
    x[3:7], weight[1] = torch.nan, torch.inf
    for linear in (expert_linear, _linear_masked):
        y = linear(x, weight, offsets)
        assert torch.equal(y[:3], before[0][:3]) and torch.equal(y[7:], before[0][7:])
    dweight = _weight_masked(dy, x, offsets)
    assert torch.equal(dweight[[0, 2]], before[1][[0, 2]])


def test_derivatives_of_every_order():
    x, weight, offsets, _ = make([2, 0, 3], 3, 2, torch.float64)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def run(x, weight):
        return expert_linear(x, weight, offsets)

    assert gradcheck(run, leaves) and gradgradcheck(run, leaves)


def test_opcheck():
    for dtype, counts in ((torch.float32, [2, 0, 3]), (torch.bfloat16, [0, 0])):
        x, weight, offsets, dy = make(counts, 4, 3, dtype)
        x, weight, dy = (t.requires_grad_() for t in (x, weight, dy))
        opcheck(torch.ops.almostgpt.expert_linear.default, (x, weight, offsets))
        opcheck(torch.ops.almostgpt.expert_linear_weight.default, (dy, x, offsets))


def test_strided_inputs_are_read_as_they_are():
    x, weight, offsets, _ = make([4, 4], 8, 6, torch.float32)
    wanted = expert_linear(x, weight, offsets)
    for strided in (
        (x.t().contiguous().t(), weight),
        (x.repeat_interleave(2, 1)[:, ::2], weight.mT.contiguous().mT),
        (x, weight.transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        torch.testing.assert_close(expert_linear(*strided, offsets), wanted)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_it_is_whole_and_the_same_for_any_rows(compiler):
    torch._dynamo.reset()
    run = torch.compile(expert_linear, fullgraph=True, backend=compiler, dynamic=True)
    for counts in ([3, 0, 9], [1, 1, 1], [20, 3, 0]):
        x, weight, offsets, dy = make(counts, 8, 6, torch.float32)
        leaves = x.requires_grad_(), weight.requires_grad_()
        found, wanted = (
            (y, *torch.autograd.grad(y, leaves, dy))
            for y in (run(*leaves, offsets), expert_linear(*leaves, offsets))
        )
        torch.testing.assert_close(found, wanted)


def test_where_models_run_it():
    x, weight, offsets, dy = make([3, 0, 5], 8, 6, torch.float32)
    wanted = expert_linear(x, weight, offsets)
    leaf = weight.clone().requires_grad_()
    again = checkpoint(expert_linear, x, leaf, offsets, use_reentrant=False)
    (gradient,) = torch.autograd.grad(again, leaf, dy)
    torch.testing.assert_close(gradient, truth(x, weight, [3, 0, 5], dy)[2].float())
    with torch.inference_mode():
        assert torch.equal(expert_linear(x, weight, offsets), wanted)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = expert_linear(x, leaf, offsets)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expert_linear(x.bfloat16(), weight.bfloat16(), offsets))
    y.sum().backward()
    assert leaf.grad.dtype == torch.float32
    meta = expert_linear(*(t.to("meta") for t in (x, weight, offsets)))
    assert meta.shape == wanted.shape and meta.is_meta
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight.requires_grad_(), offsets)]
        expert_linear(*fakes).sum().backward()
        assert fakes[1].grad.shape == weight.shape
    found = kernels.explain("expert_linear", x, weight, offsets)
    assert found.backend == "reference" and "no cuda kernel" in found.reasons["cuda"]


X, WEIGHT, OFFSETS, _ = make([3, 2], 4, 6, torch.float32)


@pytest.mark.parametrize(
    "args, says",
    [
        ((X, WEIGHT[0], OFFSETS), r"weight must be \(E, out, in\) and x \(N, in\), not \(6, 4\)"),
        ((X[:, 1:], WEIGHT, OFFSETS), r"and \(5, 3\)"),
        ((X, WEIGHT[:0], OFFSETS[:0]), r"not \(0, 6, 4\)"),
        (
            (X, WEIGHT.double(), OFFSETS),
            "one floating dtype .* not torch.float32 and torch.float64",
        ),
        ((X, WEIGHT, OFFSETS.long()), r"must be int32 and \(2,\), not torch.int64"),
        ((X, WEIGHT, OFFSETS[:1]), r"not torch.int32 and \(1,\)"),
        ((X, WEIGHT.to("meta"), OFFSETS), "weight on meta"),
        ((X, WEIGHT, [3, 5]), "must be tensors"),
    ],
)
def test_bad_inputs_are_named(args, says):
    with pytest.raises(UserError, match=says):
        expert_linear(*args)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks at the offsets")
@pytest.mark.parametrize("offsets", [[3, 4], [3, 6], [6, 5], [-1, 5], [0, 0]])
def test_offsets_that_cannot_be_are_named_on_a_cpu(offsets):
    with pytest.raises(UserError, match="never decrease, and end with the number of rows, 5"):
        expert_linear(X, WEIGHT, torch.tensor(offsets, dtype=torch.int32))
