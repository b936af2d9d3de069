"""scripts/attention_model_sm90.py, held against tiles.h, the machine code, and numbers worked out by hand."""

import re
import shutil
import subprocess
from pathlib import Path

import attention_model_sm90 as model
import check_kernels
import hopper_code
import pytest
from attention_page import with_tables
from hopper_tile import HopperTile, chosen, score_of, tile_for, used

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="no g++ to read tiles.h with"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

NARROW, MIDDLE, WIDE = HopperTile(64, 3, 128), HopperTile(128, 2, 128), HopperTile(256, 2, 80)


# --- tiles ---------------------------------------------------------------------------------------


@needs_compiler
def test_a_tile_is_what_tiles_h_says():
    for tile, described in chosen().values():
        assert described == (
            tile.queries,
            tile.take_turns,
            tile.consumer_registers,
            tile.shared_bytes,
            tile.out_apart,
        )


@needs_compiler
def test_which_tiles_are_used():
    assert tile_for(128, 8192, causal=True) == MIDDLE
    assert tile_for(128, 8192, causal=False) == HopperTile(128, 2, 160)
    assert tile_for(64, 8192, causal=True) == NARROW
    assert tile_for(64, 1024, causal=True) == HopperTile(64, 2, 128)
    assert len(used()) == 9  # each for bf16 and fp16: 18 kernels


# --- a step --------------------------------------------------------------------------------------


def test_a_step_of_width_128_by_hand():
    found = model.step(MIDDLE)
    assert found.units == {
        # Two warpgroups, two products of 64 x 128 x 128 = 2^20 multiply-adds, 2^11 a clock.
        "tensor cores": 2 * 2 * 512,
        # 64 x 128 scores a warpgroup, 16 a clock.
        "exp2": 2 * 512,
        # 64 scores a thread at 4.5; 16 products at 6 and 7; 60.
        "issue": 2 * (288 + 48 + 56 + 60),
        # A warpgroup: 8 products of 64 and 128 rows, 8 of 128 columns, of 16 x 2 bytes each. And 64 KiB.
        "shared memory": 2 * (8 * (64 + 128) * 32 + 8 * 128 * 32) / 128 + 65536 / 128,
    }
    # Its turn, Q K^T, the softmax (64 clocks of maxima, 512 of exp2: longer than P V), rounding, latency.
    assert found.chain == 64 + 512 + (64 + 512) + 64 + 100
    assert (found.clocks, found.bound) == (2048 + 2 * 64, "tensor cores")
    assert model.step(MIDDLE, hidden=True).clocks == 2048


def test_the_other_widths_by_hand():
    narrow = model.step(NARROW, hidden=True)
    assert narrow.units["tensor cores"] == narrow.units["exp2"] == narrow.clocks == 1536
    # A softcap: three times the exponentials.
    bent = model.step(HopperTile(64, 2, 128), plain=False)
    assert (bent.bound, bent.clocks) == ("exp2", 2 * 3 * 512)
    assert bent.units["issue"] == 2 * (64 * 12.5 + 48 + 28 + 60)
    # Without turns both warpgroups may round P and start again at the same time.
    assert model.step(WIDE, hidden=True).clocks == 4 * 640
    assert model.step(WIDE).clocks == 4 * 640 + 64 + 40 + 100


def test_one_warpgroup_alone_waits_for_itself():
    alone = model.step(MIDDLE, working=1)
    assert (alone.clocks, alone.bound) == (alone.chain, "chain")
    assert alone.units["tensor cores"] == 1024
    # A mask is 2 instructions for each of 64 scores, before the exponentials.
    assert model.step(MIDDLE, working=1, masked=1).chain == alone.chain + 128


def test_what_a_thread_holds():
    assert [tile.held for tile in (NARROW, MIDDLE, WIDE)] == [128, 160, 188]


# --- a work and a launch -------------------------------------------------------------------------


