"""Attention, the reference and the torch ops on the CPU: against the definition in float64."""

import functools

import pytest
import torch
from attention_truth import (
    Inputs,
    assert_close_to_float64,
    make,
    plain,
    sinks,
    slopes,
    visible,
    with_gradients,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels.flash_attention import _run_csrc
from almostgpt.kernels.flash_attention_reference import Scoring, attend, reach

FORWARD = torch.ops.almostgpt.flash_attention_forward.default
BACKWARD = torch.ops.almostgpt.flash_attention_backward.default


def public(q, k, v, **options):
    return kernels.flash_attention(q, k, v, return_lse=True, **options)


def public_apart(q, k, v, **options):
    """out as it is without lse, which may be PyTorch's."""
    return kernels.flash_attention(q, k, v, **options), public(q, k, v, **options)[1]


def through_function(q, k, v, **options):
    """The eager path of the CUDA and emulator kernels, with the ops of the CPU."""
    return _run_csrc(torch.ops.almostgpt, q, k, v, return_lse=True, **options)


def as_op(q, k, v, **options):
    return FORWARD(q, k, v, *arguments(q, **options))


def in_parts(q, k, v, *, most=50, sink_logits=None, cu_seqlens=None, **options):
    slopes, _, _, left, right, scale, softcap, _ = arguments(q, **options)
    scoring = Scoring(left, right, scale, softcap, slopes)
    return attend(q, k, v, scoring, sink_logits, cu_seqlens, most=most)


def arguments(
    q,
    *,
    causal=False,
    window=None,
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sink_logits=None,
    cu_seqlens=None,
):
    """What the ops take after q, k and v."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    window = reach(causal, window)
    return alibi_slopes, sink_logits, cu_seqlens, *window, scale, softcap, False


def borders(*values):
    return torch.tensor(values, dtype=torch.int32)


def every_option(H, T, dtype=torch.float32):
    return dict(
        causal=True,
        window=(5, -1),
        scale=0.4,
        softcap=3.0,
        alibi_slopes=slopes(H).to(dtype),
        sink_logits=sinks(H).to(dtype),
        cu_seqlens=borders(0, 2, 2, T - 3, T, T),
    )


PATHS = [public, public_apart, in_parts, through_function, as_op]
ODD = [(1, 1), (113, 203), (239, 1), (799, 3), (3, 799), (0, 4), (4, 0), (7, 3), (1, 7), (65, 65)]


@st.composite
def calls(draw):
    """Inputs in float64 and options."""
    Hkv, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    shape = draw(st.one_of(st.sampled_from(ODD), st.tuples(st.integers(0, 20), st.integers(0, 20))))
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(st.integers(-1, 9), st.integers(-1, 9))),
        "scale": draw(st.sampled_from([None, 0.3])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "alibi_slopes": draw(st.sampled_from([None, slopes(Hkv * group).double()])),
        "sink_logits": draw(st.sampled_from([None, sinks(Hkv * group).double()])),
    }
    B = draw(st.integers(0, 2))
    if draw(st.booleans()):
        T, B = shape[0], 1
        shape = (T, T)
        inner = draw(st.lists(st.integers(0, T), max_size=4))
        options["cu_seqlens"] = borders(0, *sorted(inner), T)
    sizes = dict(B=B, H=Hkv * group, Hkv=Hkv, D=draw(st.sampled_from([1, 5, 8])))
    inputs = make(*shape, **sizes, with_dlse=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    return inputs.double(), options


@settings(deadline=None, max_examples=120)
@given(calls(), st.sampled_from(PATHS))
@example((make(9, 3, D=8).double(), {"causal": True}), public)  # rows that see no key
@example((make(9, 3, D=8).double(), {"causal": True, "softcap": 1.0}), through_function)
@example((make(3, 9, D=8).double(), {"window": (0, 0)}), in_parts)
def test_against_the_definition(call, path):
    inputs, options = call
    expected = with_gradients(plain, inputs, **options)
    for name, got in with_gradients(path, inputs, **options).items():
        assert got.dtype == torch.float64, name
        torch.testing.assert_close(
            got, expected[name], msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("path", [public, public_apart, through_function])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("Tq, Tk", [(33, 47), (113, 203), (203, 113), (67, 67)])
def test_error_is_within_twice_that_of_plain_maths(Tq, Tk, dtype, path):
    inputs = make(Tq, Tk, H=4, Hkv=2, dtype=dtype)
    assert_close_to_float64(path, inputs, causal=True)
    assert_close_to_float64(path, inputs, window=(9, 4), softcap=2.0, sink_logits=sinks(4))
    if Tq == Tk:
        assert_close_to_float64(path, inputs, **every_option(4, Tq))


@pytest.mark.parametrize("causal, window", [(True, None), (False, (2, 1)), (True, (1, 3))])
@pytest.mark.parametrize("Tq, Tk", [(6, 6), (3, 6), (6, 3)])
@pytest.mark.parametrize("path", [public_apart, in_parts, through_function])
def test_who_sees_whom_by_perturbation(path, Tq, Tk, causal, window):
    q, k, v, *_ = make(Tq, Tk, D=8).double()
    options = dict(causal=causal, window=window)
    sees = visible(Tq, Tk, causal, window, None, "cpu")
    before = path(q, k, v, **options)[0]
    for key in range(Tk):
        changed = [t.clone() for t in (k, v)]
        for tensor in changed:
            tensor[:, :, key] += 1.0
        moved = (path(q, *changed, **options)[0] != before).any(dim=3)
        assert (moved == sees[:, key]).all()


@pytest.mark.parametrize("path", [public_apart, in_parts, through_function])
def test_no_document_sees_another(path):
    inputs = make(12, 12, D=8)
    lengths = [3, 0, 5, 4]
    cu_seqlens = borders(0, 3, 3, 8, 12, 12)
    q, k, v, *_ = inputs
    together = path(q, k, v, causal=True, cu_seqlens=cu_seqlens)[0]
    parts = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    apart = torch.cat([kernels.flash_attention(*part, causal=True) for part in parts], dim=2)
    torch.testing.assert_close(together, apart)
    changed = [torch.cat([torch.randn(1, 2, 3, 8), t[:, :, 3:]], dim=2) for t in (q, k, v)]
    again = path(*changed, causal=True, cu_seqlens=cu_seqlens)[0]
    assert torch.equal(again[:, :, 3:], together[:, :, 3:])
    assert not torch.equal(again, together)


def test_rows_that_see_no_key():
    q, k, v, *_ = make(5, 2, D=8)
    for path in PATHS:
        out, lse = path(q, k, v, causal=True)
        assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all()
        sink = sinks(2)
        out, lse = path(q, k, v, causal=True, sink_logits=sink)
        assert (out[:, :, :3] == 0).all()
        torch.testing.assert_close(lse[:, :, :3], sink[:, None].expand(2, 3)[None])


def test_one_cached_query_sees_every_key():
    q, k, v, *_ = make(1, 9, D=8)
    one = kernels.flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(one, kernels.flash_attention(q, k, v))


@pytest.mark.parametrize("path", PATHS)
def test_layouts(path):
    inputs = make(5, 5, H=4, Hkv=2, D=8, dtype=torch.bfloat16)
    assert not inputs.q.is_contiguous()
    got = with_gradients(path, inputs, causal=True)
    dense = Inputs(*(t.contiguous() for t in inputs))
    for name, expected in with_gradients(path, dense, causal=True).items():
        torch.testing.assert_close(got[name], expected)
    assert got["out"].dtype == torch.bfloat16 and got["lse"].dtype == torch.float32
    if path in (through_function, as_op):
        merged = got["out"].transpose(1, 2).reshape(1, 5, 32)
        assert merged.data_ptr() == got["out"].data_ptr()


def test_a_width_that_kernels_do_not_take_is_padded_for_them(monkeypatch):
    inputs = make(5, 5, D=13, dtype=torch.bfloat16)
    assert_close_to_float64(through_function, inputs, causal=True)
    q, k, v, *_ = inputs
    assert through_function(q, k, v)[0].shape == q.shape


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_gradients_in_float64(path):
    q, k, v, *_ = (t.detach().requires_grad_() for t in make(7, 7, H=2, Hkv=1, D=8).double())
    options = every_option(2, 7, torch.float64)
    sink = options.pop("sink_logits").requires_grad_()
    options["softcap"] = 1.0

    def function(q, k, v, sink):
        return path(q, k, v, sink_logits=sink, **options)

    assert gradcheck(function, (q, k, v, sink), fast_mode=True)
    if path in (public, public_apart, in_parts):
        assert gradgradcheck(function, (q, k, v, sink), fast_mode=True)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sink_logits"])
@pytest.mark.parametrize("path", PATHS)
def test_gradient_of_any_one_input(path, wanted):
    options = {"sink_logits": sinks(2), "causal": True}
    tensors = {**make(4, 4, D=8)._asdict(), **options}
    tensors[wanted] = tensors[wanted].detach().requires_grad_()
    q, k, v, options["sink_logits"] = (tensors[name] for name in ("q", "k", "v", "sink_logits"))

    def gradient(attention, used):
        loss = attention(q, k, v, **options)[used].square().sum()
        return torch.autograd.grad(loss, tensors[wanted], materialize_grads=True, allow_unused=True)

    for used in (0, 1) if wanted != "v" else (0,):  # out alone, lse alone
        torch.testing.assert_close(gradient(path, used), gradient(plain, used))


@pytest.mark.parametrize("path", [through_function, as_op])
def test_the_second_derivative_of_a_kernel_says_what_to_do(path):
    q, k, v, *_ = (t.detach().requires_grad_() for t in make(3, 3, D=8))
    (dq,) = torch.autograd.grad(path(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(UserError, match=r"use_backend\('reference', ops=\['flash_attention'\]\)"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (1, 0)}, {"softcap": 2.0}], ids=str
)
def test_the_second_derivative_comes_as_that_error_says(options):
    leaves = [t.detach().double().requires_grad_() for t in make(3, 3, D=8)[:3]]
    with (
        kernels.use_backend("reference", ops=["flash_attention"]),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        assert torch.autograd.gradgradcheck(
            functools.partial(kernels.flash_attention, **options), leaves
        )


@pytest.mark.parametrize("path", [public, in_parts, through_function])
def test_under_activation_checkpointing(path):
    inputs, options = make(9, 9, D=8), dict(causal=True, softcap=2.0, sink_logits=sinks(2))

    def again(q, k, v, **options):
        return checkpoint(functools.partial(path, **options), q, k, v, use_reentrant=False)

    expected = with_gradients(path, inputs, **options)
    for name, got in with_gradients(again, inputs, **options).items():
        assert torch.equal(got, expected[name]), name


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("window", [None, (20, 0)])
def test_no_whole_matrix_of_scores_is_ever_there(window):
    inputs = make(600, 600, H=2, D=4)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    attention = functools.partial(in_parts, most=10_000, window=window, softcap=2.0)
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with_gradients(attention, inputs)
    assert largest.elements <= 10_000  # of 720,000
    assert sum(kept.values()) <= 4 * 600 * 6 * 4  # q, k and v


def test_a_window_alone_keeps_no_whole_mask():
    T, kept = 4096, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for window in ((64, 0), (64, -1), (-1, 8)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with_gradients(public, make(T, T, H=1, D=4), window=window)
        assert sum(kept.values()) < T * T  # bytes, where the matrix alone has four times as many


def test_a_small_window_reads_few_keys():
    """Twice the tokens, twice the scores."""

    def scores(T):
        rows = []
        q, k, v, *_ = make(T, T, H=1, D=4)
        with Shapes(rows):
            in_parts(q, k, v, window=(10, 0), most=1 << 14)
        return sum(n * m for n, m in rows)

    assert scores(4096) <= 2.1 * scores(2048)


class Shapes(TorchDispatchMode):
    """Collects the sizes of the matrices that exp gives."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.exp.default:
            self.rows.append(result.shape[-2:])
        return result


# --- the ops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "B, Tq, Tk, options, dtype",
    [
        (2, 5, 7, {}, torch.bfloat16),
        (1, 9, 9, every_option(4, 9), torch.float32),
        (2, 7, 5, {"causal": True, "sink_logits": sinks(4)}, torch.bfloat16),
        (1, 1, 1, {"alibi_slopes": slopes(4)}, torch.float32),
    ],
)
def test_opcheck(B, Tq, Tk, options, dtype):
    inputs = make(Tq, Tk, B=B, H=4, Hkv=2, D=8, dtype=dtype)
    options = arguments(inputs.q, **options)
    q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
    slopes, sink, *others = options
    sink = None if sink is None else sink.detach().requires_grad_()
    opcheck(FORWARD, (q, k, v, slopes, sink, *others))
    out, lse = FORWARD(*inputs[:3], *options)
    for dlse in (None, inputs.dlse):
        opcheck(BACKWARD, (inputs.dout, dlse, *inputs[:3], out, lse, *options))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_the_ops_give(device):
    """The contract of csrc/torch/flash_attention.cpp: a token's heads lie together in memory."""
    inputs = make(5, 7, B=2, H=4, Hkv=2, D=8, dtype=torch.float16, device=device)
    q, k, v, dout, dlse = inputs
    options = arguments(q, sink_logits=sinks(4, device=device))
    out, lse = FORWARD(q, k, v, *options)
    assert (out.shape, out.dtype, out.stride()) == (q.shape, q.dtype, (160, 8, 32, 1))
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, 5), torch.float32, True)
    *gradients, dsink = BACKWARD(dout, dlse, q, k, v, out, lse, *options)
    for gradient, tensor in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == torch.float16
        assert gradient.transpose(1, 2).is_contiguous()
    assert (dsink.shape, dsink.dtype) == ((4,), torch.float32)
    dsink = BACKWARD(dout, None, q, k, v, out, lse, *arguments(q))[3]
    assert (dsink.shape, dsink.dtype) == ((0,), torch.float32)


