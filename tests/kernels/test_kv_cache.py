"""kv_append and decode_attention against a truth in float64, wherever they run.

The truth and the bounds are in support/kv_cache_truth.py, whose Run checks every step: the slots, the
rotated queries, and what attention gives. What only the emulator can tell (schedules, bytes, faults) is
in test_kv_cache_emulated.py.
"""

import dataclasses
import math

import pytest
import torch
from attention_kernels import CARDS
from attention_truth import sinks, slopes
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cache_backends import (
    ALL_DTYPES,
    device_of,
    dtype_of,
    dtypes_of,
    on_every_backend,
)
from kv_cache_truth import (
    LAYOUTS,
    Case,
    Run,
    calls,
    missing,
    same_bits,
)

from almostgpt.kernels import KVLayer, emulator

EXAMPLES = {
    "reference": 100,
    "ops": 30,
    "cpu": 100,
    "emulator": 60,
    "cuda": 200,
}  # drawn, of each backend


# --- any combination -------------------------------------------------------------------------------


@st.composite
def drawn_cases(draw, dtypes) -> Case:
    group, D = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([8, 20, 64, 80, 128, 256]))
    window = draw(st.sampled_from([None, 1, 2, 5, 17, 33, 50, 70]))
    capacity, sink_tokens = draw(st.sampled_from([17, 40, 90])), 0
    if window is not None:
        capacity = window + draw(st.sampled_from([0, 3, 15, 30]))
        sink_tokens = min(window - 1, draw(st.sampled_from([0, 1, 3, 5, 16, 20])))
    return Case(
        B=draw(st.integers(1, 3)),
        Hkv=draw(st.integers(1, 2)),
        group=group,
        D=D,
        dtype=draw(st.sampled_from(dtypes)),
        capacity=capacity,
        window=window,
        sinks=sink_tokens,
        rotated=draw(st.sampled_from([0, D, D // 4 * 2, 6])),
        int8=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.05, 0.4])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 5.0, 50.0])),
        alibi=draw(st.booleans()),
        sink_logits=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**31)),
    )


