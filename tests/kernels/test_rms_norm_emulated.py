"""The CUDA kernels of RMSNorm, run by the emulator: right, ordered, minimal in bytes, no barrier idle."""

import functools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rms_norm_truth import assert_close_to_float64, make, with_gradients
from torch.library import opcheck

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.errors import UserError
from almostgpt.kernels import emulator

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ASYNCHRONIES = ["late", "early", "random"]

pytestmark = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)


def emulated(x, weight, residual=None, capability=(8, 0)):
    with kernels.use_backend("emulator", capability=capability):
        return kernels.rms_norm(x, weight, residual=residual)


def on_card(*capability):
    return functools.partial(emulated, capability=capability)


def strided(tensor, how):
    """The same values with other strides: rows apart, rows apart and unaligned, columns apart."""
    if how == "dense" or tensor.dim() == 0:
        return tensor
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    left, right = (8, 8) if how == "aligned rows" else (1, 2)
    wide = torch.nn.functional.pad(tensor, (left, right), value=float("nan"))
    return wide[..., left : left + tensor.shape[-1]]


# One after the other the plans of threads and vectors, and what fits none of them.
WIDTHS = st.one_of(
    st.integers(1, 200), st.integers(1, 64).map(lambda k: 8 * k), st.sampled_from([768, 1600, 2056])
)


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 9), max_size=2),
    n=WIDTHS,
    dtype=st.sampled_from(DTYPES),
    wide_weight=st.booleans(),
    with_residual=st.booleans(),
    how=st.sampled_from(["dense", "aligned rows", "unaligned rows", "transposed"]),
    capability=st.sampled_from([(8, 0), (8, 9), (9, 0), (12, 0)]),
    multiprocessors=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 2**31),
)
def test_against_float64(
    leading, n, dtype, wide_weight, with_residual, how, capability, multiprocessors, seed
):
    x, weight, residual, dy, dsum = make(leading, n, dtype, wide_weight, seed)
    x, dsum = strided(x, how), strided(dsum, how)
    inputs, upstream = (
        ((x, weight, residual), (dy, dsum)) if with_residual else ((x, weight), (dy,))
    )
    # Few multiprocessors: each block goes through many rows.
    with emulator.settings(multiprocessors=multiprocessors, seed=seed % 3, asynchrony="late"):
        assert_close_to_float64(on_card(*capability), inputs, upstream)


@pytest.mark.parametrize(
    "n, dtype",
    [
        (4096, torch.bfloat16),
        (8192, torch.float16),
        (16384, torch.bfloat16),
        (32768, torch.bfloat16),
        (65536, torch.bfloat16),
        (65535, torch.float16),
        (16384, torch.float32),
        (65536, torch.float32),
    ],
)
def test_long_rows(n, dtype):
    x, weight, residual, dy, dsum = make((3,), n, dtype)
    for capability in ((8, 0), (8, 6), (9, 0)):
        assert_close_to_float64(on_card(*capability), (x, weight, residual), (dy, dsum))
    assert_close_to_float64(emulated, (x, weight), (dy,))


def test_expanded_gradients_and_empty_inputs():
    x, weight, *_ = make((5,), 24, torch.float32)
    assert_close_to_float64(emulated, (x, weight), (torch.ones(()).expand(5, 24),))
    assert_close_to_float64(emulated, (x[:0], weight), (x[:0],))


# --- what the emulator is for ----------------------------------------------------------------------

# Rows side by side in a block, in one warp and in several; a ring of one stage; elements one by one.
PLANS = [(19, 64), (7, 768), (5, 2056), (3, 4096), (2, 32768), (5, 77)]


@pytest.mark.parametrize("rows, n", PLANS)
def test_the_same_bits_whatever_the_order(rows, n):
    x, weight, residual, dy, dsum = make((rows,), n, torch.bfloat16)
    runs = set()
    for asynchrony in ASYNCHRONIES:
        for seed in range(10):
            with emulator.settings(seed=seed, asynchrony=asynchrony, multiprocessors=2):
                outputs = with_gradients(emulated, (x, weight, residual), (dy, dsum))
            runs.add(
                tuple(t.view(torch.int16).numpy().tobytes() for t in map(torch.detach, outputs))
            )
    assert len(runs) == 1


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, residual, dy, dsum = (
            t.requires_grad_() for t in make((3, 5), 16, dtype, wide_weight=True)
        )
        ops = torch.ops.almostgpt_emulator
        emulator.load()
        opcheck(ops.rms_norm_forward.default, (x, weight, 1e-5, 80))
        opcheck(ops.add_rms_norm_forward.default, (x, residual, weight, 1e-5, 80))
        rstd = ops.rms_norm_forward(x, weight, 1e-5, 80)[1].detach()
        opcheck(ops.rms_norm_backward.default, (dy, dsum, x, weight, rstd, 90))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "rows, n, dtype",
    [
        (40, 64, torch.bfloat16),
        (13, 768, torch.bfloat16),
        (6, 4096, torch.bfloat16),
        (4, 16384, torch.float32),
        (3, 32768, torch.bfloat16),
    ],
)
def test_each_byte_moves_once_and_no_banks_conflict(rows, n, dtype, with_residual):
    x, weight, residual, dy, dsum = make((rows,), n, dtype)
    inputs, upstream = (
        ((x, weight, residual), (dy, dsum)) if with_residual else ((x, weight), (dy,))
    )
    with emulator.settings(multiprocessors=2):
        emulator.reset_statistics()
        outputs = emulated(*(t.requires_grad_() for t in inputs), capability=(9, 0))
        forward = moved(emulator.statistics())
        emulator.reset_statistics()
        torch.autograd.grad(outputs, inputs, upstream)
        backward = moved(emulator.statistics())
    size = x.numel() * x.element_size()
    expected = {"x": (size, 0), "y": (0, size), "rstd": (0, 4 * rows)}
    if with_residual:
        expected |= {"residual": (size, 0), "sum": (0, size)}
    weight_bytes = rows * n * weight.element_size()  # once a row at most, mostly from the caches
    assert forward.pop("weight")[0] <= weight_bytes
    assert forward == expected
    expected = {"dy": (size, 0), "x": (size, 0), "dx": (0, size)}
    if with_residual:
        expected |= {"dsum": (size, 0)}
    assert backward.pop("weight")[0] <= 2 * weight_bytes
    assert backward.pop("dweight") == (0, n * weight.element_size())
    # Every partial sum is written once and read once.
    read, written = backward.pop("partial")
    assert read == written and written % (4 * n) == 0 and written <= 4 * n * min(rows, 32)
    assert backward.pop("rstd")[0] >= 4 * rows  # a few words, by every thread of a row
    assert backward == expected