def test_warpgroups_see_the_tiles_up_to_their_own_last_row():
    def tiles(row):
        return model.tiles_of(row, row + 63, WIDE, 1024, causal=True)

    assert [tiles(row) for row in (0, 64, 128, 960)] == [1, 2, 3, 13]  # rows / 80
    assert model.tiles_of(0, 63, WIDE, 1024, causal=False) == 13
    assert model.tiles_of(1024, 1087, WIDE, 1024, causal=False) == 0


def test_a_work_is_its_steps_and_what_is_between_two(monkeypatch):
    full = model.work(MIDDLE, 2048, 0, causal=False, plain=True, hidden=False)
    # The first softmax (64 + 512, rounding 64, latency 100) less the other's Q K^T; 32 KiB of queries
    # after 1,000 clocks, less the last softmax and P V.
    assert full == 16 * 2176 + (740 - 512) + (1000 + 1024 - 740 - 512)
    # Causal, rows 128 to 255: a whole tile and one that the diagonal cuts for both.
    causal = model.work(MIDDLE, 2048, 128, causal=True, plain=True, hidden=False)
    assert causal == 2 * 2176 + (868 - 512) + (1000 + 1024 - 740 - 512)
    # Of the last 192 rows of 2,048 only 128 are there: the third warpgroup has nothing to do.
    seen = []
    step = model.step
    monkeypatch.setattr(model, "step", lambda tile, *rest: seen.append(rest) or step(tile, *rest))
    model.work.__wrapped__(NARROW, 2048, 1920, True, True, False)
    assert {working for working, *_ in seen} == {2}
    assert [masked for _, masked, *_ in seen] == [0] * 15 + [2]


def test_out_in_the_place_of_the_queries_makes_the_next_wait():
    assert MIDDLE.out_apart and not WIDE.out_apart
    assert model.between(WIDE, True, False) > 4 * model.between(MIDDLE, True, False)


SCHEDULE = """
#include <cstdio>
#include "attention/heads.cuh"
using namespace almostgpt;
int main() {
  const Schedule schedule = make_schedule(TOKENS, QUERIES, 128, 8, int64_t{4} * TOKENS * HEAD_DIM);
  for (unsigned block = 0; block < schedule.blocks(); ++block)
    std::printf("%d ", (schedule.tiles - 1 - schedule.work(block).tile) * QUERIES);
}
"""


@needs_compiler
@pytest.mark.parametrize("tile, tokens", [(NARROW, 2048), (MIDDLE, 8192), (WIDE, 16384)])
def test_works_come_in_the_order_of_the_kernel(tile, tokens, tmp_path):
    program = tmp_path / "schedule.cpp"
    text = SCHEDULE.replace("TOKENS", str(tokens)).replace("QUERIES", str(tile.queries))
    program.write_text(text.replace("HEAD_DIM", str(tile.head_dim)))
    compiler = shutil.which("g++") or "c++"
    command = [compiler, "-std=c++17", "-DALMOSTGPT_EMULATOR", "-I", ROOT / "csrc", program]
    subprocess.run([*command, "-o", tmp_path / "schedule"], check=True)
    printed = subprocess.run([tmp_path / "schedule"], capture_output=True, text=True).stdout
    assert list(map(int, printed.split())) == model.schedule(tile, tokens)


def test_a_launch_lasts_as_long_as_its_longest_list_of_works():
    # 16 tiles of queries in each of 128 heads are 15.5 for each of 132 multiprocessors: some have 16.
    found = model.predict(MIDDLE, 2048, causal=False)
    assert found.clocks == 5000 + 16 * (16 * 2176 + 228 + 772)
    flops = 4 * 128 * 2048**2 * 128
    assert found.tflops == pytest.approx(flops / (found.clocks / 1.755e9) / 1e12)
    assert found.share == pytest.approx(flops / 4096 / 132 / found.clocks)


@pytest.mark.parametrize("tile, plain", [(NARROW, True), (MIDDLE, True), (WIDE, True)])
def test_predictions_are_below_what_the_tensor_cores_can(tile, plain):
    for tokens in model.LENGTHS:
        for causal in (False, True):
            exposed, hidden = (
                model.predict(tile, tokens, causal, plain, way).share for way in (False, True)
            )
            assert 0.5 < exposed <= hidden < 1


