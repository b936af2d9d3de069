"""linear_attention against its definition in float64, with every pair of tokens written out."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import elu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import LinearState, linear_attention
from almostgpt.kernels.linear_attention import EPS

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def make(B=2, H=4, Hkv=2, T=9, D=5, Dv=3, dtype=torch.float64, seed=0, normalizer=False):
    """Features of queries and keys, values, and the normalizer or None; numbers that dtype has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q, k, v = normal(B, H, T, D), normal(B, Hkv, T, D), normal(B, Hkv, T, Dv)
    pair = None
    if normalizer:  # then q and k are of any sign
        pair = tuple((elu(x) + 1).to(dtype) for x in (normal(B, H, T, D), normal(B, Hkv, T, D)))
    else:
        q, k = elu(q) + 1, elu(k) + 1
    return q.to(dtype), k.to(dtype), v.to(dtype), pair


def truth(q, k, v, normalizer=None, documents=None):
    """In the dtype of its inputs, with (T, T) matrices."""
    heads, T = q.shape[1] // k.shape[1], q.shape[2]
    n, m = normalizer or (q, k)
    k, v, m = (t.repeat_interleave(heads, 1) for t in (k, v, m))
    sees = torch.ones(T, T, dtype=torch.bool).tril()
    if documents is not None:
        sees = (sees & (documents[:, :, None] == documents[:, None]))[:, None]
    products, weights = ((a @ b.mT).masked_fill(~sees, 0) for a, b in ((q, k), (n, m)))
    return products @ v / (weights.sum(-1, keepdim=True) + EPS)


def double(value):
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return None if value is None else value.double()


def random_documents(B, T, seed, longest=90):
    generator = torch.Generator().manual_seed(seed)
    borders = torch.rand(B, T, generator=generator) < 1 / longest
    return borders.cumsum(1).int() * 3 - 1


