"""The CUDA kernel of ``sample`` in the emulator: right, ordered, minimal in bytes, no barrier idle."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sample_truth import ODD, WAYS, check_rows, sampler, streams
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.kernels import emulator

pytestmark = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOURCES = Path(__file__).parents[2] / "csrc" / "sampling"
FILES = tuple(sorted(file.name for file in SOURCES.glob("*.cu*")))
# More float32 than the 99 KiB of shared memory of an RTX 30.
SMALL_CARD, BEYOND = (8, 6), 26_001


def rows_at(offset: int, B: int, V: int, dtype, seed: int = 0, apart: int = 13) -> torch.Tensor:
    """(B, V) logits whose rows lie so many elements apart beyond V, and begin at an offset."""
    generator = torch.Generator().manual_seed(seed)
    wide = (3 * torch.randn(B, V + apart, generator=generator)).to(dtype)
    return wide[:, offset : offset + V]


def seen_like(logits: torch.Tensor) -> torch.Tensor:
    return torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < 0.3


@settings(deadline=None, max_examples=80)
@given(
    V=st.one_of(st.sampled_from([1, 2, 3, 31, 33, 257, 1000]), st.integers(1, 80)),
    dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 9),
    apart=st.sampled_from([9, 13, 16]),
    temperature=st.sampled_from([0, 1e-3, 0.4, 1.0, 3.0, 1e39]),
    top_k=st.sampled_from([None, 1, 2, 30, 400]),
    top_p=st.sampled_from([None, 1e-6, 0.4, 0.95, 1.0]),
    min_p=st.sampled_from([None, 0.03, 1.0]),
    penalty=st.sampled_from([None, 0.7, 1.4]),
    card=st.sampled_from([(8, 0), (8, 6), (9, 0), (12, 0)]),
    seed=st.integers(0, 2**31),
)
def test_what_is_drawn_is_what_may_be(
    V, dtype, offset, apart, temperature, top_k, top_p, min_p, penalty, card, seed
):
    assume(
        temperature < 1e30 or min_p != 1.0
    )  # float32 does not tell the largest from others there
    logits = rows_at(offset, 3, V, dtype, seed, apart)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    seen = None
    if penalty is not None:
        options["repetition_penalty"], seen = penalty, seen_like(logits)
    with emulator.settings(seed=seed % 3):
        check_rows(sampler(card), logits, streams(3, seed), seen, **options)


FILTERS = {
    "plain": {"temperature": 0.8},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9, "temperature": 1.5},
    "all": {"top_k": 300, "top_p": 0.8, "min_p": 0.001, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("V, dtype", [(5003, torch.bfloat16), (BEYOND, torch.float16)], ids=str)
def test_long_rows_in_shared_memory_and_beyond(V, dtype, options):
    logits = rows_at(5, 1, V, dtype)
    seen = seen_like(logits) if "repetition_penalty" in options else None
    check_rows(sampler(SMALL_CARD), logits, streams(1), seen, **options)


@pytest.mark.parametrize("values", [1, 2, 5])
def test_rows_of_few_values(values):
    """Equal logits by the hundred: the search must end, and keep all of the last or none."""
    generator = torch.Generator().manual_seed(values)
    logits = torch.randint(values, (4, 301), generator=generator).to(torch.bfloat16) - 2
    for options in ({"top_k": 40}, {"top_p": 0.5}, {"top_k": 200, "top_p": 0.7}):
        check_rows(sampler((8, 0)), logits, streams(4), **options)


@pytest.mark.parametrize("temperature", [1e-4, 1e-7, 1e-30])
def test_noise_decides_among_equal_logits_however_low_the_temperature(temperature):
    """There it is far below the last bit of the sums, and what they lost to rounding decides."""
    logits = torch.tensor([11.0, 12.0, 12.0, 12.0, -3.0]).expand(60, 5)
    for options in ({}, {"top_k": 4}):
        ids = check_rows(sampler((8, 0)), logits, streams(60), temperature=temperature, **options)
        assert set(ids.tolist()) == {1, 2, 3}


def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([0.0, -0.0, -1.0, -0.0, 0.0]).expand(400, 5)
    for options in ({"top_k": 1}, {"top_p": 0.01}, {"top_k": 3, "top_p": 0.3}):
        ids, _ = sampler((8, 0))(logits, *streams(400), **options)
        assert set(ids.tolist()) == {0, 1, 3, 4}, options


@pytest.mark.parametrize("row, wanted", ODD, ids=str)
def test_of_odd_rows_something_sensible_is_drawn(row, wanted):
    logits = torch.tensor(row).expand(40, len(row))
    for options in WAYS:
        ids, logprobs = sampler((8, 0))(logits, *streams(40), logprobs=True, **options)
        expected = {min(wanted)} if options.get("temperature") == 0 else wanted
        assert set(ids.tolist()) == expected, options
        own = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, own, equal_nan=True)


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_a_draw_is_moved_by_its_own_row_alone(options):
    """Neither by other rows, nor by padding, nor by where the row lies, nor by the number of threads."""
    run, (B, V) = sampler((8, 0)), (4, 301)
    logits, rows = rows_at(3, B, V, torch.bfloat16), streams(B)
    seen = seen_like(logits) if "repetition_penalty" in options else None

    def drawn(logits, pick=slice(None), pad=0):
        marks = None if seen is None else torch.nn.functional.pad(seen[pick], (0, pad))
        return run(logits, *(r[pick] for r in rows), seen=marks, **options)[0]

    ids = drawn(logits)
    for pick in (torch.tensor([2, 0, 3, 1]), slice(1, 2)):
        assert torch.equal(drawn(logits[pick], pick), ids[pick])
    padded = torch.nn.functional.pad(logits, (0, 9000), value=-torch.inf)
    assert torch.equal(drawn(padded, pad=9000), ids)
    assert torch.equal(drawn(torch.nn.functional.pad(logits, (5, 3))[:, 5 : 5 + V]), ids)


@pytest.mark.parametrize("card", [(8, 0), SMALL_CARD], ids=["shared memory", "beyond"])
def test_the_border_of_a_nucleus_does_not_depend_on_the_launch(card):
    """Masses are whole numbers: of rows that lie anywhere the same tokens are kept, to the last."""
    V, share = 30_001, 0.5
    row = torch.randn(V, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = set()
    for offset, pad in ((0, 0), (1, 0), (6, 3)):
        wide = torch.full((1, offset + V + pad), -torch.inf, dtype=torch.bfloat16)
        logits = wide[:, offset:]
        logits[0, :V] = row
        ids = [sampler(card)(logits, *streams(1, seed), top_p=share)[0] for seed in range(3)]
        found.add(tuple(int(i) for i in ids))
    assert len(found) == 1


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_the_same_bits_whatever_the_order(options):
    logits = rows_at(1, 3, 1203, torch.bfloat16)
    seen = seen_like(logits)
    found = set()
    for asynchrony, seed in (("late", 0), ("early", 1), ("random", 2), ("random", 3)):
        with emulator.settings(seed=seed, asynchrony=asynchrony, multiprocessors=2):
            marks = seen.clone()
            outputs = sampler((8, 0))(logits, *streams(3), seen=marks, logprobs=True, **options)
        found.add(tuple(t.numpy().tobytes() for t in (*outputs, marks)))
    assert len(found) == 1


def test_opcheck():
    emulator.load()
    logits = rows_at(0, 2, 40, torch.float32)
    for seen, rest in (
        (seen_like(logits), (5, 0.9, 0.01, 1.3, True)),
        (None, (0, 1.0, 0.0, 1.0, False)),
    ):
        arguments = (logits, *streams(2), seen, 0.7, *rest, 80)
        opcheck(torch.ops.almostgpt_emulator.sample.default, arguments)


# --- bytes -----------------------------------------------------------------------------------------------


def moved(card, logits, **options) -> dict[str, tuple[int, int]]:
    """(bytes read, bytes written) of each buffer; checks that no banks conflict."""
    emulator.reset_statistics()
    sampler(card)(logits, *streams(len(logits)), **options)
    (kernel,) = emulator.statistics()["kernels"].values()
    assert kernel["shared_conflicts"] == 0 and kernel["launches"] == 1
    return {name: (b["read"], b["written"]) for name, b in kernel["buffers"].items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 9}, {"top_p": 0.9}], ids=str)
def test_a_row_is_read_once(options, dtype):
    for B, V, offset in ((3, 257, 3), (2, 2048, 0), (1, 5003, 1)):
        logits, row = rows_at(offset, B, V, dtype), V * dtype.itemsize
        found = moved((9, 0), logits, **options)
        assert found["logits"] == (B * row, 0)
        assert found["ids"] == (0, 8 * B)
        found = moved((9, 0), logits, logprobs=True, seen=seen_like(logits), **options)
        assert found["logits"] == (B * (row + dtype.itemsize), 0)  # and once more the drawn one's
        assert found["logprobs"] == (0, 4 * B)
        assert found["seen"] == (0, B)  # nobody reads it without a penalty


def test_a_penalty_reads_what_was_seen_once():
    logits = rows_at(3, 2, 1000, torch.bfloat16)
    for options in ({"temperature": 0}, {}, {"top_k": 7}):
        found = moved((8, 0), logits, seen=seen_like(logits), repetition_penalty=2.0, **options)
        assert found["seen"] == (2 * 1000, 2) and found["logits"] == (2 * 2000, 0)


def test_few_passes_find_a_threshold():
    """Beyond shared memory every pass reads the row again, so they can be counted."""
    logits = rows_at(0, 1, BEYOND, torch.float32)
    for options in ({"top_k": 50}, {"top_p": 0.9}, {"top_k": 1000, "top_p": 0.7}):
        passes = moved(SMALL_CARD, logits, **options)["logits"][0] / (4 * BEYOND)
        assert passes == int(passes) and passes <= 2 + 8 * len(options), (options, passes)


# --- every synchronisation -------------------------------------------------------------------------------


def test_every_synchronisation_is_needed():
    logits, rows = rows_at(1, 1, 700, torch.bfloat16), streams(1)
    cases = [{"logprobs": True}, {"top_k": 40, "top_p": 0.8, "logprobs": True}]
    emulator.reset_statistics()
    truths = [sampler((8, 0))(logits, *rows, **case) for case in cases]
    sites = [site for site in emulator.sites() if site["site"].startswith(FILES)]
    assert {site["site"].split()[1] for site in sites} == {"cta_sync"}
    for site in sites:
        for mutation in site["mutations"]:
            assert noticed(site["site"], mutation, logits, rows, cases, truths), site


def noticed(site, mutation, logits, rows, cases, truths) -> bool:
    with emulator.fault(site, mutation):
        for case, truth in zip(cases, truths, strict=True):
            try:
                got = sampler((8, 0))(logits, *rows, **case)
            except kernels.EmulatorError:
                return True
            if not all(map(torch.equal, got, truth)):
                return True
    return False
