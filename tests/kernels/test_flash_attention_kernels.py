"""The attention kernels against float64, in the emulator and, where there is one, on a GPU.

What only the emulator can tell (schedules, bytes, faults) is in test_flash_attention_emulated.py.
"""

import functools

import pytest
import torch
from attention_kernels import CARDS, attend_on
from attention_truth import assert_close_to_float64, make, sinks, slopes, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.kernels import emulator

DTYPES = [torch.bfloat16, torch.float16]
BACKENDS = [
    *(
        pytest.param(
            card,
            id=f"emulator-{card[0]}.{card[1]}",
            marks=pytest.mark.skipif(
                emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
            ),
        )
        for card in CARDS
    ),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ),
]


somewhere = pytest.mark.skipif(
    emulator.refuse() is not None and not torch.cuda.is_available(),
    reason=f"neither a CUDA GPU nor the emulator: {emulator.refuse()}",
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A card that the emulator plays, or "cuda"."""
    return request.param


def check(backend, Tq, Tk, *, deterministic=False, options=None, **shape):
    device = "cuda" if backend == "cuda" else "cpu"
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (options or {}).items()
    }
    inputs = make(Tq, Tk, device=device, **shape)
    assert_close_to_float64(attend_on(backend, deterministic), inputs, **options)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (113, 203), (239, 1), (1, 239), (128, 64), (203, 113)])
def test_odd_shapes(backend, Tq, Tk, D):
    for causal in (False, True):
        dtype = DTYPES[(Tq + causal) % 2]
        check(backend, Tq, Tk, H=1, D=D, dtype=dtype, options={"causal": causal})


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("Tq, Tk", [(799, 3), (3, 799), (1023, 1024), (1024, 1023)])
def test_longer_odd_shapes(backend, Tq, Tk, D, causal):
    dtype = DTYPES[(Tq + causal) % 2]
    check(backend, Tq, Tk, H=2, Hkv=1, D=D, dtype=dtype, options={"causal": causal})


@somewhere
@pytest.mark.parametrize("D", [1, 8, 20, 40, 72, 96, 136, 200, 255])
def test_head_dims_are_padded(D):
    for card in ["cuda"] if torch.cuda.is_available() else CARDS[: 1 + D % 3]:
        check(card, 70, 90, D=D, dtype=DTYPES[D % 2], options={"causal": D % 2 == 0})


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("deterministic", [False, True])
def test_grouped_queries(backend, group, deterministic):
    check(
        backend, 70, 140, H=8, Hkv=8 // group, dtype=torch.bfloat16,
        deterministic=deterministic, options={"causal": True},
    )  # fmt: skip


@st.composite
def drawn_options(draw, Tq, Tk, H):
    options = {"causal": draw(st.booleans())}
    side = st.sampled_from([-1, 0, 1, 5, 31, 64, 200])
    if draw(st.booleans()):
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.01, 0.3, 1.0]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if draw(st.booleans()):
        options["alibi_slopes"] = slopes(H)
    if draw(st.booleans()):
        options["sink_logits"] = sinks(H)
    if Tq == Tk and draw(st.booleans()):
        borders = draw(st.lists(st.integers(0, Tq), max_size=6))
        padding = draw(st.integers(0, 3))
        options["cu_seqlens"] = torch.tensor(
            [0, *sorted(borders), Tq, *[Tq] * padding], dtype=torch.int32
        )
    return options


@somewhere
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_options_in_any_combination(data):
    Tq = data.draw(st.integers(1, 270))
    Tk = Tq if data.draw(st.booleans()) else data.draw(st.integers(1, 270))
    H = data.draw(st.sampled_from([1, 2, 4]))
    options = data.draw(drawn_options(Tq, Tk, H))
    shape = {
        "B": 1 if "cu_seqlens" in options else data.draw(st.integers(1, 2)),
        "H": H,
        "Hkv": data.draw(st.sampled_from([h for h in (1, 2, 4) if H % h == 0])),
        "D": data.draw(st.sampled_from([16, 64, 64, 80, 128, 256])),
        "dtype": data.draw(st.sampled_from(DTYPES)),
        "with_dlse": data.draw(st.booleans()),
        "seed": data.draw(st.integers(0, 2**31)),
    }
    card = data.draw(st.sampled_from(CARDS))
    backend = "cuda" if torch.cuda.is_available() else card
    deterministic = data.draw(st.booleans())
    if backend == "cuda":
        check(backend, Tq, Tk, deterministic=deterministic, options=options, **shape)
        return
    order = {
        "seed": data.draw(st.integers(0, 3)),
        "asynchrony": data.draw(st.sampled_from(["late", "early", "random"])),
    }
    with emulator.settings(**order):
        check(backend, Tq, Tk, deterministic=deterministic, options=options, **shape)


@pytest.mark.parametrize("D", [64, 128])
def test_rows_that_see_nothing(backend, D):
    """Causal with more queries than keys: the first queries see no key."""
    device = "cuda" if backend == "cuda" else "cpu"
    inputs = make(200, 60, D=D, dtype=torch.bfloat16, device=device)
    got = with_gradients(attend_on(backend), inputs, causal=True)
    assert (got["out"][:, :, :140] == 0).all() and (got["lse"][:, :, :140] == -torch.inf).all()
    assert (got["dq"][:, :, :140] == 0).all()
    assert all(got[name].isfinite().all() for name in ("dq", "dk", "dv"))
    logits = sinks(2, device=device)
    got = with_gradients(attend_on(backend), inputs, causal=True, sink_logits=logits)
    expected = logits[:, None].expand(2, 140)
    torch.testing.assert_close(got["lse"][0, :, :140], expected)
    assert (got["out"][:, :, :140] == 0).all()


@pytest.mark.parametrize("D", [64, 128])
def test_a_query_that_is_no_number_has_no_lse_either(backend, D):
    device = "cuda" if backend == "cuda" else "cpu"
    q, k, v = (t.clone() for t in make(90, 90, D=D, dtype=torch.bfloat16, device=device)[:3])
    q[:, :, 40] = torch.nan
    out, lse = attend_on(backend)(q, k, v, causal=True)
    rows = torch.arange(90, device=device) == 40
    assert out[:, :, rows].isnan().all() and lse[:, :, rows].isnan().all()
    assert out[:, :, ~rows].isfinite().all() and lse[:, :, ~rows].isfinite().all()


def test_empty_tensors(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    for B, Tq, Tk in ((0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 0, 0)):
        inputs = make(Tq, Tk, B=B, dtype=torch.bfloat16, device=device)
        got = with_gradients(attend_on(backend), inputs, sink_logits=sinks(2, device=device))
        assert got["out"].shape == (B, 2, Tq, 64) and (got["out"] == 0).all()
        expected = inputs.dlse.sum((0, 2)) if Tk == 0 else torch.zeros(2, device=device)
        torch.testing.assert_close(got["dsink"], expected)
        assert all((got[name] == 0).all() for name in ("dq", "dk", "dv"))


def test_causal_by_perturbation(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    inputs = make(150, 170, dtype=torch.bfloat16, device=device)
    attend = functools.partial(attend_on(backend), causal=True)
    q, k, v = inputs[:3]
    before, _ = attend(q, k, v)
    for key in (0, 19, 20, 63, 64, 130, 169):
        changed = [t.clone() for t in (k, v)]
        for tensor in changed:
            tensor[:, :, key] += 1.0
        moved = (attend(q, *changed)[0] != before).any(dim=3)
        sees = torch.arange(150, device=device) + 20 >= key
        assert (moved == sees).all()


def test_no_document_sees_another(backend):
    """By no bit, and no gradient crosses a border."""
    device = "cuda" if backend == "cuda" else "cpu"
    borders = torch.tensor([0, 70, 75, 160, 160], dtype=torch.int32, device=device)
    inputs = make(160, 160, dtype=torch.float16, device=device)
    attend = attend_on(backend)
    whole = with_gradients(attend, inputs, causal=True, cu_seqlens=borders)
    for start, stop in ((0, 70), (70, 75), (75, 160)):
        rows = slice(start, stop)
        alone = type(inputs)(*(t[:, :, rows].contiguous() for t in inputs))
        for name, got in with_gradients(attend, alone, causal=True).items():
            torch.testing.assert_close(got, whole[name][:, :, rows], atol=4e-3, rtol=4e-3)
    changed = inputs._replace(k=inputs.k.clone(), v=inputs.v.clone())
    changed.k[:, :, :70] = 100.0
    changed.v[:, :, :70] = 100.0
    moved = with_gradients(attend, changed, causal=True, cu_seqlens=borders)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(moved[name][:, :, 70:], whole[name][:, :, 70:]), name


@pytest.mark.parametrize(
    "how", ["fused", "unaligned", "unaligned and dense", "columns apart", "rows apart", "expanded"]
)
def test_strides(backend, how):
    device = "cuda" if backend == "cuda" else "cpu"
    dense = make(70, 70, dtype=torch.bfloat16, device=device)

    def laid_out(tensor):
        if how == "unaligned":
            return torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
        if how == "unaligned and dense":
            return torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(tensor.shape)
        if how == "columns apart":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        if how == "rows apart":
            return torch.nn.functional.pad(tensor, (8, 16))[..., 8:-16]
        return tensor

    inputs = type(dense)(*(laid_out(t) for t in dense[:4]), dense.dlse)
    if how == "expanded":  # what .sum() hands back
        inputs = inputs._replace(dout=torch.ones((), device=device).expand(1, 2, 70, 64))
        inputs = inputs._replace(dlse=torch.ones((), device=device).expand(1, 2, 70))
        inputs = inputs._replace(dout=inputs.dout.bfloat16())
    assert_close_to_float64(attend_on(backend), inputs, causal=True)
    out, _ = attend_on(backend)(*inputs[:3])
    assert out.transpose(1, 2).is_contiguous()  # as the next projection reads it


def test_strides_of_a_single_token(backend):
    """Of a dimension of 1 a stride may be any number."""
    device = "cuda" if backend == "cuda" else "cpu"
    inputs = make(1, 1, dtype=torch.float16, device=device)
    odd = [t.as_strided(t.shape, (3, t.stride(1), 2**33 + 1, 1)) for t in inputs[:3]]
    assert_close_to_float64(attend_on(backend), inputs._replace(q=odd[0], k=odd[1], v=odd[2]))


def test_a_gradient_of_the_lse_alone(backend):
    device = "cuda" if backend == "cuda" else "cpu"
    q, k, v, _, dlse = make(40, 50, dtype=torch.bfloat16, device=device)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    _, lse = attend_on(backend)(q, k, v)
    dq, dk = torch.autograd.grad(lse, (q, k), dlse)
    exact = [t.detach().double().requires_grad_() for t in (q, k)]
    scores = exact[0] @ exact[1].mT / 8
    expected = torch.autograd.grad(torch.logsumexp(scores, -1), exact, dlse.double())
    for got, truth in zip((dq, dk), expected, strict=True):
        torch.testing.assert_close(got.double(), truth, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("D", [64, 128])
def test_no_row_depends_on_what_others_see(backend, D):
    """Not by a bit: neither on other queries, nor on keys that it does not see."""
    device = "cuda" if backend == "cuda" else "cpu"
    attend = attend_on(backend)
    inputs = make(150, 150, H=1, D=D, dtype=torch.bfloat16, device=device)
    q, k, v = (t.clone() for t in inputs[:3])
    before = attend(q, k, v, causal=True)
    for row in (3, 71, 140):
        louder = q.clone()
        louder[:, :, row] *= 40  # scores far beyond those of its neighbours
        others = torch.arange(150, device=device) != row
        for got, old in zip(attend(louder, k, v, causal=True), before, strict=True):
            assert torch.equal(got[:, :, others], old[:, :, others])
        later = k.clone()
        later[:, :, row:] *= 40
        for got, old in zip(attend(q, later, v, causal=True), before, strict=True):
            assert torch.equal(got[:, :, :row], old[:, :, :row])


@somewhere
@settings(deadline=None, max_examples=30)
@given(
    borders=st.lists(
        st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 300), min_size=2, max_size=9
    ),
    right=st.sampled_from([-1, 0, 30]),
    deterministic=st.booleans(),
)
def test_wrong_documents_do_no_harm(borders, right, deterministic):
    """On a GPU the values of cu_seqlens are not checked: whatever they are, nothing hangs or is overrun."""
    q, k, v, dout, _ = make(200, 200, H=1, dtype=torch.bfloat16)
    ops, card = torch.ops.almostgpt, ()
    if torch.cuda.is_available():
        q, k, v, dout = (t.cuda() for t in (q, k, v, dout))
    else:
        emulator.load()
        ops, card = torch.ops.almostgpt_emulator, (90,)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=q.device)
    options = (None, None, cu_seqlens, -1, right, 0.125, 0.0, deterministic)
    out, lse = ops.flash_attention_forward(q, k, v, *options, *card)
    saved = (dout, None, q, k, v, out, lse)
    for result in (out, *ops.flash_attention_backward(*saved, *options, *card)[:3]):
        assert result.isfinite().all()  # whoever sees what, it is an average of numbers
