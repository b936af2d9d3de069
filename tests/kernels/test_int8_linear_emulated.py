"""The CUDA kernel of int8_linear, run by the emulator: right, ordered, minimal in bytes, no barrier idle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_linear_truth import Inputs, assert_close_to_float64, assert_rounded_once, make
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import emulator

DTYPES = [torch.bfloat16, torch.float16]
CARDS = [(8, 0), (8, 9), (9, 0), (12, 0)]
SOURCE = "int8_linear.cu"

pytestmark = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)


def emulated(x, weight, scales, bias=None, capability=(8, 0)):
    with kernels.use_backend("emulator", capability=capability):
        return kernels.int8_linear(x, weight, scales, bias)


def statistics() -> dict:
    """Of the one kernel that ran, and its name as ``"name"``."""
    ((name, found),) = emulator.statistics()["kernels"].items()
    return found | {"name": name}


def right(inputs: Inputs, capability=(8, 0)) -> str:
    """Asserts that it is, and says which kernel ran."""
    emulator.reset_statistics()
    got = emulated(*inputs, capability=capability)
    assert_close_to_float64(lambda *_: got, inputs)
    assert_rounded_once(got, inputs)
    return statistics()["name"]


# --- right -----------------------------------------------------------------------------------------

WIDTHS = [16, 32, 48, 64, 80, 768, 1600, 3072]  # K, of whole steps and of parts
HEIGHTS = [1, 3, 16, 17, 768, 1013]  # N, of whole blocks and of parts
ROWS = [1, 2, 3, 7, 8, 9, 16]


def test_every_shape_by_every_kernel():
    """On few multiprocessors and on many, which chooses the block; rows, bias and card in turns."""
    ran = set()
    shapes = itertools.product(WIDTHS, HEIGHTS, (1, 4, 132), DTYPES)
    for i, (K, N, multiprocessors, dtype) in enumerate(shapes):
        rows, card = ROWS[i % len(ROWS)], CARDS[i // 2 % len(CARDS)]
        bias = (None, dtype, torch.float32)[i // 5 % 3]
        with emulator.settings(multiprocessors=multiprocessors):
            ran.add(right(make((rows,), K, N, dtype, bias, seed=i), card))
    assert len(ran) == 12, (
        ran
    )  # bf16 and fp16; 8, 16 and 32 rows of the weight; up to 8 and 16 of x


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 4), max_size=2),
    sixteenths=st.integers(1, 30),
    N=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, *DTYPES, torch.float32, torch.float64]),
    how=st.sampled_from(["dense", "rows apart", "unaligned", "transposed"]),
    multiprocessors=st.sampled_from([0, 1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_against_float64(leading, sixteenths, N, dtype, bias, how, multiprocessors, seed):
    inputs = make(tuple(leading), 16 * sixteenths, N, dtype, bias, seed)
    inputs = inputs._replace(x=strided(inputs.x, how))
    with emulator.settings(multiprocessors=multiprocessors, seed=seed % 3):
        assert_close_to_float64(emulated, inputs)


def strided(x, how):
    """The same values with other strides; beside them NaN, which nobody may read."""
    if how == "dense" or x.dim() == 1:
        return x
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    left, right = (8, 8) if how == "rows apart" else (1, 2)
    wide = torch.nn.functional.pad(x, (left, right), value=float("nan"))
    return wide[..., left : left + x.shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_times_one_is_that_code(dtype):
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(16, 16)
    y = emulated(torch.eye(16, dtype=dtype), codes, torch.ones(16))
    assert torch.equal(y.t(), codes.to(dtype))


def test_each_column_meets_its_own():
    """A single 1 among zeros finds the column of the weight, wherever it is."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (5, 208), generator=generator, dtype=torch.int8)
    for start in range(0, 208, 16):
        x = torch.zeros(16, 208, dtype=torch.bfloat16)
        x[:, start : start + 16] = torch.eye(16)
        assert torch.equal(emulated(x, codes, torch.ones(5)).t(), codes[:, start : start + 16])


