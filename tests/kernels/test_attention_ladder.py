"""The ladder of attention kernels, run by the emulator: right, and moving the bytes that each step says."""

import pytest
import torch
from attention_truth import plain
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import emulator
from almostgpt.kernels.attention_ladder import ATTENTION_LADDER, STEPS, attention_ladder

DTYPES = [torch.bfloat16, torch.float16]
ASYNCHRONIES = ["late", "early", "random"]
# (B, H, T, D). One position; less than a tile; a tile; one more than two; widths of 8 and up to 128,
# among them those that fill no thread's share.
SHAPES = [
    (2, 1, 1, 8),
    (1, 2, 37, 24),
    (1, 3, 64, 32),
    (1, 1, 129, 64),
    (2, 2, 70, 104),
    (1, 1, 203, 128),
]

needs_emulator = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)


def emulated(step, q, k, v, **options):
    with kernels.use_backend("emulator"):
        return attention_ladder(step, q, k, v, **options)


def make(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))


def assert_close_to_float64(step, q, k, v, **options):
    """At most twice the error of plain maths in q's own dtype, plus four ulps of the largest p |v|."""
    exact, size = (
        plain(q.double(), k.double(), u, **options)[0] for u in (v.double(), v.double().abs())
    )
    peer, _ = plain(q, k, v, **options)
    got = emulated(step, q, k, v, **options)
    assert got.dtype == q.dtype and got.shape == q.shape and got.is_contiguous()
    bound = 2 * (peer - exact).abs().max() + 4 * torch.finfo(q.dtype).eps * size.max()
    assert (got - exact).abs().max() <= bound


@needs_emulator
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_against_float64(shape, dtype, causal, step):
    assert_close_to_float64(step, *make(shape, dtype), causal=causal)


@needs_emulator
@pytest.mark.parametrize("step", STEPS)
def test_scores_of_any_size(step):
    """Growing along the keys, so that each tile has a larger score; and far beyond what exp can take."""
    q, k, v = make((1, 1, 150, 16), torch.bfloat16)
    k = k * torch.linspace(0.1, 30, 150)[:, None].bfloat16()
    assert_close_to_float64(step, q, k, v, causal=True)
    assert_close_to_float64(step, q, k.flip(2), v, scale=-1.5)
    assert_close_to_float64(step, q, k, v, scale=0.0)  # the mean of v


@needs_emulator
@pytest.mark.parametrize("step", STEPS)
def test_strides_and_empty_tensors(step):
    q, k, v = make((2, 19, 3, 40), torch.bfloat16)  # (B, T, H, D)
    assert_close_to_float64(step, *(tensor.transpose(1, 2) for tensor in (q, k, v)), causal=True)
    assert emulated(step, q[:0], k[:0], v[:0]).shape == (0, 19, 3, 40)
    assert emulated(step, q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 19, 0, 40)


@needs_emulator
@pytest.mark.parametrize("step", STEPS)
def test_the_same_bits_whatever_the_order(step):
    q, k, v = make((1, 2, 131, 40), torch.bfloat16)
    runs = set()
    for asynchrony in ASYNCHRONIES:
        for seed in range(4):
            with emulator.settings(seed=seed, asynchrony=asynchrony):
                out = emulated(step, q, k, v, causal=True)
            runs.add(out.view(torch.int16).numpy().tobytes())
    assert len(runs) == 1


# --- what each step costs, as its file says -------------------------------------------------------------


def moved(step, shape, causal) -> dict[str, tuple[int, int]]:
    """(bytes read, bytes written) of each buffer; checks that no kernel had a bank conflict."""
    emulator.reset_statistics()
    emulated(step, *make(shape, torch.bfloat16), causal=causal)
    totals: dict[str, tuple[int, int]] = {}
    for kernel in emulator.statistics()["kernels"].values():
        assert kernel["shared_conflicts"] == 0
        for name, buffer in kernel["buffers"].items():
            read, written = totals.get(name, (0, 0))
            totals[name] = (read + buffer["read"], written + buffer["written"])
    return totals


COUNTED = [(2, 3, 50, 24), (1, 1, 128, 64), (1, 2, 193, 16)]


