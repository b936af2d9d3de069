"""scripts/attention_tiles.py: what can be a tile of Hopper's attention forward, and what it prints of it."""

import shutil

import attention_tiles
import hopper_code
import pytest
from attention_tiles import main, refusal, registers, search
from hopper_tile import HopperTile, score_of, used

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="no g++ to read tiles.h with"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_compiler
def test_the_tiles_of_tiles_h_can_be_and_are_marked():
    for tile, plain in used():
        assert refusal(tile, plain) is None
        marked = [one.tiles for one in search(tile.head_dim, 2048, False, plain) if one.used]
        assert any(tile in tiles for tiles in marked)
        assert len(marked) == sum(t.head_dim == tile.head_dim and p == plain for t, p in used())


def test_what_cannot_be_is_told_why():
    assert refusal(HopperTile(64, 2, 144), True) == "wgmma.inc has no width 144"
    # 64 KiB of queries and 4 x 48 of keys and values.
    assert refusal(HopperTile(256, 2, 96), False).startswith("256.1 KiB of shared memory")
    # 96 + 64 + 48, and 24 + 12.
    assert refusal(HopperTile(128, 2, 192), True) == "about 244 of 240 registers"
    assert registers(HopperTile(128, 2, 128), True) == 64 + 64 + 32 + 24 + 8
    assert registers(HopperTile(128, 2, 128), False) == 64 + 64 + 32 + 32 + 4


@needs_compiler
def test_the_fastest_comes_first_and_tiles_that_differ_in_stages_alone_are_one():
    found = search(64, 2048, True, True)
    rates = [one.exposed for one in found]
    assert rates == sorted(rates, reverse=True)
    assert all(one.exposed <= one.hidden for one in found)
    listed = [tile for one in found for tile in one.tiles]
    assert len(listed) == len(set(listed))
    for one in found:
        assert len({(t.head_dim, t.consumers, t.keys, t.out_apart) for t in one.tiles}) == 1
        assert all(refusal(tile, True) is None for tile in one.tiles)


@needs_compiler
def test_it_prints_a_table(capsys):
    assert main(["--head-dim", "128", "--tokens", "2048", "--top", "1", "--causal"]) == 0
    title, head, *rows, _ = capsys.readouterr().out.splitlines()
    assert title.startswith("width 128, PlainScore, 2,048 tokens, causal: ")
    assert head.startswith("queries x keys")
    # The best, and those of tiles.h in any case.
    assert [row for row in rows if row.startswith("*")] != []
    assert any(row.startswith("* 128 x 160 ") and "218 of 240" in row for row in rows)
    assert main(["--head-dim", "256", "--top", "1", "--refused"]) == 0
    shown = capsys.readouterr().out
    assert "width 256, PlainScore, 8,192 tokens, full: " in shown
    assert "HopperForwardTile<256, 2, 112, 2>  wgmma.inc has no width 112" in shown


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tokens", "0"],
        ["--tokens", "9999999"],
        ["--top", "-1"],
        ["--head-dim", "65"],
        ["--jobs", "0"],
    ],
)
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2 and "invalid" in capsys.readouterr().err


@needs_compiler
def test_the_help_has_examples_that_run(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert attention_tiles.EXAMPLES.strip() in capsys.readouterr().out
    for line in attention_tiles.EXAMPLES.strip().splitlines()[1:]:
        command, *arguments = line.partition("#")[0].split()
        assert (command, arguments.pop(0)) == ("python", "scripts/attention_tiles.py")
        if "--compile" not in arguments:
            assert main(arguments) == 0
            assert "TFLOP/s" in capsys.readouterr().out


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "tile, plain",
    [
        (HopperTile(128, 2, 176), True),
        (HopperTile(128, 2, 192), True),
        (HopperTile(128, 3, 80), True),
        (HopperTile(128, 3, 96), True),
        (HopperTile(64, 3, 96), False),
        (HopperTile(64, 3, 128), False),
        (HopperTile(128, 2, 192), False),
        (HopperTile(256, 2, 80), False),
    ],
)
def test_the_line_between_what_fits_and_what_spills_is_where_the_compiler_has_it(tile, plain):
    code = hopper_code.compiled(tile.name, score_of(plain))
    assert (code.spills == 0) == (refusal(tile, plain) is None)


@pytest.mark.slow
@needs_compiler
@needs_nvcc
def test_it_asks_the_compiler(capsys):
    assert main(["--head-dim", "256", "--top", "1", "--compile"]) == 0
    assert "0 bytes" in capsys.readouterr().out
    assert "no instance of overloaded function" in hopper_code.compiled(
        "HopperForwardTile<64, 2, 144>"
    )
