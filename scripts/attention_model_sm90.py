#!/usr/bin/env python3
"""What Hopper's attention forward should take, by a model of its clocks, and the tables that say so.

csrc/attention/forward_sm90.cuh, on one H200. Nothing here is measured; it is a prediction for a
measurement to test. From the tiles of csrc/attention/tiles.h, which g++ compiles and a small program
prints, follow

  a step     all the warpgroups of a block against one tile of keys: what each unit of a
             multiprocessor has to do for it, and the chain of what one warpgroup does in order;
  a work     a tile of queries: its steps, and what nothing hides at its begin and end;
  a launch   the works as the blocks take them, one a multiprocessor: until the last is done.

Once with the start of each warpgroup's products hidden behind those of the one before, and once not:
that depends on how far the tensor cores' queue reaches, which is not documented.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

from attention_estimate import HEAD_DIMS, KIB, SHARED_BYTES_A_CLOCK
from attention_page import PAGE, page_main, table
from hopper_tile import (
    FMAS_A_CLOCK,
    LENGTHS,
    HopperTile,
    score_of,
    tile_for,
    used,
)

# --- what a multiprocessor does in a clock, and what is assumed ----------------------------------

MULTIPROCESSORS, GHZ = 132, 1.755  # an H200's; the clock under load is an assumption
PEAK = 2 * FMAS_A_CLOCK * MULTIPROCESSORS * GHZ / 1e3  # TFLOP/s

# From its turn to a warpgroup's first product: the barrier, and some 25 instructions that bring the
# operands' addresses into uniform registers.
HAND_OVER = 64
LATENCY_IN_A_STEP = 100  # of a vote, two waits for products, two for tiles
FETCH = 1000  # from TMA's order to the first bytes of queries, which come from DRAM …
FETCH_BYTES_A_CLOCK = 32  # … and what comes from then on
LAUNCH = 5000  # 3 microseconds

HEADS, KV_HEADS, BATCH = 64, 8, 2
GROUP_BYTES = 20 << 20  # kGroupBytes of heads.cuh


# --- a step ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Clocks."""

    units: dict[str, float]  # "tensor cores", …
    chain: float  # of one warpgroup, from its turn to its next
    clocks: float

    @property
    def bound(self) -> str:
        return max({**self.units, "chain": self.chain}.items(), key=lambda item: item[1])[0]


@cache
def step(
    tile: HopperTile,
    working: int | None = None,
    masked: int = 0,
    plain: bool = True,
    hidden: bool = False,
) -> Step:
    """A step in which so many of the warpgroups have scores to compute, some of them to mask.

    ``plain``: they are not bent by a softcap. ``hidden``: the start of products is.
    """
    working = tile.consumers if working is None else working
    units = {
        "tensor cores": working * 2 * tile.product,
        "exp2": working * tile.exp2(plain),
        "issue": working * tile.instructions(plain) + masked * tile.mask_instructions,
        "shared memory": working * tile.shared + tile.step_bytes / SHARED_BYTES_A_CLOCK,
    }
    start = 0 if hidden else HAND_OVER
    alone = tile.rounding + LATENCY_IN_A_STEP  # with no products of its own under way
    chain = start + tile.product + max(tile.product, tile.softmax(plain, masked > 0)) + alone
    if tile.take_turns:
        exposed = working * start
    else:  # nothing keeps the warpgroups apart: at worst all are alone at the same time
        exposed = 0 if hidden else start + alone
    clocks = max(chain, *units.values(), units["tensor cores"] + exposed)
    return Step(units, chain if working else 0.0, clocks if working else start)


# --- a work ---------------------------------------------------------------------------------------