@needs_emulator
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", COUNTED, ids=lambda shape: "x".join(map(str, shape)))
def test_naive_reads_two_rows_for_each_score(shape, causal):
    B, H, T, D = shape
    scores = B * H * (T * (T + 1) // 2 if causal else T * T)
    assert moved("naive", shape, causal) == {
        "q": (scores * 2 * D, 0),
        "k": (scores * 2 * D, 0),
        "v": (scores * 2 * D, 0),
        # S written; read three times and P written; P read for each element of out.
        "scores": (scores * (3 * 4 + 4 * D), scores * 2 * 4),
        "out": (0, B * H * T * 2 * D),
    }


@needs_emulator
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", COUNTED, ids=lambda shape: "x".join(map(str, shape)))
def test_tiled_reads_keys_once_for_64_queries_and_keeps_no_scores(shape, causal):
    B, H, T, D = shape
    tile = 64
    # Tiles are read whole, up to the end: with causal those up to a block's own, which ends where it does.
    rows = sum(min(T, first + tile) if causal else T for first in range(0, T, tile))
    once = B * H * T * 2 * D
    assert moved("tiled", shape, causal) == {
        "q": (once, 0),
        "k": (B * H * rows * 2 * D, 0),
        "v": (B * H * rows * 2 * D, 0),
        "out": (0, once),
    }


@needs_emulator
def test_every_synchronisation_is_needed():
    q, k, v = make((1, 1, 70, 8), torch.bfloat16)
    emulator.reset_statistics()
    # The third step's are those of test_flash_attention_emulated.py.
    truths = {step: emulated(step, q, k, v) for step in ("naive", "tiled")}
    sites = emulator.sites()
    # A row of the naive kernels is one warp's or one thread's; between kernels the stream has order.
    assert [site["site"].split()[1] for site in sites] == ["cta_sync", "cta_sync"]
    assert all(site["site"].startswith("tiled.cu") for site in sites)
    for site in sites:
        for mutation in site["mutations"]:
            with emulator.fault(site["site"], mutation):
                try:
                    noticed = not torch.equal(emulated("tiled", q, k, v), truths["tiled"])
                except kernels.EmulatorError as error:
                    noticed = error.kind == "race"
            assert noticed, (site["site"], mutation)


# --- the function and the ops -------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_on_a_cpu_plain_maths_runs_and_no_gradient(step):
    q, k, v = (tensor.requires_grad_() for tensor in make((2, 2, 9, 5), torch.float64))
    out = attention_ladder(step, q, k, v, causal=True, scale=0.3)
    torch.testing.assert_close(out, plain(q, k, v, causal=True, scale=0.3)[0].detach())
    assert not out.requires_grad
    assert ATTENTION_LADDER.explain(q, k, v, step=step).backend == "reference"


def test_the_kernels_say_what_they_do_not_take():
    q = torch.zeros(1, 1, 4, 12)
    answer = ATTENTION_LADDER.explain(q, q, q, step="naive", capability=(9, 0))
    assert "not torch.float32" in answer.reasons["cuda"]
    answer = ATTENTION_LADDER.explain(*[q.bfloat16()] * 3, step="tiled", capability=(9, 0))
    assert "multiples of 8 up to 128, not 12" in answer.reasons["cuda"]
    half = torch.zeros(1, 1, 4, 16, dtype=torch.float16, device="meta")
    assert (
        ATTENTION_LADDER.explain(half, half, half, step="tiled", capability=(8, 0)).backend
        == "cuda"
    )


def test_what_does_not_fit_is_refused():
    q, k, v = make((1, 2, 4, 8))
    with pytest.raises(UserError, match="the steps are naive, tiled, mma, not 'fast'"):
        attention_ladder("fast", q, k, v)
    with pytest.raises(UserError, match="all alike"):
        attention_ladder("naive", q, k[:, :1], v)
    with pytest.raises(UserError, match="one dtype and device"):
        attention_ladder("naive", q, k, v.half())
    with kernels.use_backend("cuda"), pytest.raises(UserError, match="cannot run attention_ladder"):
        attention_ladder("naive", q, k, v)


@pytest.mark.parametrize("step", STEPS)
def test_opcheck(step):
    q, k, v = make((1, 2, 5, 8), torch.float16)
    name = f"attention_ladder_{step}"
    opcheck(getattr(torch.ops.almostgpt, name).default, (q, k, v, 0.5, True))
    if emulator.refuse() is None:
        emulator.load()
        opcheck(getattr(torch.ops.almostgpt_emulator, name).default, (q, k, v, 0.5, True, 80))
