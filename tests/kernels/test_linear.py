"""kernels.linear: the C++ kernel against float64, and PyTorch's own op wherever that must run."""

import hypothesis.strategies as st
import pytest
import torch
from cpu_kernels import available, needs_library, on_every_set, threads  # noqa: F401
from hypothesis import given, settings
from torch.nn import functional as F

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import cpu
from almostgpt.model.linear import Linear

EPS = torch.finfo(torch.float32).eps
op = torch.ops.almostgpt.cpu_linear


def check(x, weight, bias, number):
    """|y − exact| ≤ (K/64 + 16) · eps · Σ |x w|: no lane adds more than that many numbers in turn.

    Of the portable lanes, 16 in all, K/16. bfloat16 is rounded once more, to 2⁻⁸.
    """
    y = op(x, weight, bias, number)
    exact = x.double() @ weight.double().T
    sums = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, sums = exact + bias.double(), sums + bias.double().abs()
    bound = (x.shape[-1] / 16 + 16) * EPS * sums + 1e-44
    if y.dtype == torch.bfloat16:
        bound = bound + 2**-8 * exact.abs()
    assert y.shape == exact.shape and y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound).all()
    return y


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 200),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    number=st.sampled_from(available or [0]),
)
def test_against_float64(rows, inputs, outputs, biased, dtype, seed, number):
    random = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=random).to(dtype)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    check(x, weight, bias if biased else None, number)


@needs_library
@on_every_set
@pytest.mark.parametrize("inputs", [768, 1600, 3072, 4100])
def test_layers_of_real_models(inputs, number):
    check(torch.randn(3, inputs), torch.randn(259, inputs), torch.randn(259), number)


@needs_library
@on_every_set
def test_a_row_gives_the_same_bits_in_any_company_and_on_any_number_of_threads(number, threads):  # noqa: F811
    x, weight, bias = torch.randn(9, 1000), torch.randn(777, 1000), torch.randn(777)
    threads(1)
    together = op(x, weight, bias, number)
    alone = torch.cat([op(row[None], weight, bias, number) for row in x])
    assert torch.equal(together, alone)
    assert torch.equal(op(x, weight[100:300], bias[100:300], number), together[:, 100:300])
    threads(2)
    assert torch.equal(op(x, weight, bias, number), together)


@needs_library
@on_every_set
def test_strides_offsets_and_leading_dimensions(number):
    weight = torch.randn(70, 33)
    base = torch.randn(4, 3, 80)
    for x in (base[..., 5:38], base[:, 1, 5:38], base.transpose(0, 1)[..., ::2][..., :33]):
        expected = op(x.contiguous(), weight, None, number)
        assert torch.equal(op(x, weight, None, number), expected)
        assert torch.equal(
            op(x[0, 0] if x.dim() == 3 else x[0], weight, None, number), expected.flatten(0, -2)[0]
        )


@needs_library
@on_every_set
def test_nothing_in_nothing_out(number):
    weight, bias = torch.randn(5, 3), torch.randn(5)
    assert op(torch.empty(0, 3), weight, bias, number).shape == (0, 5)
    assert op(torch.empty(2, 3), weight[:0], bias[:0], number).shape == (2, 0)
    assert torch.equal(
        op(torch.empty(2, 0), weight[:, :0].contiguous(), bias, number), bias.expand(2, 5)
    )


@needs_library
def test_not_a_number_and_infinity_pass_through():
    x = torch.ones(2, 70)
    x[0, 69], x[1, 3] = torch.nan, torch.inf
    y = op(x, torch.ones(3, 70), None, cpu.BEST)
    assert y[0].isnan().all() and y[1].isposinf().all()


