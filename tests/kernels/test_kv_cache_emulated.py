"""The cache's kernels in the emulator: ordered, minimal in bytes, no barrier idle."""

from pathlib import Path

import pytest
import torch
from attention_kernels import CARDS
from kv_cache_truth import Case, bits, calls, missing, parts_of
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import KVLayer, emulator
from almostgpt.kernels.kv_layer import MAX_POSITION

pytestmark = pytest.mark.skipif(
    missing(CARDS[0]) is not None, reason=f"no kernels of the cache: {missing(CARDS[0])}"
)

APPEND, DECODE = "append_kernel", "decode_kernel"  # how their names in the statistics begin
# Rows of queries, heads times tokens, that share one reading of a key; by the width of a head.
SHARING = {64: 32, 128: 32, 256: 16}
# Whose synchronising calls are dropped: the files of these kernels alone, as sites() names them.
SOURCES = Path(__file__).parents[2] / "csrc" / "cache"
FILES = tuple(sorted(file.name for file in SOURCES.glob("*.cu*")))
PRIMITIVES = {"cta_sync", "warp_sync", "cp_async_commit", "cp_async_wait", "atomic_add_acq_rel"}


def filled(case: Case, tokens: int) -> tuple[KVLayer, list[torch.Tensor]]:
    """A layer that has had so many tokens, by the reference, and dense q, k and v of 16 more."""
    layer, generator = case.empty(), torch.Generator().manual_seed(case.seed)
    append, _ = calls("reference")
    while tokens:
        T = min(tokens, case.capacity - case.sinks)
        append(*case.draw(T, generator), layer, turns=case.turns())
        layer.lengths.add_(T)
        tokens -= T
    return layer, [x.contiguous() for x in case.draw(16, generator)]


def step(card, case: Case, tokens: int, T: int, new=None) -> dict[str, torch.Tensor]:
    """One append and one decode on a card, after so many tokens: all that they gave and wrote."""
    layer, drawn = filled(case, tokens)
    q, k, v = (x[:, :, :T].contiguous() for x in drawn)
    new = None if new is None else torch.tensor(new, dtype=torch.int32)
    append, decode = calls(card)
    q, q_sink = append(q, k, v, layer, new_lengths=new, turns=case.turns())
    out = decode(q, layer, q_sink=q_sink, new_lengths=new, **case.options())
    return {"q": q, "q_sink": q_sink, "out": out, "tickets": layer.tickets, **parts_of(layer)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(bits(a[name].contiguous()), bits(b[name].contiguous())) for name in a)


# --- schedules -------------------------------------------------------------------------------------

ORDERED = [
    Case(
        B=2, Hkv=1, group=2, D=64, dtype=torch.bfloat16, capacity=400, rotated=64, sink_logits=True
    ),
    Case(
        group=8, D=128, dtype=torch.float16, capacity=330, window=300, sinks=4, rotated=20, int8=True
    ),
    Case(group=4, D=256, dtype=torch.bfloat16, capacity=300, window=280, sinks=20, alibi=True),
]  # fmt: skip
IDS = ["64", "int8 128", "256"]


@pytest.mark.parametrize("case", ORDERED, ids=IDS)
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_the_same_bits_whatever_the_order(card, case):
    """Over schedules of threads and blocks, and of copies; on as many multiprocessors."""
    found = []
    for asynchrony, seed in (("late", 0), ("early", 1), ("random", 2), ("random", 3)):
        with emulator.settings(seed=seed, asynchrony=asynchrony, multiprocessors=4):
            found.append(step(card, case, case.capacity - 16, 3))
    assert all(same(found[0], other) for other in found[1:])
    assert not found[0]["tickets"].any()


@pytest.mark.parametrize("case", ORDERED, ids=IDS)
def test_more_multiprocessors_share_the_keys(case):
    """Then sums come together in another way: as good, if not to the bit."""
    outs, blocks = [], []
    for multiprocessors in (1, 3, 100):
        with emulator.settings(multiprocessors=multiprocessors):
            emulator.reset_statistics()
            outs.append(step(CARDS[0], case, case.capacity - 16, 3))
            blocks.append(kernel_of(emulator.statistics(), DECODE)["blocks"])
    assert blocks[0] < blocks[2]
    close = 4 * torch.finfo(case.dtype).eps
    for other in outs[1:]:
        torch.testing.assert_close(other["out"], outs[0]["out"], atol=close, rtol=close)
        assert same({**other, "out": outs[0]["out"]}, outs[0])