def feed_drawn_chunks(run: Run, draw) -> None:
    """A prompt, which may fill the cache more than once, then chunks of any number of tokens."""
    case = run.case
    most = case.capacity - case.sinks
    tokens = draw(st.sampled_from([0, 1, most // 2, most, 2 * most + 3]) | st.integers(0, most))
    for T in [most] * (tokens // most) + [tokens % most]:
        feed_some(run, T, draw, attend=False)
    for _ in range(draw(st.integers(1, 4))):
        T = min(draw(st.sampled_from([1, 1, 2, 3, 7, 16])), case.most_decoded, most)
        feed_some(run, T, draw)


def feed_some(run: Run, T: int, draw, *, attend: bool = True) -> None:
    """Up to T tokens of each sequence, as many as fit in; a window always has room."""
    rooms = [T if run.case.window else min(T, run.case.capacity - n) for n in run.truth.lengths]
    if draw(st.booleans()) and min(rooms) > 0:
        run.feed(min(rooms), attend=attend)  # without new_lengths
    else:
        some = [draw(st.sampled_from([n, n, n // 2, 0]) | st.integers(0, n)) for n in rooms]
        run.feed(T, some, attend=attend and T > 0)


def feed_a_drawn_case(backend, draw) -> None:
    feed_drawn_chunks(Run(backend, draw(drawn_cases(dtypes_of(backend)))), draw)


@settings(deadline=None, max_examples=EXAMPLES["reference"])
@given(data=st.data())
def test_any_combination_on_the_reference(data):
    feed_a_drawn_case("reference", data.draw)


@settings(deadline=None, max_examples=EXAMPLES["ops"])
@given(data=st.data())
def test_any_combination_by_the_ops_of_a_cpu(data):
    feed_a_drawn_case("ops", data.draw)


@pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
@settings(deadline=None, max_examples=EXAMPLES["cpu"])
@given(data=st.data())
def test_any_combination_in_cpp(data):
    feed_a_drawn_case("cpu", data.draw)


@pytest.mark.skipif(missing(CARDS[0]) is not None, reason=str(missing(CARDS[0])))
@settings(deadline=None, max_examples=EXAMPLES["emulator"])
@given(data=st.data())
def test_any_combination_in_the_emulator(data):
    asynchrony = data.draw(st.sampled_from(["late", "early", "random"]))
    with emulator.settings(seed=data.draw(st.integers(0, 3)), asynchrony=asynchrony):
        feed_a_drawn_case(data.draw(st.sampled_from(CARDS)), data.draw)


@pytest.mark.skipif(missing("cuda") is not None, reason=str(missing("cuda")))
@settings(deadline=None, max_examples=EXAMPLES["cuda"])
@given(data=st.data())
def test_any_combination_on_a_gpu(data):
    feed_a_drawn_case("cuda", data.draw)


# --- chosen cases ----------------------------------------------------------------------------------


def each_dtype(backend, **case):
    return [Case(dtype=dtype, **case) for dtype in dtypes_of(backend)]


@on_every_backend
@pytest.mark.parametrize("int8", [False, True])
def test_the_first_token_of_an_empty_cache_is_its_value(backend, int8):
    for case in each_dtype(backend, capacity=16, rotated=64, int8=int8, group=2):
        run = Run(backend, case)
        tokens = case.draw(1, torch.Generator().manual_seed(1))
        out = run.feed(1, tokens=tokens)
        largest = tokens[2].abs().max().item()
        close = largest / 254 + 8 * torch.finfo(case.dtype).eps if int8 else 1e-6
        torch.testing.assert_close(out, tokens[2].expand_as(out), atol=close, rtol=0)
        run.feed(1)


@on_every_backend
def test_sixteen_tokens_of_eight_heads_each(backend):
    """128 rows of queries for every key."""
    for int8 in (False, True):
        case = Case(
            Hkv=2, group=8, D=128, dtype=dtype_of(backend), capacity=100, window=70, sinks=4,
            rotated=128, int8=int8, sink_logits=True,
        )  # fmt: skip
        run = Run(backend, case)
        run.feed(60, attend=False)
        run.feed(16)
        run.feed(16)


@on_every_backend
def test_a_chunk_across_the_seam_of_the_ring(backend):
    for S in (0, 5):
        case = Case(
            B=2, Hkv=2, dtype=dtype_of(backend), capacity=40, window=25, sinks=S, rotated=32
        )
        run = Run(backend, case)
        run.feed(35, [35, 31], attend=False)
        run.feed(9)  # positions 31 … 43 in slots 0 … 39
        run.feed(11, [2, 11])


@on_every_backend
def test_a_ring_that_goes_round_many_times(backend):
    case = Case(
        B=2, group=2, D=8, dtype=dtype_of(backend), capacity=9, window=7, sinks=2, rotated=6
    )
    run = Run(backend, case)
    for step in range(40):
        run.feed(1 + step % 3, None if step % 2 else [1 + step % 3, step % 2])
    assert run.truth.lengths[0] > 8 * case.capacity


@on_every_backend
def test_many_keys(backend):
    """Enough to be split among blocks, and queries of sequences of very different lengths."""
    for int8, window in ((False, None), (True, 900)):
        case = Case(
            B=3, group=4, dtype=dtype_of(backend), capacity=1000, window=window, rotated=64,
            sinks=0 if window is None else 20, int8=int8,
        )  # fmt: skip
        run = Run(backend, case)
        run.feed(970, [970, 300, 1], attend=False)
        run.feed(3)
        run.feed(2, [0, 2, 1])


@on_every_backend
@pytest.mark.parametrize("length", [1_000_003, 2**30 - 100])
@pytest.mark.parametrize("rotated", [64, 20])
def test_far_positions_turn_as_exactly_as_near_ones(backend, length, rotated):
    """Run holds what is rotated to a few units in the last place of float32 (or of 16 bits)."""
    for int8 in (False, True):
        case = Case(
            group=2, dtype=dtype_of(backend), capacity=40, window=30, sinks=3, rotated=rotated,
            int8=int8,
        )  # fmt: skip
        run = Run(backend, case)
        run.feed(3)
        run.jump(length)
        run.feed(37, attend=False)
        for T in (1, 11, 4):
            run.feed(T)


@on_every_backend
def test_a_row_without_new_tokens(backend):
    """It gives zeros, and nothing is written: Run compares every bit of all slots."""
    for options in ({}, {"alibi": True, "sink_logits": True}, {"int8": True}):
        case = Case(B=3, dtype=dtype_of(backend), capacity=20, window=15, sinks=2, **options)
        run = Run(backend, case)
        assert (run.feed(4, [0, 4, 0])[0] == 0).all()  # empty, and still so
        out = run.feed(5, [5, 0, 0])
        assert (out[1:] == 0).all() and (out[0] != 0).any()
        run.feed(3, [0, 0, 0])
        run.feed(2)


@on_every_backend
def test_a_batch_of_nothing(backend):
    append, decode = calls(backend)
    device, dtype = device_of(backend), dtype_of(backend)
    for cached in (dtype, torch.int8):
        layer = KVLayer.empty(0, 2, 8, 20, dtype=cached, window=6, sink_tokens=1, device=device)
        case = Case(B=0, Hkv=2, group=2, D=20, rotated=6, dtype=dtype)
        q, k, v = (x.to(device) for x in case.draw(3, torch.Generator()))
        got = append(q, k, v, layer, turns=case.turns(device))
        assert all(x.shape == (0, 4, 3, 20) for x in got)
        out = decode(got[0], layer, q_sink=got[1])
        assert out.shape == (0, 4, 3, 20) and out.dtype == dtype


@on_every_backend
def test_appending_no_tokens(backend):
    run = Run(backend, Case(dtype=dtype_of(backend), rotated=64, window=20, sinks=2))
    run.feed(0, attend=False)
    run.feed(3)


@on_every_backend
def test_turns_of_no_dimension_turn_nothing(backend):
    append, _ = calls(backend)
    device, case = device_of(backend), Case(B=2, dtype=dtype_of(backend), window=20, sinks=2)
    q, k, v = (x.to(device) for x in case.draw(3, torch.Generator()))
    layer = case.empty(device)
    layer.lengths.add_(4)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    got = append(q, k, v, layer, turns=nothing)
    assert all(same_bits(x.contiguous(), q.contiguous()) for x in got)
    assert same_bits(layer.keys[:, :, 4:7].contiguous(), k.contiguous())


@on_every_backend
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_queries_and_keys_that_do_not_turn_keep_their_bits(backend, dtype):
    if dtype not in dtypes_of(backend):
        pytest.skip("no dtype of the kernels")
    append, _ = calls(backend)
    case, device = Case(B=2, group=2, D=20, dtype=dtype, window=20, sinks=2), device_of(backend)
    q, k, v = case.draw(5, torch.Generator().manual_seed(1))
    k[0, 0, 1, :4] = torch.tensor(
        [math.nan, math.inf, -0.0, torch.finfo(dtype).smallest_normal / 8]
    )
    layer = case.empty(device)
    q, k, v = (x.to(device) for x in (q, k, v))
    got, got_sink = append(q, k, v, layer)
    assert got_sink is got and same_bits(got.contiguous(), q.contiguous())
    held = layer.keys[:, :, :5, :20]
    assert held[0, 0, 1, 0].isnan()  # whichever of them
    held[0, 0, 1, 0] = k[0, 0, 1, 0] = 0
    assert same_bits(held.contiguous(), k.contiguous())
    assert same_bits(layer.values[:, :, :5, :20].contiguous(), v.contiguous())
    without_sinks = Case(B=2, group=2, D=20, dtype=dtype, rotated=20, window=20)
    turns = without_sinks.turns(device)
    for layer in (
        without_sinks.empty(device),
        dataclasses.replace(without_sinks, window=None).empty(device),
    ):
        got, got_sink = append(q, k, v, layer, turns=turns)
        assert got_sink is got


# --- who sees what, to the bit ---------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize(
    "capacity, window, sink_tokens",
    [
        (32, None, 0),
        (20, 20, 0),
        (20, 20, 5),
        (24, 9, 0),
        (24, 9, 4),
        (32, 17, 16),
        (31, 16, 15),
        (5, 1, 0),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
def test_who_sees_what(backend, capacity, window, sink_tokens, int8):
    """The value of token p is 1 in dimension p mod 64 alone: out tells each token that was seen."""
    case = Case(
        B=2, group=2, D=64, dtype=dtype_of(backend), capacity=capacity, window=window,
        sinks=sink_tokens, int8=int8, rotated=64,
    )  # fmt: skip
    run = Run(backend, case)
    for step in range(8 if isinstance(backend, tuple) else 16):
        T = min(1 + step * 5 % 16, case.most_decoded, capacity - sink_tokens)
        if window is None:
            T = min(T, capacity - max(run.truth.lengths))
        if T == 0:
            break
        new = [T, T // 2 if step % 3 == 0 else T]
        starts = list(run.truth.lengths)
        q, k, v = case.draw(T, run.generator)
        positions = torch.tensor(starts)[:, None] + torch.arange(T)
        v = torch.nn.functional.one_hot(positions % 64, 64).to(case.dtype)[:, None].contiguous()
        out = run.feed(T, new, tokens=[q, k, v])
        for b, n in enumerate(new):
            for i in range(n):
                t = starts[b] + i
                seen = [p for p in range(t + 1) if sees(t, p, window, sink_tokens)]
                wanted = torch.zeros(64, dtype=torch.bool)
                wanted[[p % 64 for p in seen]] = True
                assert ((out[b, :, i] > 0) == wanted).all(), (b, t, out[b, :, i])


def sees(t: int, p: int, window: int | None, sink_tokens: int) -> bool:
    return window is None or p < sink_tokens or p > t - (window - sink_tokens)


@on_every_backend
def test_a_window_as_long_as_the_cache_is_as_good_as_none(backend):
    outs = []
    for window in (None, 30):
        run = Run(backend, Case(dtype=dtype_of(backend), capacity=30, window=window, rotated=64))
        run.feed(20, attend=False)
        outs.append(torch.cat([run.feed(1) for _ in range(10)], dim=2))
    assert torch.equal(*outs)


@on_every_backend
@pytest.mark.parametrize("S", [0, 3])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_key_that_is_not_finite_shows_while_it_is_seen(backend, wrong, int8, S):
    """Whatever else is there, then not any more; what nobody sees never does."""
    append, decode = calls(backend)
    device = device_of(backend)
    case = Case(
        B=2, Hkv=2, group=2, dtype=dtype_of(backend), capacity=12, window=8, sinks=S, int8=int8
    )
    layer, generator = case.empty(device), torch.Generator().manual_seed(1)
    at = 4 if S else 1
    for t in range(30):
        q, k, v = (x.to(device) for x in case.draw(1, generator))
        if t == at:
            k[1, 1, 0, 5] = wrong
        if wrong == math.inf and not int8:
            q = q.abs()  # that score is above all others, and not below, which would hide it
        out = decode(append(q, k, v, layer)[0], layer)
        layer.lengths.add_(1)
        shows = sees(t, at, 8, S) and t >= at
        assert out[0].isfinite().all() and out[1, :2].isfinite().all()
        assert (~out[1, 2:].isfinite()).any(-1).all() == shows, (t, out[1])
        if int8 and t >= at and t < at + 9:
            scale = layer.key_scales[1, 1, S + (at - S) % (12 - S)]
            assert not scale.isfinite()


@on_every_backend
def test_rows_of_int8_at_the_edges(backend):
    """Zeros, one element, halves between two codes, the largest and the smallest numbers."""
    append, _ = calls(backend)
    device, dtype = device_of(backend), dtype_of(backend)
    layer = KVLayer.empty(1, 1, 8, 16, dtype=torch.int8, device=device)
    k = torch.zeros(1, 1, 8, 16, dtype=dtype)
    k[0, 0, 1, 3] = -3.0
    k[0, 0, 2] = torch.arange(16) + 0.5
    k[0, 0, 2, 0] = 127.0  # scale 1
    k[0, 0, 3] = torch.finfo(dtype).max
    k[0, 0, 3, ::2] *= -1
    k[0, 0, 4] = torch.finfo(dtype).smallest_normal
    k[0, 0, 5, 7], k[0, 0, 6, 7], k[0, 0, 7, 7] = math.nan, math.inf, -math.inf
    append(k.to(device), k.to(device), (-k).to(device), layer)
    for codes, scales, x in (
        (layer.keys, layer.key_scales, k), (layer.values, layer.value_scales, -k)
    ):  # fmt: skip
        codes, scales = codes[0, 0].cpu().long(), scales[0, 0].cpu()
        assert (codes[0] == 0).all() and scales[0] == 0
        assert codes[1].abs().tolist() == [0, 0, 0, 127] + [0] * 12
        assert codes[2].abs().max() == 127 and (codes[3].abs() == 127).all()
        off = (codes[2] * scales[2] - x[0, 0, 2].float()).abs()
        assert (off <= scales[2] / 2 * (1 + 1e-5)).all()
        assert codes[3].sum() == 0 and (codes[4].abs() == 127).all()
        assert not scales[5:].isfinite().any() and (codes >= -127).all()


@on_every_backend
@pytest.mark.parametrize("ratio", [1e2, 1e4, 6e7])
def test_int8_values_of_any_size_side_by_side(backend, ratio):
    """A large value that a query does not see, or hardly, costs the small ones nothing: also in fp16."""
    append, decode = calls(backend)
    dtype = torch.float32 if dtype_of(backend) == torch.float32 else torch.float16
    layer = KVLayer.empty(1, 1, 40, 64, dtype=torch.int8, device=device_of(backend))
    k = torch.zeros(1, 1, 34, 64, dtype=dtype)
    v = torch.full_like(k, 1e-3)
    k[..., 0, 0], v[..., 0, :] = -64.0, 1e-3 * ratio  # seen, with a probability of nothing
    v[..., 33, :] = 1e-3 * ratio  # not seen by the first of the two queries
    q = torch.zeros(1, 1, 34, 64, dtype=dtype)
    q[..., 0] = 8.0
    q, k, v = (x.to(device_of(backend)) for x in (q, k, v))
    append(q[:, :, :32], k[:, :, :32], v[:, :, :32], layer)
    layer.lengths.add_(32)
    queries, sinks_ = append(q[:, :, 32:], k[:, :, 32:], v[:, :, 32:], layer)
    out = decode(queries, layer, q_sink=sinks_)[0, 0].float().cpu()
    torch.testing.assert_close(out[0], torch.full((64,), 1e-3), rtol=5e-3, atol=0)
    torch.testing.assert_close(
        out[1], torch.full((64,), (32e-3 + 1e-3 * ratio) / 33), rtol=5e-3, atol=0
    )


@pytest.mark.parametrize("units", [1, 63, 64, 127, 190, 191, 300])
def test_codes_of_subnormal_rows_stay_within_127(units):
    """Their scale is a subnormal number itself, and rounded by as much as a half."""
    layer = KVLayer.empty(1, 1, 1, 16, dtype=torch.int8)
    k = torch.full((1, 1, 1, 16), units * 2.0**-149)
    calls("reference")[0](k, k, -k, layer)
    assert (layer.keys >= 0).all() and (layer.values <= 0).all() and (layer.values >= -127).all()


# --- other arguments ---------------------------------------------------------------------------------


@on_every_backend
def test_tickets_may_be_missing_or_few(backend):
    case = Case(B=2, Hkv=2, group=8, dtype=dtype_of(backend), capacity=300, rotated=64)
    run = Run(backend, case)
    run.feed(280, attend=False)
    q, k, v = (x.to(run.device) for x in case.draw(16, run.generator))
    got, _ = run.append(q, k, v, run.layer, turns=case.turns(run.device))
    outs = [
        run.decode(got, dataclasses.replace(run.layer, tickets=tickets))
        for tickets in (run.layer.tickets, None, run.layer.tickets[:1])
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("tokens", [7, 15])  # within the window, and beyond it
@on_every_backend
def test_without_q_sink_q_scores_the_sinks(backend, tokens):
    case = Case(dtype=dtype_of(backend), capacity=20, window=10, sinks=3)
    run = Run(backend, case)
    run.feed(tokens, attend=False)
    run.layer.lengths.sub_(2)
    q = case.draw(2, run.generator)[0].to(run.device)
    alone = run.decode(q, run.layer)
    close = {"atol": 4 * torch.finfo(case.dtype).eps, "rtol": 0}
    torch.testing.assert_close(alone, run.decode(q, run.layer, q_sink=q.clone()), **close)
    assert (run.decode(q, run.layer, q_sink=-q) - alone).abs().max() > 0.1


@on_every_backend
def test_slopes_and_logits_of_another_dtype(backend):
    case = Case(group=4, dtype=dtype_of(backend))
    run = Run(backend, case)
    run.feed(10, attend=False)
    q = case.draw(1, run.generator)[0].to(run.device)
    run.layer.lengths.sub_(1)
    options = {"alibi_slopes": slopes(4, run.device), "sink_logits": sinks(4, device=run.device)}
    options = {name: value.bfloat16() for name, value in options.items()}
    wide = {name: value.double() for name, value in options.items()}
    torch.testing.assert_close(
        run.decode(q, run.layer, **options), run.decode(q, run.layer, **wide)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_an_empty_layer(dtype):
    layer = KVLayer.empty(2, 3, 10, 20, dtype=dtype, window=7, sink_tokens=2)
    assert layer.keys.shape == layer.values.shape == (2, 3, 10, 32)
    assert layer.keys.dtype == layer.values.dtype == dtype
    assert layer.lengths.dtype == torch.int32 and layer.lengths.tolist() == [0, 0]
    assert (layer.capacity, layer.reach, layer.window, layer.sink_tokens) == (10, 7, 7, 2)
    assert not layer.tickets.any() and layer.tickets.dtype == torch.int32
    scales = (layer.key_scales, layer.value_scales)
    if dtype == torch.int8:
        assert all(s.shape == (2, 3, 10) and s.dtype == torch.float32 for s in scales)
    else:
        assert scales == (None, None)
    assert KVLayer.empty(2, 3, 10, 16).keys.shape[3] == 16
    assert KVLayer.empty(2, 3, 10, 16).reach == 10