def moved(statistics) -> dict[str, tuple[int, int]]:
    """(bytes read, bytes written) of each buffer; checks that no kernel had a bank conflict."""
    totals: dict[str, tuple[int, int]] = {}
    for kernel in statistics["kernels"].values():
        assert kernel["shared_conflicts"] == 0
        for name, buffer in kernel["buffers"].items():
            read, written = totals.get(name, (0, 0))
            totals[name] = (read + buffer["read"], written + buffer["written"])
    return totals


def test_every_synchronisation_is_needed():
    """Dropped or weakened, one at a time, each is noticed: by the checker, or by a wrong result."""
    cases = []
    for rows, n in ((19, 64), (7, 768), (5, 2056), (3, 4096), (5, 77), (3, 16384)):
        x, weight, residual, dy, dsum = make((rows,), n, torch.float32)
        cases.append(((x, weight, residual), (dy, dsum)))
    with emulator.settings(multiprocessors=1):
        emulator.reset_statistics()
        truths = [with_gradients(emulated, *case) for case in cases]
        sites = [
            site
            for site in emulator.sites()
            if site["site"].startswith(("rms_norm", "collectives"))
        ]
        assert {site["site"].split()[1] for site in sites} == {
            "cta_sync", "cp_async_commit", "cp_async_wait",
        }  # fmt: skip
        for site in sites:
            for mutation in site["mutations"]:
                assert noticed(site["site"], mutation, cases, truths), (site["site"], mutation)


def noticed(site, mutation, cases, truths) -> bool:
    with emulator.fault(site, mutation):
        for case, truth in zip(cases, truths, strict=True):
            try:
                got = with_gradients(emulated, *case)
            except kernels.EmulatorError:
                return True
            if not all(map(torch.equal, got, truth)):
                return True
    return False


def test_a_missing_barrier_names_both_lines():
    x, weight, *_ = make((3,), 4096, torch.bfloat16)
    emulator.reset_statistics()
    emulated(x, weight)
    (site,) = [site["site"] for site in emulator.sites() if site["site"].endswith("cta_sync")]
    with emulator.fault(site, "drop"), pytest.raises(kernels.EmulatorError) as error:
        emulated(x, weight)
    assert error.value.kind == "race"
    file = site.split(":")[0]
    lines = {line for line in str(error.value).replace(",", " ").split() if line.startswith(file)}
    assert len(lines) >= 2, str(error.value)
    assert torch.isfinite(emulated(x, weight)).all()  # the process goes on


def test_the_example_of_the_docs_says_what_they_show():
    page = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text()
    code = re.search(r"```python\n(import torch\n.*?emulator\.fault\(.*?)```", page, re.S)[1]
    shown = re.search(r"```\n\S*EmulatorError: (race.*?)```", page, re.S)[1]
    with pytest.raises(kernels.EmulatorError) as error:
        exec(code, {})
    assert str(error.value) == shown.strip()


def test_a_fault_at_a_call_that_never_runs_is_an_error():
    x, weight, *_ = make((3,), 4096, torch.bfloat16)
    with pytest.raises(UserError, match="ran; the nearest that did is 'rms_norm.cuh:"):
        with emulator.fault("rms_norm.cuh:1 cta_sync", "drop"):
            emulated(x, weight)
    with pytest.raises(UserError, match="one fault at a time"):
        with emulator.fault("a:1 cta_sync", "drop"), emulator.fault("b:1 cta_sync", "drop"):
            pass
    with pytest.raises(UserError, match="name a site"):
        with emulator.fault("", "drop"):
            pass


def test_under_torch_func_only_the_reference_runs():
    x, weight, *_ = make((4, 3), 16, torch.float32)
    with pytest.raises(UserError, match="torch.func"):
        torch.func.vmap(lambda row: emulated(row, weight))(x)
    by_vmap = torch.func.vmap(lambda row: kernels.rms_norm(row, weight))(x)
    torch.testing.assert_close(by_vmap, kernels.rms_norm(x, weight))


# --- in a model --------------------------------------------------------------------------------------


def test_twenty_training_steps_agree_with_the_reference():
    def losses(backend) -> list[float]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(20):
            start = torch.randint(64, (4, 1), generator=generator)
            ids = (start + 3 * torch.arange(17)) % 64  # to be learned
            with kernels.use_backend(backend, ops=["rms_norm"]):
                loss = model(ids[:, :-1], ids[:, 1:])[1]
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    emulator.reset_statistics()
    ours, reference = losses("emulator"), losses("reference")
    launches = {
        name: kernel["launches"] for name, kernel in emulator.statistics()["kernels"].items()
    }
    assert sum(launches.values()) == 20 * 5 * 3, launches  # 5 norms, forward, backward and the sum
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) <= 0.02
    assert ours[-1] < ours[0] - 0.5