def test_a_row_of_queries_is_the_same_beside_any_others():
    """Not by a bit: neither other tokens of its sequence nor other sequences move it."""
    case = Case(B=2, group=2, D=64, dtype=torch.bfloat16, capacity=120, window=60, sinks=3)
    layer, (q, *_) = filled(case, 100)
    layer.lengths.sub_(8)
    _, decode = calls(CARDS[0])
    with emulator.settings(multiprocessors=1):
        before = decode(q[:, :, :8], layer)
        louder = q[:, :, :8].clone()
        louder[0, :, 3] *= 40
        after = decode(louder, layer)
    others = torch.ones(2, 8, dtype=torch.bool)
    others[0, 3] = False
    assert torch.equal((before == after).all(3).all(1), others)


def test_opcheck():
    ops = torch.ops.almostgpt_emulator
    for case in (
        Case(B=2, group=2, D=32, dtype=torch.bfloat16, window=20, sinks=2, rotated=6, int8=True),
        Case(group=2, D=16, dtype=torch.float16, alibi=True, sink_logits=True),
    ):
        layer, (q, k, v) = case.empty(zeros=True), case.draw(3, torch.Generator())
        parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
        new = torch.full((case.B,), 2, dtype=torch.int32)
        two = layer.reach - 1 if case.sinks else -1
        appended = (q, k, v, *parts, layer.lengths, new, case.turns(), case.sinks, two)
        opcheck(ops.kv_append.default, (*appended, 80))
        ops.kv_append(*appended, 80)
        options = case.options()
        decoded = (
            *(q, -q if case.sinks else None, *parts, layer.lengths, new),
            *(options.get("alibi_slopes"), options.get("sink_logits"), layer.tickets),
            *(layer.reach, case.sinks, 0.3, 2.0),
        )
        opcheck(ops.decode_attention.default, (*decoded, 90))


# --- bytes -----------------------------------------------------------------------------------------


def kernel_of(statistics, kernel: str) -> dict:
    (found,) = (v for name, v in statistics["kernels"].items() if name.startswith(kernel))
    return found


def moved(statistics, kernel: str) -> dict[str, tuple[int, int]]:
    """(bytes read, bytes written) of each buffer that a kernel touched; checks its bank conflicts."""
    found = kernel_of(statistics, kernel)
    assert found["shared_conflicts"] == 0, kernel
    buffers = {name: (b["read"], b["written"]) for name, b in found["buffers"].items()}
    return {name: both for name, both in buffers.items() if any(both)}


def decoded_bytes(card, case: Case, tokens: int, T: int) -> dict[str, tuple[int, int]]:
    emulator.reset_statistics()
    step(card, case, tokens, T)
    return moved(emulator.statistics(), DECODE)


def visible(case: Case, tokens: int, T: int) -> int:
    """Keys that any of T queries after so many tokens sees."""
    W = MAX_POSITION if case.window is None else case.window
    queries = range(tokens, tokens + T)
    seen = {p for t in queries for p in range(t + 1) if p < case.sinks or p > t - (W - case.sinks)}
    return len(seen)


