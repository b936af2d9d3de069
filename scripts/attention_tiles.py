#!/usr/bin/env python3
"""Which tiles Hopper's attention forward could have, and what the model makes of them; without a GPU.

Goes through consumers (1 to 3), keys (multiples of 16, up to 256) and stages (2 to 4), leaves out what
cannot be, and lists the rest by the rate that scripts/attention_model_sm90.py predicts for it: with
the starts of products exposed, by which it is ordered, and hidden. What cannot be:

  width       wgmma has a width of 8, 16, … 256, and csrc/device/cuda/wgmma.inc only some of these
  memory      more than 227 KiB of shared memory
  registers   a thread holds scores, out and P, and needs some more: see RESERVE

A `*` marks what csrc/attention/tiles.h has. A warpgroup has 64 queries. The model sees a difference between
2 and more stages only where out then finds no place of its own, and knows no limit of L2; the bytes that a
step asks of it are in the table.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass

import hopper_code
from attention_estimate import HEAD_DIMS, KIB
from attention_model_sm90 import predict, step
from attention_page import CSRC
from hopper_tile import MOST_SHARED, HopperTile, score_of, used

CONSUMERS, KEYS, STAGES = (1, 2, 3), range(16, 257, 16), (2, 3, 4)

# Registers of a thread beside scores, out and P. Not counted by hand: the line between the tiles that
# nvcc 13.0 spills and those that it does not; all 30 near the line are on their side. A bent score keeps
# positions and slopes at hand, and more of its arithmetic under way.
RESERVE = {"PlainScore": (24, 16), "BentScore": (32, 32)}  # so many, and one more for so many keys

EXAMPLES = """
examples:
  python scripts/attention_tiles.py --head-dim 128            # all queries see all of 8,192 keys
  python scripts/attention_tiles.py --head-dim 64 --causal --tokens 2048 --top 20
  python scripts/attention_tiles.py --head-dim 128 --bent     # with a softcap or ALiBi
  python scripts/attention_tiles.py --compile --top 4         # ask nvcc about the best four of each
"""


def widths() -> frozenset[int]:
    """Those of the wgmma that a kernel may ask for."""
    text = (CSRC / "device" / "cuda" / "wgmma.inc").read_text(encoding="utf-8")
    return frozenset(map(int, re.findall(r"Width<(\d+)>", text)))


def registers(tile: HopperTile, plain: bool) -> int:
    base, keys = RESERVE[score_of(plain)]
    return tile.held + base + tile.keys // keys


def refusal(tile: HopperTile, plain: bool) -> str | None:
    """Why a tile cannot be; None where it can."""
    for width in (tile.keys, tile.head_dim):
        if width not in widths():
            return f"wgmma.inc has no width {width}"
    if tile.least_bytes > MOST_SHARED:
        return f"{tile.least_bytes / KIB:.4g} KiB of shared memory"
    if (needed := registers(tile, plain)) > tile.consumer_registers:
        return f"about {needed} of {tile.consumer_registers} registers"
    return None


def candidates(head_dim: int) -> list[HopperTile]:
    return [
        HopperTile(head_dim, consumers, keys, stages)
        for consumers in CONSUMERS
        for keys in KEYS
        for stages in STAGES
    ]


@dataclass(frozen=True)
class Found:
    """Tiles between which the model sees no difference: they have more or fewer stages."""

    tiles: tuple[HopperTile, ...]
    used: bool  # tiles.h has one of them, for this score
    exposed: float  # TFLOP/s
    hidden: float


def search(head_dim: int, tokens: int, causal: bool, plain: bool) -> list[Found]:
    """The tiles that can be, the fastest first."""
    alike: dict[tuple, list[HopperTile]] = {}
    for tile in candidates(head_dim):
        if refusal(tile, plain) is None:
            alike.setdefault((tile.consumers, tile.keys, tile.out_apart), []).append(tile)
    found = []
    for tiles in alike.values():
        exposed, hidden = (
            predict(tiles[0], tokens, causal, plain, way).tflops for way in (False, True)
        )
        has = any((tile, plain) in used() for tile in tiles)
        found.append(Found(tuple(tiles), has, exposed, hidden))
    return sorted(found, key=lambda one: -one.exposed)


def rows_of(found: list[Found], plain: bool, compiles: bool, jobs: int) -> list[list[str]]:
    head = [
        "queries x keys",
        "stages (KiB)",
        "out",
        "registers",
        "busiest",
        "L2, B/clock",
        "TFLOP/s",
    ]
    head += ["registers, nvcc", "spills", "others", "exp2 behind P V"] if compiles else []
    rows = [head]
    for one in found:
        tile = one.tiles[0]
        a_step = step(tile, plain=plain)
        rows.append(
            [
                f"{'*' if one.used else ' '} {tile.queries:3} x {tile.keys}",
                ", ".join(f"{t.stages} ({t.shared_bytes / KIB:.0f})" for t in one.tiles),
                "apart" if tile.out_apart else "in Q's",
                f"{registers(tile, plain)} of {tile.consumer_registers}",
                a_step.bound,
                f"{tile.step_bytes / a_step.clocks:.0f}",
                f"{one.exposed:.0f} to {one.hidden:.0f}",
            ]
        )
    if compiles:
        works = [(one.tiles[0].name, score_of(plain)) for one in found]
        for row, code in zip(rows[1:], hopper_code.compile_all(works, jobs), strict=True):
            if isinstance(code, str):
                row += [code, "", "", ""]
                continue
            loop = code.loop
            row += [str(code.registers), f"{code.spills} bytes"]
            row += [str(loop.others), f"{loop.late_exp2} of {loop.exp2}"] if loop else ["", ""]
    return rows


def aligned(rows: list[list[str]]) -> str:
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip()
        for row in rows
    )


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def tokens(text: str) -> int:
    """Up to 2^18: the model goes through the works one by one."""
    if (number := at_least_one(text)) > 1 << 18:
        raise ValueError
    return number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--head-dim", type=int, nargs="+", choices=HEAD_DIMS, default=list(HEAD_DIMS)
    )
    parser.add_argument(
        "--tokens", type=tokens, default=8192, help="1 to 262144 (default: %(default)s)"
    )
    parser.add_argument("--causal", action="store_true", help="default: all queries see all keys")
    parser.add_argument("--bent", action="store_true", help="the score of softcap and ALiBi")
    parser.add_argument(
        "--top", type=at_least_one, default=12, help="rows a width (default: %(default)s)"
    )
    parser.add_argument("--refused", action="store_true", help="list what cannot be, too, and why")
    parser.add_argument(
        "--compile", action="store_true", help="compile the rows with nvcc: registers, spills, loop"
    )
    parser.add_argument(
        "--jobs", type=at_least_one, default=2, help="of nvcc (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    for head_dim in dict.fromkeys(options.head_dim):
        plain = not options.bent
        found = search(head_dim, options.tokens, options.causal, plain)
        kind = "causal" if options.causal else "full"
        fit = sum(len(one.tiles) for one in found)
        print(
            f"width {head_dim}, {score_of(plain)}, {options.tokens:,} tokens, {kind}: "
            f"{fit} of {len(candidates(head_dim))} tiles can be"
        )
        # Those of tiles.h always.
        shown = [one for at, one in enumerate(found) if at < options.top or one.used]
        print(aligned(rows_of(shown, plain, options.compile, options.jobs)), end="\n\n")
        if options.refused:
            refused = [(tile, refusal(tile, plain)) for tile in candidates(head_dim)]
            print(aligned([[tile.name, why] for tile, why in refused if why]), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