SIZES = st.fixed_dictionaries(
    {
        "B": st.integers(0, 3),
        "Hkv": st.integers(1, 3),
        "T": st.one_of(st.integers(0, 5), st.sampled_from([63, 64, 65, 128, 130, 200])),
        "D": st.integers(1, 9),
        "Dv": st.integers(1, 9),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    sizes=SIZES,
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    normalizer=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_outputs_and_gradients_against_the_definition(
    sizes, groups, dtype, normalizer, packed, seed
):
    q, k, v, pair = make(
        **sizes, H=groups * sizes["Hkv"], dtype=dtype, seed=seed, normalizer=normalizer
    )
    documents = random_documents(sizes["B"], sizes["T"], seed, 40) if packed else None

    def run(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves[:3], tuple(leaves[3:]) or None)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        dy = dy.to(dtype).to(y.dtype)  # the same numbers for the definition in float64
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    tensors = (q, k, v, *(pair or ()))
    ours = run(
        lambda q, k, v, pair: linear_attention(q, k, v, normalizer=pair, documents=documents),
        *tensors,
    )
    exact = run(lambda *a: truth(*a, documents=documents), *map(double, tensors))
    unit = torch.finfo(dtype).eps
    for got, wanted in zip(ours, exact, strict=True):
        assert got.dtype == dtype and got.shape == wanted.shape
        if wanted.numel():
            # The arithmetic is float32's: beyond it, one rounding of the result (and of y, on which
            # the gradients do not depend).
            largest = wanted.abs().max().item()
            scale = max(largest, 1.0) * 200
            exact_unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            assert (got - wanted).abs().max() <= unit * largest + exact_unit * scale + 1e-7 * unit


def test_a_change_of_a_later_token_changes_not_a_bit_before():
    q, k, v, pair = make(T=150, dtype=torch.float32, normalizer=True)
    before = linear_attention(q, k, v, normalizer=pair)
    for place in (0, 63, 64, 100, 149):
        changed = [t.clone() for t in (q, k, v, *pair)]
        for t in changed:
            t[:, :, place] += 1
        after = linear_attention(*changed[:3], normalizer=tuple(changed[3:]))
        assert torch.equal(after[:, :, :place], before[:, :, :place])
        assert not torch.equal(after[:, :, place:], before[:, :, place:])


@settings(deadline=None, max_examples=25)
@given(
    pieces=st.lists(st.sampled_from([0, 1, 1, 2, 63, 64, 65, 100]), min_size=1, max_size=5),
    normalizer=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_state_takes_a_sequence_in_pieces(pieces, normalizer, seed):
    q, k, v, pair = make(T=sum(pieces), seed=seed, normalizer=normalizer)
    whole = truth(q, k, v, pair)
    state = LinearState.empty(2, 2, 5, 3, dtype=torch.float64)
    held, found = copy.copy(state), []
    for piece in zip(*(t.split(pieces, dim=2) for t in (q, k, v, *(pair or ()))), strict=True):
        found.append(linear_attention(*piece[:3], normalizer=piece[3:] or None, state=state))
    torch.testing.assert_close(torch.cat(found, dim=2), whole)
    assert held.numerator is state.numerator
    m = k if pair is None else pair[1]
    torch.testing.assert_close(state.numerator, k.mT @ v)
    torch.testing.assert_close(state.denominator, m.sum(2))


@pytest.mark.parametrize("T", [1, 7, 70])
@pytest.mark.parametrize("normalizer", [False, True])
def test_missing_tokens_enter_no_state_and_give_finite_outputs(T, normalizer):
    q, k, v, pair = make(B=3, T=T, normalizer=normalizer, dtype=torch.float32)
    lengths = [0, T // 2, T]
    tensors = [t.clone() for t in (q, k, v, *(pair or ()))]
    for t in tensors:
        for row, length in enumerate(lengths):
            t[row, :, length:] = torch.nan
    state, alone = (LinearState.empty(3, 2, 5, 3) for _ in range(2))
    for part in (state, alone):
        part.numerator.fill_(0.5), part.denominator.fill_(2.0)
    new_lengths = torch.tensor(lengths, dtype=torch.int32)
    pair = tuple(tensors[3:]) or None
    y = linear_attention(*tensors[:3], normalizer=pair, state=state, new_lengths=new_lengths)
    assert y.isfinite().all()
    for row, length in enumerate(lengths):
        part = [t[row : row + 1, :, :length] for t in tensors]
        own = LinearState(alone.numerator[row : row + 1], alone.denominator[row : row + 1])
        pair = tuple(part[3:]) or None
        wanted = linear_attention(*part[:3], normalizer=pair, state=own)
        torch.testing.assert_close(y[row : row + 1, :, :length], wanted)
    torch.testing.assert_close(state.numerator, alone.numerator)
    torch.testing.assert_close(state.denominator, alone.denominator)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 30, 63, 64, 65, 129]), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_documents_are_each_as_if_alone(lengths, seed):
    q, k, v, _ = (
        None if t is None else t.requires_grad_() for t in make(B=1, T=sum(lengths), seed=seed)
    )
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed = linear_attention(q, k, v, documents=documents)
    parts = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    alone = torch.cat([linear_attention(*part) for part in parts], dim=2)
    torch.testing.assert_close(packed, alone)
    # Neither the values of other documents nor their gradients have any part in one.
    chosen = (seed % len(lengths)) == documents[0]
    gradients = torch.autograd.grad(packed[:, :, chosen].sum(), (q, k, v))
    for gradient in gradients:
        assert not gradient[:, :, ~chosen].any()
    with torch.no_grad():
        others = [torch.where(chosen[:, None], t, t * 3 + 1) for t in (q, k, v)]
        again = linear_attention(*others, documents=documents)
    assert torch.equal(again[:, :, chosen], packed[:, :, chosen])


def test_gradcheck():
    q, k, v, pair = make(B=1, H=2, Hkv=1, T=5, D=2, Dv=2, normalizer=True)
    documents = torch.tensor([[0, 0, 0, 4, 4]])
    leaves = [t.requires_grad_() for t in (q, k, v, *pair)]

    def run(q, k, v, n, m):
        return linear_attention(q, k, v, normalizer=(n, m), documents=documents)

    assert gradcheck(run, leaves) and gradgradcheck(run, leaves)


class Largest(TorchDispatchMode):
    """The most elements that any tensor within has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("packed", [False, True])
def test_memory_grows_with_the_length_not_with_its_square(packed):
    def largest(T):
        q, k, v, _ = make(B=1, H=2, Hkv=1, T=T, D=8, Dv=8, dtype=torch.float32)
        documents = random_documents(1, T, 0) if packed else None
        kept = 0

        def pack(t):
            nonlocal kept
            kept += t.numel()
            return t

        leaves = [t.requires_grad_() for t in (q, k, v)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with Largest() as mode:
                linear_attention(*leaves, documents=documents).sum().backward()
        return mode.elements, kept

    (most, kept), (most_of_double, kept_of_double) = largest(2048), largest(4096)
    assert most_of_double <= 2 * most and most_of_double < 4096**2 / 10
    assert kept_of_double <= 2.01 * kept


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_it_is_whole_and_the_same(compiler, packed):
    torch._dynamo.reset()
    q, k, v, pair = make(T=70, dtype=torch.float32, normalizer=True)
    documents = random_documents(2, 70, 1, 20) if packed else None
    leaves = [t.requires_grad_() for t in (q, k, v, *pair)]

    def run(q, k, v, n, m):
        return linear_attention(q, k, v, normalizer=(n, m), documents=documents)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    y, wanted = compiled(*leaves), run(*leaves)
    torch.testing.assert_close(y, wanted)
    for got, truth in zip(
        *(torch.autograd.grad(out.square().sum(), leaves) for out in (y, wanted)), strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_step_writes_into_its_state():
    torch._dynamo.reset()
    q, k, v, _ = make(T=3, dtype=torch.float32)
    state, own = (LinearState.empty(2, 2, 5, 3) for _ in range(2))
    step = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([1, 0], dtype=torch.int32)
    for t in range(3):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        y = step(*token, state=state, new_lengths=lengths)
        torch.testing.assert_close(y, linear_attention(*token, state=own, new_lengths=lengths))
    torch.testing.assert_close(state.numerator, own.numerator)
    assert state.numerator[0].any() and not state.numerator[1].any()


def test_where_models_run_it():
    q, k, v, _ = make(T=70, dtype=torch.float32)
    wanted = linear_attention(q, k, v)
    leaf = q.clone().requires_grad_()
    outs = [
        linear_attention(leaf, k, v),
        checkpoint(linear_attention, leaf, k, v, use_reentrant=False),
    ]
    plain, checkpointed = (torch.autograd.grad(out.sum(), leaf)[0] for out in outs)
    assert torch.equal(outs[1], wanted) and torch.equal(plain, checkpointed)
    with torch.inference_mode():
        state = LinearState.empty(2, 2, 5, 3)
        torch.testing.assert_close(linear_attention(q, k, v, state=state), wanted)
    with torch.no_grad():  # made under inference_mode, it can be written into outside of it
        linear_attention(q, k, v, state=state)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_attention(q, k, v)
    assert torch.equal(y, linear_attention(*(t.bfloat16() for t in (q, k, v))))
    meta = linear_attention(*(t.to("meta") for t in (q, k, v)))
    assert meta.shape == wanted.shape and meta.is_meta
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (q, k, v)]
        documents = mode.from_tensor(torch.zeros(2, 70, dtype=torch.int32))
        y = linear_attention(fakes[0].requires_grad_(), *fakes[1:], documents=documents)
        y.sum().backward()
        assert y.shape == wanted.shape and fakes[0].grad.shape == q.shape
    found = kernels.explain("linear_attention", q, k, v)
    assert found.backend == "reference" and "no cuda kernel" in found.reasons["cuda"]


Q, K, V, _ = make(B=2, T=4)
STATE = LinearState.empty(2, 2, 5, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "args, options, says",
    [
        ((Q[0], K, V), {}, r"must be \(B, H, T, D\), not \(4, 4, 5\)"),
        ((Q, K[:, :, 1:], V), {}, r"\(B, Hkv, T, D\) and \(B, Hkv, T, Dv\)"),
        ((Q, K, V[:, :1]), {}, "q, k and v must be"),
        ((Q[:, :3], K, V), {}, "3 query heads are no multiple of 2 key heads"),
        ((Q, K.float(), V), {}, "one floating dtype"),
        ((Q, K, V.to("meta")), {}, "on one device, not on cpu, meta"),
        ((Q, K, 1.0), {}, "must be tensors"),
        ((Q, K, V), {"normalizer": (Q,)}, "normalizer two of them or None"),
        ((Q, K, V), {"normalizer": (K, Q)}, "normalizer must be shaped as q and k"),
        ((Q, K, V), {"state": STATE.numerator}, "must be a LinearState, not Tensor"),
        ((Q, K, V), {"state": LinearState.empty(2, 2, 5, 3)}, "in torch.float64, not"),
        ((Q, K, V), {"state": LinearState.empty(2, 2, 5)}, r"a state of \(2, 2, 5, 3\)"),
        ((Q.clone().requires_grad_(), K, V), {"state": STATE}, "a gradient is asked for"),
        (
            (Q, K, V),
            {"state": STATE, "documents": torch.zeros(2, 4, dtype=torch.int32)},
            "documents cannot be used with a state",
        ),
        ((Q, K, V), {"documents": torch.zeros(4, dtype=torch.int32)}, r"and \(2, 4\), not"),
        ((Q, K, V), {"documents": torch.tensor([[0, 1, 0, 1]] * 2)}, "must never decrease"),
        ((Q, K, V), {"new_lengths": torch.tensor([1, 2])}, "must be int32"),
        ((Q, K, V), {"new_lengths": torch.tensor([1, 5], dtype=torch.int32)}, "within 0 … 4"),
    ],
)
def test_bad_inputs_are_named(args, options, says):
    with pytest.raises(UserError, match=says):
        linear_attention(*args, **options)