def test_a_row_of_x_is_the_same_beside_any_others():
    """Not by a bit, nor where the others are not numbers."""
    inputs = make((16,), 1600, 50, torch.float16)
    before = emulated(*inputs)
    x = inputs.x.clone()
    x[::2] = torch.nan
    after = emulated(x, *inputs[1:])
    assert torch.equal(after[1::2], before[1::2]) and after[::2].isnan().all()


def test_sums_are_float32():
    """780,000 before the scale, which float16 cannot hold; and ones that it would drop beside 2048."""
    x, codes = torch.ones(1, 6160, dtype=torch.float16), torch.ones(2, 6160, dtype=torch.int8)
    codes[0, :768], x[0, :768] = 127, 8
    y = emulated(x, codes, torch.tensor([1e-3, 1.0]))
    expected = torch.tensor([[(768 * 8 * 127 + 5392) * 1e-3, 768 * 8 + 5392]])
    torch.testing.assert_close(y.float(), expected, rtol=2**-11, atol=0)


def test_a_weight_that_begins_anywhere_and_empty_inputs():
    inputs = make((3,), 32, 9, torch.bfloat16, torch.float32)
    buffer = torch.empty(9 * 32 + 16, dtype=torch.int8)
    start = (1 - buffer.data_ptr()) % 16
    weight = buffer[start : start + 9 * 32].view(9, 32).copy_(inputs.weight)
    assert weight.data_ptr() % 16 == 1
    assert torch.equal(emulated(inputs.x, weight, *inputs[2:]), emulated(*inputs))
    for leading, N in (((0,), 9), ((2, 0), 9), ((3,), 0)):
        assert emulated(*make(leading, 32, N, torch.bfloat16)).shape == (*leading, N)
    assert emulated(*make((), 32, 9, torch.bfloat16)).shape == (9,)


def test_the_vocabulary_of_gpt2():
    right(make((3,), 768, 50257, torch.bfloat16), (9, 0))


# --- what the emulator is for ------------------------------------------------------------------------

# rows, K, N: with the multiprocessors below all three heights of blocks, for few and for many rows of x;
# a warp alone, warps of one round and of several, and a last one with less to do.
CASES = [(1, 16, 33), (3, 1600, 20), (8, 3072, 24), (9, 784, 50), (16, 1600, 40), (2, 5120, 70)]
IDS = ["x".join(map(str, case)) for case in CASES]


def case_of(rows, K, N, dtype=torch.bfloat16) -> Inputs:
    return make((rows,), K, N, dtype, torch.float32)


@pytest.mark.parametrize("rows, K, N", CASES, ids=IDS)
def test_the_same_bits_whatever_the_order(rows, K, N):
    inputs, runs = case_of(rows, K, N), set()
    for asynchrony in ("late", "early", "random"):
        for seed in range(5):
            with emulator.settings(seed=seed, asynchrony=asynchrony, multiprocessors=2):
                runs.add(emulated(*inputs).view(torch.int16).numpy().tobytes())
    assert len(runs) == 1


@pytest.mark.parametrize("rows, K, N", CASES, ids=IDS)
@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
def test_each_byte_of_the_weight_is_read_once_and_no_banks_conflict(rows, K, N, multiprocessors):
    for dtype in DTYPES:
        with emulator.settings(multiprocessors=multiprocessors):
            emulator.reset_statistics()
            emulated(*make((rows,), K, N, dtype, dtype), capability=(9, 0))
        found = statistics()
        assert found["shared_conflicts"] == 0
        moved = {name: (b["read"], b["written"]) for name, b in found["buffers"].items()}
        assert moved == {
            "weight": (N * K, 0),
            "x": (
                found["blocks"] * rows * K * 2,
                0,
            ),  # each block all of it, mostly from the caches
            "scales": (4 * N, 0),
            "bias": (2 * N, 0),
            "y": (0, rows * N * 2),
        }