WINDOWS = {
    "none": {"capacity": 240},
    "window": {"capacity": 200, "window": 100},
    "sinks": {"capacity": 130, "window": 90, "sinks": 20},
    "tiny": {"capacity": 20, "window": 5, "sinks": 2},
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_each_visible_key_is_read_once(card, int8, window):
    """For up to 16 rows of queries, with keys split among blocks or not, and nothing else is."""
    for D, group, T in ((64, 4, 4), (128, 8, 1), (256, 4, 3), (80, 1, 16)):
        T = min(T, Case(**window).most_decoded)
        assert group * T <= min(SHARING.values())
        case = Case(
            B=2, Hkv=2, group=group, D=D, dtype=torch.bfloat16, int8=int8, rotated=D, **window
        )
        for tokens in (3, 217):
            found = decoded_bytes(card, case, tokens, T)
            keys = case.B * case.Hkv * visible(case, tokens, T)
            read = keys * D * (1 if int8 else 2)
            assert found["keys"] == found["values"] == (read, 0), (D, tokens)
            if int8:
                assert found["key scales"] == found["value scales"] == (4 * keys, 0)
            assert found["out"] == (0, case.B * case.H * T * D * 2)


@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
@pytest.mark.parametrize("D, rows", SHARING.items())
def test_many_rows_of_queries_read_a_key_in_few_rounds(D, rows, int8):
    case = Case(group=8, D=D, dtype=torch.float16, capacity=116, int8=int8)
    found = decoded_bytes(CARDS[0], case, 100, 16)
    assert found["keys"] == found["values"] == (128 // rows * 116 * D * (1 if int8 else 2), 0)


@pytest.mark.parametrize("int8", [False, True])
def test_a_window_reads_as_much_whatever_the_length(int8):
    case = Case(D=64, dtype=torch.float16, capacity=100, window=64, sinks=4, int8=int8)
    found = [decoded_bytes(CARDS[0], case, tokens, 1) for tokens in (64, 100, 500, 999)]
    assert all(each["keys"] == found[0]["keys"] for each in found)
    assert found[0]["keys"][0] == 64 * 64 * (1 if int8 else 2)


def test_a_sequence_without_new_tokens_reads_nothing():
    case = Case(B=2, D=64, dtype=torch.bfloat16, capacity=100)
    emulator.reset_statistics()
    step(CARDS[0], case, 50, 2, new=[0, 2])
    assert moved(emulator.statistics(), DECODE)["keys"] == (52 * 64 * 2, 0)


@pytest.mark.parametrize("turn", [0, 64, 6], ids=["as they are", "turned", "some turned"])
@pytest.mark.parametrize("int8", [False, True], ids=["16 bits", "int8"])
def test_append_reads_and_writes_each_byte_once(int8, turn):
    for S in (0, 3):
        case = Case(
            B=2, Hkv=2, group=4, D=64, dtype=torch.bfloat16, capacity=40, window=20, sinks=S,
            rotated=turn, int8=int8,
        )  # fmt: skip
        layer, (q, k, v) = filled(case, 33)
        append, _ = calls(CARDS[0])
        emulator.reset_statistics()
        append(q[:, :, :11].contiguous(), k[:, :, :11].contiguous(), v[:, :, :11].contiguous(),
               layer, turns=case.turns())  # fmt: skip
        found = moved(emulator.statistics(), APPEND)
        rows = case.B * case.Hkv * 11
        written = rows * 64 * (1 if int8 else 2)
        assert found["keys"] == found["values"] == (0, written)
        assert found["k"] == found["v"] == (rows * 64 * 2, 0)
        if int8:
            assert found["key scales"] == found["value scales"] == (0, rows * 4)
        queries = case.B * case.H * 11 * 64 * 2
        assert found.get("q", (0, 0)) == ((queries, 0) if turn else (0, 0))
        assert found.get("q_out", (0, 0)) == ((0, queries) if turn else (0, 0))
        assert found.get("q_sink", (0, 0)) == ((0, queries) if turn and S else (0, 0))


# --- every synchronisation -----------------------------------------------------------------------------

# Card, case, tokens before, tokens of the call.
FAULTED = [
    (
        (9, 0),
        Case(group=2, D=64, dtype=torch.bfloat16, capacity=600, rotated=64, sink_logits=True),
        *(560, 2),
    ),
    (
        (8, 0),
        Case(
            D=128, dtype=torch.float16, capacity=330, window=300, sinks=20, rotated=128, int8=True
        ),
        *(400, 1),
    ),
    ((8, 6), Case(D=256, dtype=torch.bfloat16, capacity=280), *(270, 1)),
    ((8, 0), Case(group=8, D=64, dtype=torch.bfloat16, capacity=180), *(150, 16)),
    ((9, 0), Case(D=256, dtype=torch.bfloat16, capacity=280, int8=True, rotated=6), *(270, 1)),
]


def test_every_synchronisation_is_needed():
    """Dropped or weakened, one at a time, each is noticed: by the checker, or by a wrong result."""
    with emulator.settings(multiprocessors=2):
        emulator.reset_statistics()
        truths = [step(*each) for each in FAULTED]
        sites = [site for site in emulator.sites() if site["site"].startswith(FILES)]
        assert {site["site"].split()[1] for site in sites} == PRIMITIVES
        for site in sites:
            for mutation in site["mutations"]:
                assert noticed(site["site"], mutation, truths), (site["site"], mutation)


def noticed(site: str, mutation: str, truths: list[dict[str, torch.Tensor]]) -> bool:
    for each, truth in zip(FAULTED, truths, strict=True):
        try:
            with emulator.fault(site, mutation):
                if not same(step(*each), truth):
                    return True
        except kernels.EmulatorError:
            return True
        except UserError:
            pass  # this case did not reach it
    return False


@pytest.mark.parametrize("length", [-5, 2**30, 2**31 - 4, 2**31 - 1])
def test_lengths_that_nobody_checked_stay_within_the_cache(length):
    """On a GPU looking at them would cost a sync, so the kernels bear any: no result, no other memory."""
    emulator.load()
    ops = torch.ops.almostgpt_emulator
    for window, sinks in ((20, 0), (12, 3)):
        layer = kernels.KVLayer.empty(1, 1, 20, 16, dtype=torch.bfloat16)
        layer.lengths.fill_(length)
        q = torch.randn(1, 2, 4, 16).bfloat16()
        turns = torch.full((8,), 2**61)
        slots = (layer.keys, layer.values, None, None)
        ops.kv_append(
            q, q[:, :1], q[:, :1], *slots, layer.lengths, None, turns, sinks, window - 1, 90
        )
        ops.decode_attention(
            q,
            q,
            *slots,
            layer.lengths,
            None,
            None,
            None,
            layer.tickets,
            window,
            sinks,
            0.25,
            0.0,
            90,
        )