def tiles_of(first_row: int, last_row: int, tile: HopperTile, tokens: int, causal: bool) -> int:
    """How many tiles of keys rows see, from the first key on; queries and keys are as many."""
    if first_row >= tokens:
        return 0
    end = min(tokens, last_row + 1) if causal else tokens
    return -(-end // tile.keys)


@cache
def work(
    tile: HopperTile, tokens: int, first_row: int, causal: bool, plain: bool, hidden: bool
) -> float:
    """The clocks of a tile of queries: from its first product to that of the next."""
    groups = [first_row + 64 * group for group in range(tile.consumers)]
    own = [tiles_of(row, row + 63, tile, tokens, causal) for row in groups]
    # A tile is whole for the rows from its last key on, where causal, and if it has no end within.
    sees = [min(tokens, row + 1) if causal else tokens for row in groups]
    total = 0.0
    for at in range(max(own)):
        works = [at < tiles for tiles in own]
        cut = [at < own[g] and (at + 1) * tile.keys > sees[g] for g in range(tile.consumers)]
        total += step(tile, sum(works), sum(cut), plain, hidden).clocks
    return total + between(tile, plain, causal)


def between(tile: HopperTile, plain: bool, masked: bool) -> float:
    """Clocks without products between two works."""
    # The first scores are there, and there is no O += P V yet: only the others' first products hide
    # their softmax.
    first = tile.softmax(plain, masked) + tile.rounding + LATENCY_IN_A_STEP
    first = max(0.0, first - (tile.consumers - 1) * tile.product)
    fetch = FETCH + tile.query_bytes / FETCH_BYTES_A_CLOCK
    if tile.out_apart:
        # The next queries are sent for when the last warpgroup has its last products of scores, and come
        # while it turns these into exponentials and adds them up.
        ends = tile.softmax(plain, False) + tile.rounding + LATENCY_IN_A_STEP + tile.product
        return first + max(0.0, fetch - ends)
    # They wait for out to be scaled, rounded, stored, and read by TMA.
    scaled = 1.5 * tile.head_dim + 2 * LATENCY_IN_A_STEP
    return first + scaled + tile.query_bytes / SHARED_BYTES_A_CLOCK + fetch


# --- a launch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    tile: HopperTile
    clocks: float
    tflops: float

    @property
    def share(self) -> float:
        """Of what the tensor cores could do in these clocks; it does not depend on the clock."""
        return self.tflops / PEAK


def schedule(tile: HopperTile, tokens: int) -> list[int]:
    """The first rows of all works, in the order of Schedule (heads.cuh)."""
    tiles, heads, sharing = -(-tokens // tile.queries), BATCH * HEADS, HEADS // KV_HEADS
    fit = GROUP_BYTES // (4 * tokens * tile.head_dim + 1)  # keys and values of a key head
    group = min(max(1, fit), heads // sharing) * sharing
    return [
        at * tile.queries
        for first in range(0, heads, group)
        for at in reversed(range(tiles))
        for _ in range(min(group, heads - first))
    ]


@cache
def predict(
    tile: HopperTile, tokens: int, causal: bool, plain: bool = True, hidden: bool = False
) -> Prediction:
    """For BATCH x HEADS heads, as the blocks of HopperWork take their works."""
    clocks = [work(tile, tokens, row, causal, plain, hidden) for row in schedule(tile, tokens)]
    blocks = min(MULTIPROCESSORS, len(clocks))
    busy = [0.0] * blocks
    for begin in range(0, len(clocks), blocks):
        back = begin // blocks % 2 == 1
        for place, one in enumerate(clocks[begin : begin + blocks]):
            busy[blocks - 1 - place if back else place] += one
    total = LAUNCH + max(busy)
    flops = 4 * BATCH * HEADS * tokens * tokens * tile.head_dim / (2 if causal else 1)
    return Prediction(tile, total, flops / (total / (GHZ * 1e9)) / 1e12)


# --- the page -------------------------------------------------------------------------------------

# TFLOP/s, causal and full, H200, batch 2, 64 query and 8 key heads of width 128, bf16: NVIDIA/cudnn-frontend,
# benchmark/attention_training/results/llama3.1/h200/llama3.1_20260928_130009.csv.
PUBLISHED = {
    "FlashAttention-4, measured": ((522, 671), (619, 734), (675, 756), (702, 686), (638, 679)),
    "cuDNN 9.27, measured": ((534, 660), (616, 687), (655, 701), (633, 640), (619, 622)),
}


def tile_table() -> str:
    rows = []
    for tile, plain in used():
        rows.append(
            (
                f"{tile.head_dim}, {'plain' if plain else 'bent'}",
                f"{tile.queries} × {tile.keys}",
                f"{tile.shared_bytes / KIB:.4g}",
                "its own" if tile.out_apart else "the queries'",
                f"{tile.keys // 2} + {tile.head_dim // 2} + {tile.keys // 4} = {tile.held}",
                tile.consumer_registers,
            )
        )
    return table(
        "width, score | queries × keys | KiB a block | out's place | registers of S + out + P | of",
        rows,
    )


def step_table() -> str:
    rows = []
    for tile, plain in used():
        hidden, exposed = (step(tile, plain=plain, hidden=way) for way in (True, False))
        rows.append(
            (
                f"{tile.head_dim}, {tile.queries} × {tile.keys}, {'plain' if plain else 'bent'}",
                *(f"{clocks:,.0f}" for clocks in exposed.units.values()),
                f"{exposed.chain:,.0f}",
                " to ".join(dict.fromkeys(f"{one.clocks:,.0f}" for one in (hidden, exposed))),
                f"{tile.step_bytes / exposed.clocks:.0f}",
            )
        )
    head = "step | tensor cores | exp2 | issue | shared | chain | a step | L2, B/clock"
    return table(head, rows)


def predictions(head_dim: int, hidden: bool) -> list[str]:
    cells = []
    for tokens in LENGTHS:
        causal, full = (
            predict(tile_for(head_dim, tokens, way), tokens, way, hidden=hidden).tflops
            for way in (True, False)
        )
        cells.append(f"{causal:.0f} \\| {full:.0f}")
    return cells


def prediction_table() -> str:
    rows = []
    for head_dim in HEAD_DIMS:
        for hidden, name in ((False, "exposed"), (True, "hidden")):
            rows.append((f"{head_dim}, starts {name}", *predictions(head_dim, hidden)))
        if head_dim == 128:
            for name, figures in PUBLISHED.items():
                rows.append((name, *(f"{causal} \\| {full}" for causal, full in figures)))
    heads = " | ".join(f"{tokens // 1024}k" for tokens in LENGTHS)
    return table(f"causal \\| full | {heads}", rows)


def code_table() -> str:
    """Of the bf16 kernels; needs nvcc."""
    import hopper_code

    pairs = list(used())
    codes = hopper_code.compile_all([(tile.name, score_of(plain)) for tile, plain in pairs])
    rows = []
    for (tile, plain), code in zip(pairs, codes, strict=True):
        rows.append(
            (
                f"`{tile.name}`, {score_of(plain)}",
                f"{code.registers} of {tile.consumer_registers}",
                code.instructions["HGMMA"],
                code.loop.others,
                f"{tile.instructions(plain):.0f}",
                code.loop.to_start,
                f"{code.loop.late_exp2} of {code.loop.exp2}",
            )
        )
    head = (
        "kernel | registers | HGMMA | others in the loop | by hand | from turn to product | "
        "exp2 behind the wait for P V"
    )
    return table(head, rows)


FAST = {
    "hopper-tiles": tile_table,
    "hopper-steps": step_table,
    "hopper-predictions": prediction_table,
}
SLOW = {"hopper-code": code_table}
SCRIPT = "attention_model_sm90.py"


def main(arguments: list[str] | None = None) -> int:
    return page_main(arguments, __doc__, PAGE, FAST, SLOW, SCRIPT)


if __name__ == "__main__":
    sys.exit(main())
