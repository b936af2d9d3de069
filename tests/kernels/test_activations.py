"""SwiGLU, GELU and ReLU²: the references and the Triton kernels against float64.

Without a GPU the kernels run in Triton's interpreter (tests/conftest.py).
"""

import contextlib

import pytest
import torch
from activation_truth import (
    LAYOUTS,
    OPTIONS,
    PUBLIC,
    PYTORCH,
    TRUTH,
    assert_close_to_float64,
    assert_rounded_once,
    make,
    with_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import triton_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = sorted(PUBLIC)

if triton_ops.MISSING is None:
    import triton
    import triton.language as tl

    from almostgpt.kernels.activations_triton import BACKWARD, FORWARD, _gates, forward_kernel

    # The kernels by the public op in eager mode, and the torch op as compiled code calls it.
    BACKENDS = ("reference", "triton", "op")
else:
    BACKENDS = ("reference",)
needs_triton = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))


def on(backend: str, name: str):
    """The activation on one backend."""
    if backend == "op":
        return lambda x: FORWARD.op(x, *OPTIONS[name])

    def run(x):
        with kernels.use_backend(backend):
            return PUBLIC[name](x)

    return run


DRAWN = given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 4), max_size=3),
    st.one_of(st.integers(0, 40), st.sampled_from([1, 16, 96, 511])),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([0.1, 1.0, 8.0]),
    st.integers(0, 2**31),
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=30)
@DRAWN
def test_error_is_within_bounds(backend, name, leading, width, dtype, layout, scale, seed):
    x, dy = make(name, leading, width, dtype, layout, scale, seed, DEVICE)
    assert_close_to_float64(name, on(backend, name), x, dy)
    if backend != "reference":
        assert_rounded_once(name, on(backend, name), x, dy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_more_than_a_block_of_rows_and_columns(name, backend):
    for shape in ((3, 1500), (700, 3), (2500, 1)):
        x, dy = make(name, shape[:1], shape[1], torch.float32, "strided rows", device=DEVICE)
        assert_close_to_float64(name, on(backend, name), x, dy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "swiglu"])
def test_scalars(name, backend):
    x, dy = torch.tensor(1.25, device=DEVICE), torch.tensor(-0.5, device=DEVICE)
    assert_close_to_float64(name, on(backend, name), x, dy)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_where_exp_overflows_and_beyond(name, backend, dtype):
    """Infinite and NaN exactly where the same maths in PyTorch is; else close to it."""
    inf, nan = float("inf"), float("nan")
    values = [-1e4, 1e4, -88.5, 88.5, -104.0, -20.0, 20.0, -0.0, 0.0, -inf, inf, nan]
    if name == "gelu" and backend == "reference":
        values.remove(inf)  # PyTorch's vector code on a CPU makes it NaN, its scalar code does not
    x = torch.tensor(values)
    if name == "swiglu":
        x = torch.cartesian_prod(x, torch.tensor([1.0, -2.0, 0.0, nan]))
    x = x.to(DEVICE, dtype).view(len(x), -1)
    dy = torch.ones(len(x), 1, device=DEVICE)
    one_by_one = [with_gradient(PYTORCH[name], *pair) for pair in zip(x, dy, strict=True)]
    wanted = [torch.stack(tensors) for tensors in zip(*one_by_one, strict=True)]
    for got, expected in zip(with_gradient(on(backend, name), x, dy), wanted, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_reference_in_float64(name):
    # Away from 0, where ReLU² has no second derivative.
    x = torch.tensor([[-2.0, -0.7, 0.4, 1.9], [0.6, -1.2, 3.0, -0.3]], dtype=torch.float64)
    x = x.to(DEVICE).requires_grad_()
    assert gradcheck(PUBLIC[name], (x,))
    assert gradgradcheck(PUBLIC[name], (x,))
    assert kernels.explain(name.removesuffix("_tanh"), x).backend == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_second_gradients(name, backend):
    def second(function, dtype):
        x, dy = make(name, (3,), 5, dtype, device=DEVICE)
        x.requires_grad_(), dy.requires_grad_()
        (dx,) = torch.autograd.grad(function(x), x, dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, dy))

    got, exact = second(on(backend, name), torch.float32), second(TRUTH[name], torch.float64)
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_only_the_input_is_kept_and_nothing_is_overwritten(name, backend):
    x, dy = make(name, (6,), 16, torch.float32, device=DEVICE)
    x.requires_grad_()
    before, kept = x.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = on(backend, name)(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    upstream = dy.clone()
    once, again = (torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again) and torch.equal(upstream, dy) and torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
def test_under_transforms_the_reference_runs(name):
    x, dy = make(name, (3,), 4, torch.float32, device=DEVICE)
    function = PUBLIC[name]
    _, expected = with_gradient(TRUTH[name], x.double(), dy.double())
    got = torch.func.vmap(lambda x, dy: torch.func.vjp(function, x)[1](dy)[0])(x, dy)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent
    _, expected = torch.func.jvp(TRUTH[name], (x.double(),), (x.double(),))
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    "name, shape, dtype",
    [
        ("swiglu", (2, 3, 8), torch.float32),
        ("gelu", (5,), torch.bfloat16),
        pytest.param("swiglu", (0, 4), torch.float16, marks=pytest.mark.slow),
        pytest.param("gelu_tanh", (7, 2), torch.float32, marks=pytest.mark.slow),
        pytest.param("relu_squared", (3, 1), torch.float32, marks=pytest.mark.slow),
    ],
)
def test_opcheck(name, shape, dtype):
    x, dy = make(name, shape[:-1], shape[-1], dtype, device=DEVICE)
    opcheck(FORWARD.op, (x.requires_grad_(), *OPTIONS[name]))
    opcheck(BACKWARD.op, (dy.requires_grad_(), x, *OPTIONS[name]))


