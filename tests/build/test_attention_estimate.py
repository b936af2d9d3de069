"""The attention kernels by counting (scripts/attention_estimate.py), and the page that is made of it."""

import contextlib
import io
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import attention_estimate as estimate
import pytest
import torch
from attention_page import with_tables

from almostgpt import kernels
from almostgpt.kernels import emulator

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="no g++ to read tiles.h with"
)
needs_emulator = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")


# --- tiles.h -------------------------------------------------------------------------------------


@needs_compiler
def test_every_tile_fits_the_cards_that_use_it():
    for (kernel, head_dim, shared), tile in estimate.tiles().items():
        assert (tile.kernel, tile.head_dim) == (kernel, head_dim)
        assert tile.shared_bytes <= shared * 1024, (kernel, head_dim, shared)
        assert estimate.resident(tile, shared) >= 1


@needs_compiler
def test_as_many_blocks_are_resident_as_the_comments_say():
    def resident(kernel, head_dim):
        return [
            estimate.resident(estimate.tiles()[kernel, head_dim, shared], shared)
            for shared in (99, 163, 227)
        ]

    assert resident("forward", 64)[1:] == resident("forward", 128)[1:] == [2, 2]
    assert resident("backward", 64) == [1, 2, 2]
    for tile in estimate.tiles().values():  # the second number of LAUNCH_BOUNDS
        assert tile.blocks == estimate.REGISTERS // (tile.threads * 256)


@needs_compiler
def test_there_are_few_kernels_to_compile():
    assert len(set(estimate.instantiations())) == len(estimate.instantiations()) == 38


# --- counting ------------------------------------------------------------------------------------


@needs_compiler
def test_the_products_are_those_of_the_formula():
    for tile in estimate.tiles().values():
        step = estimate.step_of(tile)
        pairs = tile.queries * tile.keys * tile.head_dim
        again = (tile.depth_parts - 1) * 4 * pairs  # scores and dP, by every warp that shares keys
        assert 2 * estimate.HMMA_FMAS * step.hmma == step.flops + again
        # Each product has its operands by then: at least a fragment of 512 bytes for four of them.
        assert step.hmma / 4 <= step.ldsm <= step.hmma


@needs_compiler
def test_a_ceiling_is_the_busiest_unit():
    card = estimate.Card("one", 163, 1, 1.0, 1024, 1e12)
    tile = estimate.tiles()["forward", 64, 163]
    # 128 x 64 scores of width 64 are 2 x 524,288 multiply-adds: 1,024 clocks; by hand.
    found = estimate.ceiling(tile, card)
    assert (found.bound, found.clocks) == ("tensor cores", 1024)
    assert found.tflops == pytest.approx(2 * 1024 * 1e9 / 1e12)
    slow_memory = estimate.ceiling(tile, estimate.Card("two", 163, 1, 1.0, 4096, 1e12))
    assert slow_memory.bound == "shared memory"
    # 160 ldmatrix in 4 wavefronts, 2 ranges a warp, and 16 KiB of K and V.
    assert slow_memory.clocks == 160 * 4 + 2 * 4 + 128


def _emulated(card, head_dim, T, deterministic=False):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, T, head_dim, generator=generator).bfloat16().requires_grad_()
        for _ in range(3)
    )
    emulator.reset_statistics()
    with kernels.use_backend("emulator", capability=card, ops=["flash_attention"]):
        kernels.flash_attention(q, k, v, deterministic=deterministic).float().sum().backward()
    return emulator.statistics()["kernels"]


@needs_compiler
@needs_emulator
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("card, shared", [((8, 0), 163), ((8, 9), 99), ((9, 0), 227)])
def test_bytes_are_those_that_the_emulator_counts(card, shared, head_dim):
    T = 256
    counted = _emulated(card, head_dim, T)
    for kernel in ("forward", "backward"):
        tile = estimate.tiles()[kernel, head_dim, shared]
        step, steps = estimate.step_of(tile), (T // tile.queries) * (T // tile.keys)
        once = {"forward": 1, "backward": 2}[kernel] * T * head_dim * 2  # q; k and v
        if card == (9, 0) and kernel == "forward":
            continue  # Hopper's own: test_flash_attention_emulated.py counts its bytes
        (found,) = (value for name, value in counted.items() if tile.name in name)
        assert found["global_read_bytes"] == once + steps * step.read
        written = once + (4 * T if kernel == "forward" else steps * step.summed)
        assert found["global_written_bytes"] == written


@needs_emulator
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("card", [(8, 0), (8, 9), (9, 0)])
def test_no_access_to_shared_memory_has_a_bank_conflict(card, head_dim):
    counted = _emulated(card, head_dim, 150, deterministic=True)
    counted |= {
        f"{name}, any order": kernel for name, kernel in _emulated(card, head_dim, 150).items()
    }
    assert len(counted) == 8
    assert {name for name, kernel in counted.items() if kernel["shared_conflicts"]} == set()


# --- the machine code ----------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_the_code_has_the_instructions_that_were_counted_by_hand_and_spills_nothing():
    reports = estimate.compiled()
    assert [problem for report in reports for problem in report.problems] == []
    found = {(k.name, k.arch): k for report in reports for k in report.kernels}
    assert set(found) == {(n, arch) for n in estimate.instantiations() for arch in ("80", "90a")}
    for tile in estimate.used():
        expected = estimate.hand_count(tile)
        for (name, arch), kernel in found.items():
            if f", {tile.name}, " in name:
                counted = {i: kernel.instructions.get(i, 0) for i in expected}
                assert counted == expected, (name, arch)
                assert kernel.spills == 0 and not {"LDL", "STL"} & set(kernel.instructions)
                assert kernel.registers * tile.threads * tile.blocks <= estimate.REGISTERS


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_the_page_has_the_registers_that_this_compiler_uses():
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    if (written := re.search(r"nvcc (\d+\.\d+), ", PAGE)[1]) not in version:
        pytest.skip(f"the page was written with nvcc {written}")
    again = "run python scripts/attention_estimate.py --compile"
    assert with_tables(PAGE, estimate.SLOW, estimate.SCRIPT) == PAGE, again


# --- the page ------------------------------------------------------------------------------------


@needs_compiler
def test_the_page_is_current():
    assert estimate.main(["--check"]) == 0, "run python scripts/attention_estimate.py"


@needs_compiler
def test_a_stale_page_is_noticed_and_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "PAGE", tmp_path / "attention.md")
    estimate.PAGE.write_text(PAGE.replace("| forward 64 |", "| forward 63 |"), encoding="utf-8")
    assert estimate.main(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert estimate.main([]) == 0
    assert estimate.PAGE.read_text(encoding="utf-8") == PAGE
    estimate.PAGE.write_text("# Attention\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for the table 'tiles'"):
        estimate.main([])


# Each is followed by what it prints.
SNIPPETS = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.S)


def test_all_snippets_are_found():
    assert len(SNIPPETS) == PAGE.count("```python") == 3


@needs_emulator
def test_the_snippets_print_what_the_page_says():
    names = {"__name__": "snippet"}  # one goes on where the last ended
    for code, prints in SNIPPETS:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, "docs/attention.md", "exec"), names)
        assert said.getvalue() == prints


def test_every_table_of_the_page_is_one():
    """As many columns in each row as in its head, or Markdown takes none of it for a table."""
    bars = re.compile(r"(?<!\\)\|")
    lines = estimate.PAGE.read_text(encoding="utf-8").splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith("|") and before.startswith("|"):
            assert len(bars.findall(line)) == len(bars.findall(before)), line
