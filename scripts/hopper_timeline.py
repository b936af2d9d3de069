#!/usr/bin/env python3
"""Draw how a block of Hopper's forward works in time, by the model: docs/images/hopper_pipeline.svg.

Each warpgroup does in order what forward_sm90.cuh says; the tensor cores take products in the order in
which they are issued, and TMA brings a tile when its place is empty. Clocks are those of
attention_model_sm90.py. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from attention_model_sm90 import FETCH_BYTES_A_CLOCK, HAND_OVER, LATENCY_IN_A_STEP
from attention_page import ROOT
from hopper_tile import HopperTile

PICTURE = ROOT / "docs" / "images" / "hopper_pipeline.svg"


@dataclass(frozen=True)
class Span:
    """What one row of the picture does for a while, in clocks.

    Attributes:
        group: the warpgroup that it is for; None for all.
    """

    row: str
    begin: float
    end: float
    label: str
    kind: str
    group: int | None = None


def timeline(tile: HopperTile, steps: int) -> list[Span]:
    """The first steps of a tile of queries, from when its queries are there."""
    spans: list[Span] = []
    tensor_free = tma_free = 0.0
    turn = 0.0  # from when the next warpgroup may issue
    ready = [0.0] * tile.consumers  # a warpgroup is through with its last step
    arrived: dict[str, float] = {}
    released: dict[str, list[float]] = defaultdict(list)

    def bring(name: str, at: int) -> None:
        """K or V of a step, into the place of that two steps before."""
        nonlocal tma_free
        waits_for = released[f"{name}{at - tile.stages}"]
        begin = max(tma_free, *waits_for) if waits_for else tma_free
        tma_free = begin + tile.step_bytes / 2 / FETCH_BYTES_A_CLOCK
        arrived[f"{name}{at}"] = tma_free
        spans.append(Span("TMA", begin, tma_free, f"{name}{at}", name))

    def multiply(group: int, label: str, issued: float) -> float:
        nonlocal tensor_free
        begin = max(tensor_free, issued)
        tensor_free = begin + tile.product
        spans.append(Span("tensor cores", begin, tensor_free, label, label[0], group))
        return tensor_free

    def compute(group: int, label: str, begin: float, clocks: float) -> float:
        row = f"warpgroup {group}"
        spans.append(Span(row, begin, begin + clocks, label, label[0], group))
        return begin + clocks

    bring("K", 0)
    for at in range(steps):
        if at + 1 < steps:
            bring("K", at + 1)
        bring("V", at)
        for group in range(tile.consumers):
            there = max(arrived[f"K{at}"], arrived[f"V{at - 1}"] if at else 0.0)
            turn = issued = max(turn, ready[group], there) + HAND_OVER
            scores = multiply(group, f"S{at}", issued)
            out = multiply(group, f"O{at - 1}", issued) if at else scores
            released[f"K{at}"].append(scores)
            softmax = compute(group, f"exp2 {at}", scores, tile.softmax(True, False))
            if at:
                released[f"V{at - 1}"].append(max(softmax, out))
            rounded = compute(group, f"P{at}", max(softmax, out), tile.rounding)
            ready[group] = rounded + LATENCY_IN_A_STEP
    return spans


def described(tile: HopperTile, steps: int) -> str:
    """What a picture shows, in words: a test holds the committed one against it."""
    return "; ".join(
        f"{span.row}: {span.label} {span.begin:.0f} to {span.end:.0f}"
        for span in timeline(tile, steps)
    )


def draw(tile: HopperTile, steps: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    groups = ("#3b6fb6", "#c9622b", "#4d8f4d")
    rows = ["TMA", "tensor cores", *(f"warpgroup {group}" for group in range(tile.consumers))]
    settings = {"svg.hashsalt": "hopper", "svg.fonttype": "none", "font.size": 8}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(10, 2.6), layout="constrained")
        for span in timeline(tile, steps):
            colour = "#8a8a8a" if span.group is None else groups[span.group]
            strong = span.kind in "SKe"  # beside O, V and the rounding of P
            axes.barh(
                rows.index(span.row),
                span.end - span.begin,
                left=span.begin,
                height=0.72,
                color=colour,
                alpha=0.95 if strong else 0.5,
                edgecolor="white",
                linewidth=0.8,
            )
            if span.end - span.begin > 150:
                middle = (span.begin + span.end) / 2
                axes.text(
                    middle,
                    rows.index(span.row),
                    span.label,
                    color="white" if strong else "black",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                )
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlabel(
            f"clocks, by the model: width {tile.head_dim}, {tile.queries} x {tile.keys}, "
            "two warpgroups; not measured"
        )
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(left=False)
        figure.savefig(path, metadata={"Date": None, "Description": described(tile, steps)})
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PICTURE, help="an .svg (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="2 to 20 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 2 <= options.steps <= 20:
        parser.error(f"--steps must be 2 to 20, not {options.steps}")
    if options.out.suffix != ".svg" or not options.out.parent.is_dir():
        parser.error(f"--out must be an .svg in a folder that is there, not {options.out}")
    draw(HopperTile(128, 2, 128), options.steps, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