@pytest.mark.parametrize("backend", ["reference", "triton"][: len(BACKENDS)])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_with_dynamic_shapes(name, backend):
    torch._dynamo.reset()
    compiled = torch.compile(PUBLIC[name], fullgraph=True, dynamic=True, backend="aot_eager")
    with kernels.use_backend(backend):
        for rows in (2, 3, 5):
            x, dy = make(name, (rows,), 8, torch.float32, device=DEVICE)
            got = with_gradient(compiled, x, dy)
            torch.testing.assert_close(got, with_gradient(PUBLIC[name], x, dy))


@pytest.mark.parametrize("backend", ["reference", "triton"][: len(BACKENDS)])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_checkpointing_change_nothing(name, backend):
    x, dy = make(name, (4,), 8, torch.bfloat16, device=DEVICE)
    function = on(backend, name)
    expected = with_gradient(function, x, dy)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(with_gradient(function, x, dy), expected, rtol=0, atol=0)
    recomputed = with_gradient(lambda x: checkpoint(function, x, use_reentrant=False), x, dy)
    torch.testing.assert_close(recomputed, expected, rtol=0, atol=0)


@needs_triton
def test_addresses_beyond_32_bits():
    @triton.jit
    def offsets(out, base, row_stride, columns, start, BLOCK: tl.constexpr):
        lanes = tl.arange(0, BLOCK)
        gates = _gates(base, row_stride, columns, start.to(tl.int64), lanes)
        tl.store(out + lanes, gates.to(tl.int64) - base.to(tl.int64))

    base = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(64, dtype=torch.int64, device=DEVICE)
    for columns, stride in ((7, 14), (2**20 + 16, 2**30), (3, 2**29)):
        start = 5 * 2**31 // columns * columns + columns - 2
        offsets[(1,)](out, base, stride, columns, start, BLOCK=64)
        wanted = [(i // columns * stride + i % columns) * 2 for i in range(start, start + 64)]
        assert out.tolist() == wanted


@needs_triton
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_the_kernel_for_very_many_elements_computes_the_same(name):
    x, dy = make(name, (9,), 40, torch.float32, device=DEVICE)
    activation, gated = OPTIONS[name]
    y = torch.empty_like(dy)
    options = dict(ACTIVATION=activation, GATED=gated, BLOCK=64, WIDE=True)
    forward_kernel[(6,)](x, y, x.stride(0), 40, y.numel(), **options)
    assert torch.equal(y, on("triton", name)(x))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: kernels.swiglu(torch.zeros(())), r"\(\.\.\., 2·hidden\), not \(\)"),
        (lambda: kernels.swiglu(torch.zeros(2, 3)), r"not \(2, 3\)"),
        (lambda: kernels.swiglu(torch.zeros(2, 4, dtype=torch.int32)), "not torch.int32"),
        (lambda: kernels.gelu(torch.zeros(2), "erf"), "approximate is 'erf', not 'none' or 'tanh'"),
        (lambda: kernels.gelu(torch.zeros(2, dtype=torch.bool)), "gelu: needs a floating tensor"),
        (lambda: kernels.relu_squared(torch.zeros(2, dtype=torch.int64)), "not torch.int64"),
    ],
)
def test_bad_inputs_are_named(call, says):
    with pytest.raises(UserError, match=says):
        call()


@needs_triton
def test_what_the_kernels_refuse():
    def why(x, op="swiglu"):
        return kernels.explain(op, x, capability=(9, 0)).reasons.get("triton")

    x = torch.empty(2, 4, device="meta")
    assert why(x) is None and why(x, "gelu") is None
    assert "float64" in why(x.double()) and "float64" in why(x.double(), "relu_squared")
    assert "at most 1073741823 hidden" in why(torch.empty(1, 2**31, device="meta"))


@needs_triton
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_not_for_the_kernels(grad):
    """They would fail for lack of a formula or, with gradients off, lose the tangent silently."""
    x = torch.randn(3, device=DEVICE)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert forward_ad.unpack_dual(kernels.gelu(dual)).tangent is not None
        with kernels.use_backend("triton", ops=["gelu"]):
            with pytest.raises(UserError, match="forward-mode"):
                kernels.gelu(dual)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, _Watching])
def test_a_kernel_runs_where_its_tensors_are(mode):
    x = torch.randn(300, device="cuda:1")
    with torch.cuda.device(0), mode(), kernels.use_backend("triton", ops=["gelu"]):
        y = kernels.gelu(x)
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))