def test_which_calls_a_card_refuses():
    def refusal(D, dtype):
        q = torch.empty(1, 1, 4, D, dtype=dtype, device="meta")
        return kernels.explain("flash_attention", q, q, q, capability=(8, 0)).reasons.get("cuda")

    assert refusal(256, torch.bfloat16) is None and refusal(13, torch.float16) is None
    assert "not torch.float32" in refusal(64, torch.float32)
    assert "256 wide, not 257" in refusal(257, torch.float16)


# --- autocast, torch.compile, torch.func -----------------------------------------------------------


@pytest.mark.parametrize("path", ["reference", "maths"])
def test_autocast_takes_its_dtype_as_pytorch_does(path):
    q, k, v, *_ = make(9, 9, D=8)
    options = {} if path == "reference" else {"softcap": 2.0}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = public_apart(q, k, v, **options)
    rounded = [t.bfloat16() for t in (q, k, v)]
    assert torch.equal(out, kernels.flash_attention(*rounded, **options))
    assert lse.dtype == torch.float32
    assert torch.equal(lse, public(*rounded, **options)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.flash_attention(q.double(), k.double(), v.double()).dtype == torch.float64


def counting():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    return graphs, backend


@pytest.mark.parametrize("attention", [kernels.flash_attention, lambda *a, **k: as_op(*a, **k)[0]])
def test_compiles_whole_with_dynamic_shapes_forward_and_backward(attention):
    graphs, backend = counting()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    for T in (5, 7, 9):  # no two sizes are equal at first: the compiler would take them for one
        inputs = make(T, T, B=3, H=4, Hkv=2, D=8, with_dlse=False).double()

        def with_lse(q, k, v):  # the definition's, which is compared with itself
            return compiled(q, k, v, causal=True), plain(q, k, v, causal=True)[1]

        expected = with_gradients(plain, inputs, causal=True)
        for name, got in with_gradients(with_lse, inputs).items():
            torch.testing.assert_close(got, expected[name])
    assert len(graphs) == 1


@pytest.mark.parametrize("path", [public, through_function])
def test_compiles_again_for_a_second_length_but_not_for_a_third(path):
    graphs, backend = counting()
    compiled = torch.compile(path, fullgraph=True, backend=backend)
    for T in (7, 9, 11, 13):
        inputs, options = make(T, T, H=4, Hkv=2, D=8), every_option(4, T)
        expected = with_gradients(path, inputs, **options)
        for name, got in with_gradients(compiled, inputs, **options).items():
            torch.testing.assert_close(got, expected[name])
    assert len(graphs) == 2


@pytest.mark.parametrize("path", [public, through_function, functools.partial(in_parts, most=150)])
def test_compiles_whole_through_the_autograd_of_the_compiler(path):
    inputs, options = make(9, 9, H=4, Hkv=2, D=8), every_option(4, 9)
    compiled = torch.compile(path, fullgraph=True, backend="aot_eager")
    expected = with_gradients(path, inputs, **options)
    for name, got in with_gradients(compiled, inputs, **options).items():
        torch.testing.assert_close(got, expected[name])


def test_compiles_whole_under_autocast():
    def run(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return public(q, k, v, causal=True)

    inputs = make(9, 9, D=8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = with_gradients(run, inputs)
    for name, got in with_gradients(compiled, inputs).items():
        torch.testing.assert_close(got, expected[name])


def test_under_torch_func():
    q, k, v, *_ = make(9, 9, B=2, D=8)

    def loss(q, k, v):
        return in_parts(q[None], k[None], v[None], softcap=2.0)[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    for sample in range(2):
        mine = torch.func.grad(loss)(q[sample], k[sample], v[sample])
        torch.testing.assert_close(per_sample[sample], mine)


# --- bad input -------------------------------------------------------------------------------------


def test_bad_tensors_are_named():
    q, k, v = torch.randn(3, 2, 4, 3, 8)
    with pytest.raises(UserError, match=r"\(B, H, T, D\)"):
        kernels.flash_attention(q[0], k, v)
    with pytest.raises(UserError, match="one shape"):
        kernels.flash_attention(q, k, v[:, :, :2])
    with pytest.raises(UserError, match="at least 1 wide"):
        kernels.flash_attention(q[..., :0], k[..., :0], v[..., :0])
    with pytest.raises(UserError, match="4 query heads are no multiple of 3"):
        kernels.flash_attention(q, k[:, :3], v[:, :3])
    with pytest.raises(UserError, match="one floating dtype"):
        kernels.flash_attention(q, k.double(), v)
    with pytest.raises(UserError, match="on cpu, meta and cpu"):
        kernels.flash_attention(q, k.to("meta"), v)
    with pytest.raises(UserError, match="must be tensors"):
        kernels.flash_attention(q, k, v.numpy())
    with pytest.raises(UserError, match="one floating dtype of 16 bits"):
        kernels.flash_attention(*(t.to(torch.float8_e5m2) for t in (q, k, v)))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"window": 3}, r"window must be \(left, right\).*not 3"),
        ({"window": (1, -2)}, "not \\(1, -2\\)"),
        ({"window": (1.0, 2)}, "two whole numbers"),
        ({"window": (True, 2)}, "two whole numbers"),
        ({"window": (1, 2, 3)}, "two whole numbers"),
        ({"window": (2**70, 0)}, "two whole numbers"),
        ({"causal": "no"}, "causal must be True or False, not 'no'"),
        ({"deterministic": 1}, "deterministic must be True or False"),
        ({"return_lse": None}, "return_lse must be True or False"),
        ({"scale": "0.1"}, "scale must be a number above 0, not '0.1'"),
        ({"softcap": None}, "softcap must be 0"),
        ({"alibi_slopes": [1.0] * 4}, "alibi_slopes must be a tensor, not list"),
        ({"cu_seqlens": [0, 3]}, "cu_seqlens must be a tensor, not list"),
        ({"scale": 0.0}, "scale must be a number above 0, not 0.0"),
        ({"scale": float("nan")}, "not nan"),
        ({"softcap": -1.0}, "softcap must be 0"),
        ({"softcap": float("inf")}, "not inf"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be \(4,\) floats"),
        ({"alibi_slopes": torch.ones(4).int()}, "of torch.int32"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "get no gradient"),
        ({"sink_logits": torch.ones(4, 1)}, r"sink_logits must be \(4,\) floats"),
        ({"sink_logits": torch.ones(4, device="meta")}, "on cpu and sink_logits on meta"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "must be int32 .* not torch.int64"),
        ({"cu_seqlens": borders(0)}, r"\(n \+ 1,\) for n ≥ 1 documents"),
        ({"cu_seqlens": borders(0, 3).to("meta")}, "on cpu and cu_seqlens on meta"),
        ({"cu_seqlens": borders(1, 3)}, r"start with 0.*it is \[1, 3\]"),
        ({"cu_seqlens": borders(0, 2)}, "number of tokens, 3"),
        ({"cu_seqlens": borders(0, 2, 1, 3)}, "never decrease"),
    ],
)
def test_bad_options_are_named(options, says):
    q, k, v = torch.randn(3, 1, 4, 3, 8)
    with pytest.raises(UserError, match=says):
        kernels.flash_attention(q, k, v, **options)


def test_documents_need_one_batch_and_as_many_queries_as_keys():
    q, k, v = torch.randn(3, 2, 4, 3, 8)
    with pytest.raises(UserError, match="batch of 1"):
        kernels.flash_attention(q, k, v, cu_seqlens=borders(0, 3))
    with pytest.raises(UserError, match="as many queries as keys"):
        kernels.flash_attention(q[:1, :, :2], k[:1], v[:1], cu_seqlens=borders(0, 2))