def test_blocks_are_small_where_they_are_few_and_large_where_x_has_many_rows():
    """As docs/int8_linear.md has it for the layers of GPT-2 on the 132 of an H200."""

    def height(rows, N, multiprocessors=132) -> int:
        with emulator.settings(multiprocessors=multiprocessors):
            emulator.reset_statistics()
            emulated(*make((rows,), 16, N, torch.bfloat16))
        return -(-N // statistics()["blocks"])

    assert [height(1, N) for N in (768, 2304, 4800, 50257)] == [8, 8, 8, 32]
    assert [height(8, N) for N in (768, 1600, 4800, 50257)] == [8, 16, 8, 32]
    assert [height(16, N) for N in (768, 2304, 4800, 50257)] == [8, 32, 16, 32]
    assert height(1, 768, multiprocessors=4) == 32


def test_every_synchronisation_is_needed():
    """Dropped or weakened, one at a time, each is noticed: by the checker, or by a wrong result."""
    with emulator.settings(multiprocessors=2):
        emulator.reset_statistics()
        truths = [emulated(*case_of(*case)) for case in CASES]
        sites = [site for site in emulator.sites() if site["site"].startswith(SOURCE)]
        assert [site["site"].split()[1] for site in sites] == ["cta_sync"]
        for site in sites:
            for mutation in site["mutations"]:
                for case, truth in zip(CASES, truths, strict=True):
                    assert noticed(site["site"], mutation, case, truth), (site, mutation, case)


def noticed(site, mutation, case, truth) -> bool:
    with emulator.fault(site, mutation):
        try:
            return not torch.equal(emulated(*case_of(*case)), truth)
        except kernels.EmulatorError:
            return True


def test_opcheck():
    emulator.load()
    linear = torch.ops.almostgpt_emulator.int8_linear.default
    for dtype, bias in ((torch.float16, None), (torch.bfloat16, torch.float32)):
        opcheck(linear, (*make((2, 3), 32, 5, dtype, bias), 80))
        opcheck(linear, (*make((0,), 32, 5, dtype, bias), 90))


def test_compiles_whole():
    inputs = make((2, 3), 64, 20, torch.bfloat16, torch.bfloat16)
    with kernels.use_backend("emulator"):
        compiled = torch.compile(kernels.int8_linear, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(*inputs), emulated(*inputs))


@pytest.mark.parametrize(
    "rows, K, dtype, says",
    [
        (17, 32, torch.bfloat16, "1 to 16 rows of a decoding step, and x has 17"),
        (1, 40, torch.bfloat16, "rows of 40 are no multiple"),
        (1, 32, torch.float32, "not torch.float32"),
    ],
)
def test_what_it_does_not_serve_is_refused(rows, K, dtype, says):
    with pytest.raises(UserError, match=says):
        emulated(*make((rows,), K, 5, dtype))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": torch.zeros(17, 32).bfloat16()}, "at most 16 rows"),
        ({"x": torch.zeros(1, 16).bfloat16()}, "x must be"),
        ({"x": torch.zeros(1, 32)}, "bfloat16 or float16"),
        ({"weight": torch.zeros(5, 32)}, "weight must be int8"),
        (
            {"weight": torch.zeros(5, 40, dtype=torch.int8), "x": torch.zeros(1, 40)},
            "multiple of 16",
        ),
        ({"scales": torch.ones(4)}, "scales must be float32"),
        ({"bias": torch.zeros(4)}, "bias must be"),
        ({"bias": torch.zeros(5).half()}, "x's dtype or float32"),
    ],
)
def test_the_op_itself_checks_what_it_is_given(change, says):
    emulator.load()
    inputs = make((1,), 32, 5, torch.bfloat16)._replace(**change)
    with pytest.raises(RuntimeError, match=says):
        torch.ops.almostgpt_emulator.int8_linear(*inputs, 80)
