"""scripts/hopper_timeline.py: the picture of the pipeline keeps the rules of the kernel."""

import itertools
import re
from pathlib import Path

import pytest
from hopper_tile import HopperTile
from hopper_timeline import PICTURE, described, main, timeline

TILES = [HopperTile(128, 2, 128), HopperTile(64, 3, 128), HopperTile(256, 2, 80)]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
def test_what_depends_on_what(tile):
    steps = 6
    spans = timeline(tile, steps)
    of = {(span.row, span.group, span.label): span for span in spans}
    assert len(of) == len(spans)
    for row in ("TMA", "tensor cores"):  # one thing at a time
        busy = sorted((s.begin, s.end) for s in spans if s.row == row)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(busy))
    for group, at in itertools.product(range(tile.consumers), range(steps)):
        scores = of["tensor cores", group, f"S{at}"]
        exponentials, rounded = (
            of[f"warpgroup {group}", group, f"{x}{at}"] for x in ("exp2 ", "P")
        )
        assert of["TMA", None, f"K{at}"].end <= scores.begin < scores.end <= exponentials.begin
        assert exponentials.end <= rounded.begin
        if at == 0:
            continue
        out = of["tensor cores", group, f"O{at - 1}"]
        assert of["TMA", None, f"V{at - 1}"].end <= out.begin and out.end <= rounded.begin
        assert of[f"warpgroup {group}", group, f"P{at - 1}"].end <= out.begin
        assert scores.end <= out.begin
        if at >= tile.stages:  # a place is empty when all have read it
            last = max(of["tensor cores", g, f"S{at - 2}"].end for g in range(tile.consumers))
            assert last <= of["TMA", None, f"K{at}"].begin


def test_in_the_long_run_the_tensor_cores_never_wait():
    tile = TILES[0]
    products = [s for s in timeline(tile, 12) if s.row == "tensor cores"][8:]
    assert all(a.end == b.begin for a, b in itertools.pairwise(products))


def test_it_draws(tmp_path):
    assert main(["--out", str(tmp_path / "picture.svg"), "--steps", "3"]) == 0
    labels = set(re.findall(r">([KVSO]\d|exp2 \d)<", (tmp_path / "picture.svg").read_text()))
    assert {"K0", "V2", "S2", "O1", "exp2 2"} <= labels
    again = "run python scripts/hopper_timeline.py"
    assert f">{described(TILES[0], 5)}<" in Path(PICTURE).read_text(), again


@pytest.mark.parametrize(
    "wrong", [["--steps", "1"], ["--out", "picture.png"], ["--out", "no/x.svg"]]
)
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2 and "must be" in capsys.readouterr().err
