"""``sample`` by its definition: what may be drawn, how often, and that nothing else moves a draw."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_truth import ODD, WAYS, check_rows, noise, philox, sampler, streams
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import sample_reference

REFERENCE = sampler("reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# --- the generator -----------------------------------------------------------------------------------

# Of Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, block.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, block", KNOWN)
def test_the_generator_gives_the_published_blocks(counter, key, block):
    def tensors(words):
        return tuple(torch.tensor([word]) for word in words)

    assert tuple(map(int, sample_reference.philox(tensors(counter), tensors(key)))) == block
    assert philox(counter, key) == block  # the truth of these tests


@given(*(st.integers(-(2**63), 2**63 - 1) for _ in "abc"), st.integers(1, 9))
def test_noise_is_a_function_of_id_position_seed_and_sequence(position, seed, sequence, V):
    expected = noise(V, position, seed, sequence)
    rows = [torch.tensor([x]) for x in (position, seed, sequence)]
    got = sample_reference.noise_of_all(V, sample_reference.Streams(*rows))
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=1e-12)
    one = sample_reference.noise(torch.tensor([V - 1]), *rows)
    assert one[0] == got[0, V - 1]


def test_the_noise_of_the_smallest_and_the_largest_word():
    got = sample_reference.gumbel(torch.tensor([0, 2**32 - 1]))
    # E of the first is v + v²/2 + …, of the second −ln(2^−33).
    assert got.tolist() == pytest.approx([33 * math.log(2), -math.log(33 * math.log(2))], abs=1e-9)


# --- one draw ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    V=st.one_of(st.integers(1, 40), st.sampled_from([257, 1000, 1500])),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 0.3, 4.0, 60.0]),
    temperature=st.sampled_from([0, 1e-3, 0.3, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([None, 1, 2, 7, 300, 5000]),
    top_p=st.sampled_from([None, 1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.02, 0.5, 1.0]),
    penalty=st.sampled_from([1.0, 0.7, 1.4]),
    seed=st.integers(0, 2**31),
)
def test_what_is_drawn_is_what_may_be(
    V, dtype, spread, temperature, top_k, top_p, min_p, penalty, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(3, V, generator=generator)).to(dtype)
    seen = torch.rand(3, V, generator=generator) < 0.3
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": penalty}
    check_rows(REFERENCE, logits, streams(3, seed), seen, temperature=temperature, **options)


def test_equal_logits_are_kept_or_dropped_together():
    """Of a row 3 2 2 2 1 and a cut between the twos, all three twos are drawn, and never the one."""
    logits = torch.tensor([1.0, 2.0, 3.0, 2.0, 2.0]).expand(3000, 5)
    rows = (torch.arange(3000), torch.zeros(3000, dtype=torch.int64), torch.arange(3000))
    masses = np.exp([3.0, 2.0, 2.0, 2.0, 1.0]) / np.exp([3.0, 2.0, 2.0, 2.0, 1.0]).sum()
    for options in ({"top_k": 2}, {"top_p": masses[0] + masses[1] / 2}, {"min_p": math.exp(-1.5)}):
        ids, _ = kernels.sample(logits, *rows, **options)
        assert sorted(set(ids.tolist())) == [1, 2, 3, 4], options


def test_the_least_that_each_filter_keeps_is_the_largest():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]]).expand(500, 4)
    rows = (torch.arange(500),) * 3
    for options in ({"top_k": 1}, {"top_p": 1e-12}, {"min_p": 1.0}, {"temperature": 1e-30}):
        assert set(kernels.sample(logits, *rows, **options)[0].tolist()) == {1, 2}, options
    assert set(kernels.sample(logits, *rows, temperature=0)[0].tolist()) == {1}


def test_the_penalty_is_that_of_transformers():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, history = torch.randn(4, 30), torch.randint(30, (4, 12))
    history[:, 0] = logits.argmax(1)
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter_(1, history, True)
    expected = RepetitionPenaltyLogitsProcessor(4.0)(history, logits).argmax(1)
    marked = seen.clone()
    rows = streams(4)
    ids, _ = kernels.sample(logits, *rows, temperature=0, repetition_penalty=4.0, seen=marked)
    assert torch.equal(ids, expected) and not torch.equal(ids, logits.argmax(1))
    assert torch.equal(marked, seen.scatter(1, ids[:, None], True))


def test_thresholds_are_those_of_transformers():
    """What is never drawn is what its warpers set to −inf, where no two logits are equal."""
    from transformers.generation import logits_process as theirs

    torch.manual_seed(1)
    logits = 3 * torch.randn(40)
    rows = (torch.arange(20_000), torch.full((20_000,), 5), torch.arange(20_000))
    for options, warpers in (
        ({"top_k": 6}, [theirs.TopKLogitsWarper(6)]),
        ({"top_p": 0.7}, [theirs.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [theirs.MinPLogitsWarper(0.1)]),
        ({"top_k": 12, "top_p": 0.8}, [theirs.TopKLogitsWarper(12), theirs.TopPLogitsWarper(0.8)]),
    ):
        warped = logits[None] / 1.5
        for warper in warpers:
            warped = warper(None, warped)
        ids, _ = kernels.sample(logits.expand(20_000, 40), *rows, temperature=1.5, **options)
        assert set(ids.tolist()) == set(warped[0].isfinite().nonzero()[:, 0].tolist()), options


# --- many draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["positions", "sequences", "seeds"])
def test_frequencies_are_softmax(over):
    """By chi-square, over many positions, sequences and seeds; 0.1 % of seeds would fail."""
    B, temperature = 40_000, 1.3
    logits = torch.linspace(-2, 2, 11)
    rows = {name: torch.full((B,), 3) for name in ("positions", "seeds", "sequences")}
    rows[over] = torch.arange(B) * (2**33 + 1 if over != "positions" else 1)
    ids, _ = kernels.sample(logits.expand(B, 11), *rows.values(), temperature=temperature)
    expected = (logits.double() / temperature).softmax(0) * B
    statistic = ((ids.bincount(minlength=11) - expected) ** 2 / expected).sum().item()
    assert statistic < 29.59  # 10 degrees of freedom


def test_neighbouring_draws_are_independent():
    """Pairs of draws at consecutive positions and sequences, by chi-square over their 16 cells."""
    B = 40_000
    zeros = torch.zeros(B, dtype=torch.int64)
    for positions, sequences in ((torch.arange(B), zeros), (zeros, torch.arange(B))):
        ids, _ = kernels.sample(torch.zeros(B, 4), positions, zeros + 9, sequences)
        cells = (4 * ids[0::2] + ids[1::2]).bincount(minlength=16).double()
        statistic = ((cells - B / 32) ** 2 / (B / 32)).sum().item()
        assert statistic < 37.7  # 15 degrees of freedom, 0.1 %


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}]))
def test_a_draw_is_moved_by_its_own_row_alone(seed, options):
    """Neither by other rows, nor their order, nor by padding."""
    generator = torch.Generator().manual_seed(seed)
    logits, rows = torch.randn(6, 50, generator=generator), streams(6, seed)
    ids, _ = kernels.sample(logits, *rows, **options)
    order = torch.randperm(6, generator=generator)
    assert torch.equal(
        kernels.sample(logits[order], *(r[order] for r in rows), **options)[0], ids[order]
    )
    alone = [
        kernels.sample(logits[i : i + 1], *(r[i : i + 1] for r in rows), **options)[0]
        for i in range(6)
    ]
    assert torch.equal(torch.cat(alone), ids)
    padded = torch.nn.functional.pad(logits, (0, 27), value=-torch.inf)
    assert torch.equal(kernels.sample(padded, *rows, **options)[0], ids)


# --- what is not a number ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row, wanted", ODD, ids=str)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_of_odd_rows_something_sensible_is_drawn(row, wanted, options):
    logits = torch.tensor(row).expand(40, len(row))
    ids, logprobs = REFERENCE(logits, *streams(40), logprobs=True, **options)
    if options.get("temperature") == 0:
        wanted = {min(wanted)}
    assert set(ids.tolist()) == wanted
    own = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, own, equal_nan=True)


# --- as an op ---------------------------------------------------------------------------------------


def of_the_op(B=3, V=20, seen=True, penalty=1.2, top_k=5, logprobs=True):
    torch.manual_seed(0)
    marks = torch.rand(B, V) < 0.5 if seen else None
    return torch.randn(B, V), *streams(B), marks, 0.8, top_k, 0.9, 0.01, penalty, logprobs


@pytest.mark.parametrize("seen, logprobs", [(True, True), (False, False)])
def test_opcheck(seen, logprobs):
    arguments = of_the_op(seen=seen, penalty=1.2 if seen else 1.0, logprobs=logprobs)
    opcheck(torch.ops.almostgpt.sample.default, arguments)


def test_the_op_on_a_cpu_is_the_reference():
    logits, *rows, seen, T, k, p, m, penalty, _ = of_the_op()
    marks = seen.clone()
    ids, logprobs = torch.ops.almostgpt.sample(logits, *rows, seen, T, k, p, m, penalty, True)
    options = {"temperature": T, "top_k": k, "top_p": p, "min_p": m, "repetition_penalty": penalty}
    again = kernels.sample(logits, *rows, seen=marks, logprobs=True, **options)
    assert torch.equal(ids, again[0]) and torch.equal(logprobs, again[1])
    assert torch.equal(seen, marks)


@pytest.mark.parametrize("options", [*WAYS, {"top_k": 4, "top_p": 0.5}], ids=str)
def test_no_shape_depends_on_values(options):
    """So that a CUDA graph can hold the reference; fakes have no values to look at."""
    with FakeTensorMode():
        rows = [torch.empty(2, dtype=torch.int64) for _ in "abc"]
        logits = torch.empty(2, 3000)
        seen = torch.empty(2, 3000, dtype=torch.bool)
        ids, logprobs = REFERENCE(
            logits, *rows, seen=seen, repetition_penalty=1.3, logprobs=True, **options
        )
        assert ids.shape == logprobs.shape == (2,) and ids.dtype == torch.int64


@pytest.mark.slow
def test_compiles_whole():
    torch.manual_seed(0)
    logits, rows, seen = torch.randn(3, 300), streams(3), torch.rand(3, 300) < 0.3
    for options in ({}, {"top_k": 9, "top_p": 0.8}, {"temperature": 0}):
        compiled = torch.compile(
            lambda x, *rows, seen, options=options: kernels.sample(
                x, *rows, seen=seen, repetition_penalty=1.2, logprobs=True, **options
            ),
            fullgraph=True,
        )
        marks = seen.clone()
        ids, logprobs = compiled(logits, *rows, seen=marks)
        mine = seen.clone()
        expected = kernels.sample(
            logits, *rows, seen=mine, repetition_penalty=1.2, logprobs=True, **options
        )
        assert torch.equal(ids, expected[0]) and torch.equal(marks, mine)
        torch.testing.assert_close(logprobs, expected[1])


def test_empty_batches_and_gradients():
    ids, logprobs = kernels.sample(torch.randn(0, 5), *streams(0), logprobs=True)
    assert ids.shape == logprobs.shape == (0,)
    ids, none = kernels.sample(torch.randn(2, 5, requires_grad=True), *streams(2), top_k=2)
    assert none is None and not ids.requires_grad
    _, logprobs = kernels.sample(torch.randn(2, 5, requires_grad=True), *streams(2), logprobs=True)
    assert not logprobs.requires_grad


LOGITS, ROWS = torch.zeros(2, 5), streams(2)


@pytest.mark.parametrize(
    "logits, rows, options, says",
    [
        (torch.zeros(5), ROWS, {}, r"logits must be \(B, V\) with V ≥ 1, not \(5,\)"),
        (torch.zeros(2, 0), ROWS, {}, r"V ≥ 1, not \(2, 0\)"),
        (LOGITS.int(), ROWS, {}, "floating tensor of 16 bits or more, not torch.int32"),
        (LOGITS, streams(3), {}, r"positions must be int64 and \(2,\), .*, not torch.int64 and \(3,\)"),
        (LOGITS, (ROWS[0], ROWS[1].int(), ROWS[2]), {}, "seeds must be int64 .* not torch.int32"),
        (LOGITS, (*ROWS[:2], ROWS[2].to("meta")), {}, "logits are on cpu and sequences on meta"),
        (LOGITS, ROWS, {"temperature": -0.1}, "temperature is -0.1, but must be 0 .greedy. or above"),
        (LOGITS, ROWS, {"temperature": math.nan}, "temperature is nan"),
        (LOGITS, ROWS, {"temperature": math.inf}, "temperature is inf"),
        (LOGITS, ROWS, {"top_k": 0}, "top_k is 0, but must be a whole number from 1 on"),
        (LOGITS, ROWS, {"top_k": 2.0}, "top_k is 2.0"),
        (LOGITS, ROWS, {"top_p": 0.0}, r"top_p is 0.0, but must be in \(0, 1\]"),
        (LOGITS, ROWS, {"top_p": 1.1}, "top_p is 1.1"),
        (LOGITS, ROWS, {"min_p": -0.1}, r"min_p is -0.1, but must be in \[0, 1\]"),
        (LOGITS, ROWS, {"min_p": math.nan}, "min_p is nan"),
        (LOGITS, ROWS, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0, but must be above 0"),
        (LOGITS, ROWS, {"repetition_penalty": 1.1}, "a repetition_penalty needs seen"),
        (LOGITS, ROWS, {"seen": torch.zeros(2, 4, dtype=torch.bool)}, r"seen must be bool and \(2, 5\)"),
        (LOGITS, ROWS, {"seen": LOGITS}, "not torch.float32"),
    ],
)  # fmt: skip
def test_bad_inputs_are_named(logits, rows, options, says):
    with pytest.raises(UserError, match="sample: .*" + says):
        kernels.sample(logits, *rows, **options)


def test_explain():
    rows = (torch.empty(2, dtype=torch.int64, device="meta"),) * 3

    def found(dtype):
        logits = torch.empty(2, 50257, dtype=dtype, device="meta")
        return kernels.explain("sample", logits, *rows, capability=(9, 0), top_k=50)

    assert all(found(dtype).backend == "cuda" for dtype in DTYPES[:3])
    answer = found(torch.float64)
    assert answer.backend == "reference" and "not compute in float64" in answer.reasons["cuda"]