# --- the machine code ----------------------------------------------------------------------------


def loop_of(code: str) -> hopper_code.Loop:
    return hopper_code.find_loop(*hopper_code.read(code))


LOOP = """\
.L_x_1:
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING R14, 0x100 ;
        /*0020*/                   R2UR UR10, R22 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/                   FSEL R1, R2, R3, P0 ;
        /*0080*/                   FSEL R4, R2, R3, P0 ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R1, R1 ;
        /*00a0*/              @!P1 BRA `(.L_x_3) ;
        /*00b0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00c0*/                   MUFU.EX2 R2, R2 ;
        /*00d0*/               @P0 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_2) ;
"""


def test_the_loop_is_taken_apart():
    # The branch out of the loop waits again; the one within jumps over a mask.
    assert loop_of(LOOP) == hopper_code.Loop(products=2, others=9, to_start=1, exp2=2, late_exp2=1)
    assert loop_of(LOOP.replace(".tnspB", "")) is None


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_the_code_has_the_instructions_that_were_counted_by_hand_and_spills_nothing():
    tools = check_kernels.find_tools("nvcc")
    kernels = {}
    for head_dim in model.HEAD_DIMS:
        source = ROOT / "csrc" / "attention" / f"forward_d{head_dim}_sm90.cu"
        report = check_kernels.compile_one(tools, source, "90a")
        assert report.problems == ()
        kernels |= {kernel.name: kernel for kernel in report.kernels}
    expected = {
        f"attention_forward_sm90_kernel<{dtype}, {tile.name}, {score_of(plain)}>": tile
        for tile, plain in used()
        for dtype in ("bf16", "fp16")
    }
    assert set(kernels) == set(expected)
    for name, tile in expected.items():
        counted = {i: kernels[name].instructions.get(i, 0) for i in tile.hand_count()}
        assert counted == tile.hand_count(), name
    expectations = [e for e in check_kernels.EXPECTED if "forward_sm90" in e.kernels]
    assert check_kernels.unmet(list(kernels.values()), ["90a"], expectations) == []


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_the_loop_has_about_as_many_instructions_as_the_model_says():
    for tile, plain in used():
        code = hopper_code.compiled(tile.name, score_of(plain))
        assert code.registers <= tile.consumer_registers
        assert code.loop.products == tile.head_dim // 16 + tile.keys // 16
        # One for each score; another for a softcap. And none behind the wait for O += P V, which would
        # leave nothing to compute beside the product: see finish_output in forward_sm90.cuh.
        assert code.loop.exp2 == tile.keys // 2 * (1 if plain else 2)
        assert code.loop.late_exp2 == 0
        assert code.loop.to_start <= 30  # HAND_OVER is for so many
        assert code.loop.others == pytest.approx(tile.instructions(plain), rel=0.1)


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_the_page_has_the_code_of_this_compiler():
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    section = PAGE[PAGE.index("## What bounds the Hopper forward") :]
    if (written := re.search(r"nvcc (\d+\.\d+), ", section)[1]) not in version:
        pytest.skip(f"the page was written with nvcc {written}")
    again = "run python scripts/attention_model_sm90.py --compile"
    assert with_tables(PAGE, model.SLOW, model.SCRIPT) == PAGE, again


# --- the page ------------------------------------------------------------------------------------


@needs_compiler
def test_the_page_is_current():
    assert model.main(["--check"]) == 0, "run python scripts/attention_model_sm90.py"


@needs_compiler
def test_a_stale_page_is_noticed_and_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "PAGE", tmp_path / "attention.md")
    model.PAGE.write_text(PAGE.replace("starts hidden", "starts hid"), encoding="utf-8")
    assert model.main(["--check"]) == 1
    assert "run python scripts/attention_model_sm90.py" in capsys.readouterr().err
    assert model.main([]) == 0
    assert model.PAGE.read_text(encoding="utf-8") == PAGE