@needs_library
def test_what_the_op_itself_refuses():
    x, weight, bias = torch.randn(2, 8), torch.randn(4, 8), torch.randn(4)
    for arguments, message in [
        ((x[:, :7], weight, bias, -1), "x must be"),
        ((x, weight.T.contiguous().T, bias, -1), "contiguous matrix"),
        ((x, weight, bias[:3], -1), "bias must be"),
        ((x, weight.bfloat16(), bias, -1), "one dtype"),
        ((x.double(), weight.double(), bias.double(), -1), "float32 or bfloat16"),
        ((x, weight, bias, 3), "no instruction set 3"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@needs_library
def test_opcheck():
    arguments = (torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4), cpu.BEST)
    torch.library.opcheck(op.default, arguments)


# --- which one runs ------------------------------------------------------------------------------

X, W, B = torch.randn(1, 8), torch.randn(4, 8), torch.randn(4)


@needs_library
def test_few_rows_without_a_gradient_are_for_the_kernel():
    answer = kernels.explain("linear", X, W, B)
    assert (answer.backend, answer.kernel) == ("cpu", "linear")
    assert answer.reasons["reference"] == "it could serve, but cpu comes first"
    assert torch.equal(kernels.linear(X, W, B), op(X, W, B, cpu.BEST))
    with kernels.use_backend("reference"):
        assert torch.equal(kernels.linear(X, W, B), F.linear(X, W, B))


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda: (X.expand(17, 8), W, B), "more than"),
        (lambda: (X.double(), W.double(), B.double()), "not torch.float64"),
        (lambda: (X.half(), W.half(), B.half()), "not torch.float16"),
        (lambda: (X, W.T.contiguous().T, B), "contiguous weight"),
        (lambda: (X, torch.nn.Parameter(W), B), "a gradient"),
        (lambda: (X.clone().requires_grad_(), W, B), "a gradient"),
        (lambda: (X, W, torch.nn.Parameter(B)), "a gradient"),
    ],
)
def test_everything_else_is_for_pytorch(call, why):
    arguments = call()
    answer = kernels.explain("linear", *arguments)
    assert answer.backend == "reference" and why in answer.reasons["cpu"]
    torch.testing.assert_close(kernels.linear(*arguments), F.linear(*arguments), rtol=0, atol=0)
    with kernels.use_backend("cpu"), pytest.raises(UserError, match=why):
        kernels.linear(*arguments)


@needs_library
def test_parameters_are_for_the_kernel_where_no_gradient_is_recorded():
    weight = torch.nn.Parameter(W)
    with torch.no_grad():
        assert kernels.explain("linear", X, weight, B).backend == "cpu"
    with torch.inference_mode():
        assert kernels.linear(X, weight, B).is_inference()


def test_autocast_is_that_of_pytorch():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in kernels.explain("linear", X, W, B).reasons["cpu"]
        y = kernels.linear(X, W, B)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(X, W, B))
        kernels.linear(X.bfloat16(), W, B)  # of two dtypes, as layers have them there


def test_compilers_transforms_and_modes_see_pytorchs_own():
    from torch.utils.flop_counter import FlopCounterMode

    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        compiled = torch.compile(kernels.linear, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(X, W, B), F.linear(X, W, B))
        assert [getattr(target, "__name__", "") for target in seen] == ["linear"]
        mapped = torch.func.vmap(lambda x: kernels.linear(x, W, B))(X)
        torch.testing.assert_close(mapped, F.linear(X, W, B))
        with FlopCounterMode(display=False) as counter:
            kernels.linear(X, W, B)
    assert counter.get_total_flops() == 2 * X.shape[0] * W.numel()


def test_gradients_are_pytorchs():
    x, weight, bias = (t.clone().requires_grad_() for t in (X, W, B))
    ours = torch.autograd.grad(kernels.linear(x, weight, bias).square().sum(), (x, weight, bias))
    theirs = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_tensors_without_data():
    x, weight = X.to("meta"), W.to("meta")
    assert kernels.linear(x, weight).shape == (1, 4)
    answer = kernels.explain("linear", x, weight, capability=(9, 0))
    assert answer.backend == "reference" and "not for a GPU" in answer.reasons["cpu"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: (X[:, :7], W), r"x \(\.\.\., K\), not \(4, 8\) and \(1, 7\)"),
        (lambda: (X, W[0]), r"weight must be \(N, K\)"),
        (lambda: (torch.tensor(1.0), W), "weight must be"),
        (lambda: (X, W, B[:3]), r"bias must be \(4,\)"),
        (lambda: (X, W.double()), "x is torch.float32 and weight torch.float64"),
        (lambda: (X, W, B.half()), "bias torch.float16"),
        (lambda: (X, W.to("meta")), "x is on cpu and weight on meta"),
    ],
)
def test_bad_input_is_one_message(call, message):
    with pytest.raises(UserError, match=message):
        kernels.linear(*call())


def test_the_layer_is_an_nn_linear():
    torch.manual_seed(0)
    ours = Linear(8, 4)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(8, 4)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours(X), theirs(X)) and ours(X).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(ours(X), theirs(X))
