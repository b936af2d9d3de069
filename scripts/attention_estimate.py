#!/usr/bin/env python3
"""What the attention kernels cost by counting, and the tables of docs/attention.md that say so.

The tiles are those of csrc/attention/tiles.h, which g++ compiles and a small program prints. From
them follow the instructions of a step, by hand (``sections``): once as they stand in the code, which
nvcc and nvdisasm must find again (tests/build/test_attention_estimate.py), and once as they run. A
step is a tile of queries against a tile of keys, in all the warps of a block. Its time is at least
that of the busiest of three units, each at its full rate on a card (``Card``):

  tensor cores    HMMA m16n8k16: 2048 multiply-adds of a warp
  shared memory   128 bytes a clock; ldmatrix.x4 moves 512
  exp2            16 a clock

What comes of that is a ceiling, for long sequences without a mask. It counts no latency, no issue
slot, no other arithmetic, no start or end of a block. Nothing in it is measured.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import check_kernels
from attention_page import CSRC, PAGE, page_main, run_with_tiles, table

KIB = 1024

HEAD_DIMS = (64, 128, 256)
# Shared memory of a block and of a multiprocessor, in KiB, and the cards that have it (CUDA
# programming guide, technical specifications per compute capability). The system keeps 1 KiB of
# each block.
CLASSES = {99: (100, "8.6, 8.9, 12.0"), 163: (164, "8.0"), 227: (228, "9.0, 10.0")}
REGISTERS = 65536  # of a multiprocessor
HMMA_FMAS = 16 * 8 * 16
SHARED_BYTES_A_CLOCK = 128
EXP2_A_CLOCK = 16


@dataclass(frozen=True)
class Card:
    """What a card does at its full rate.

    Attributes:
        shared: KiB of shared memory that a block may have.
        fmas: dense bf16 multiply-adds a clock of a multiprocessor's tensor cores, by mma.sync.
        clock: in GHz.
        dram: bytes a second.
    """

    name: str
    shared: int
    multiprocessors: int
    clock: float
    fmas: float
    dram: float


MMA_SYNC_ON_HOPPER = 0.62  # of the rate of wgmma
CARDS = (
    Card("A100", 163, 108, 1.41, 1024, 2.0e12),
    Card("H200", 227, 132, 1.755, 2048 * MMA_SYNC_ON_HOPPER, 4.8e12),
    Card("L4", 99, 58, 2.04, 512, 0.3e12),
)


# --- the tiles -----------------------------------------------------------------------------------

PRINTER = """
#include <cstdio>
#include "attention/tiles.h"
using namespace almostgpt;

// In the order of the fields of Tile, below.
template <class Tile>
int print(const char* kernel, int shared, Tile, int stages, int depth_parts, int columns, int pass,
          int dq_columns) {
  return std::printf("%s %d  %d %d %d  %d %d %d %d  %d %d %d  %d %d\\n", kernel, shared,
                     Tile::head_dim, Tile::queries, Tile::keys, stages, Tile::warps, depth_parts,
                     Tile::row_tiles, columns, pass, dq_columns, Tile::blocks,
                     static_cast<int>(Tile::shared_bytes));
}
template <int head_dim> void all() {
  const int sizes[] = {99, 163, 227};
  for (int shared : sizes) {
    with_forward_tile<head_dim>(shared * kKiB, [&](auto tile) {
      using Tile = decltype(tile);
      return print("forward", shared, tile, 2, 1, Tile::head_dim, Tile::keys, 0);
    });
    with_backward_tile<head_dim>(shared * kKiB, [&](auto tile) {
      using Tile = decltype(tile);
      return print("backward", shared, tile, Tile::stages, Tile::depth_parts, Tile::columns,
                   Tile::pass, Tile::dq_columns);
    });
  }
}
int main() { all<64>(), all<128>(), all<256>(); }
"""


@dataclass(frozen=True)
class Tile:
    """A tile of tiles.h, under the names that it has there (``pass_`` is a forward tile's keys)."""

    kernel: str  # "forward" or "backward"
    head_dim: int
    queries: int
    keys: int
    stages: int
    warps: int
    depth_parts: int
    row_tiles: int
    columns: int
    pass_: int
    dq_columns: int
    blocks: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def name(self) -> str:
        """As scripts/check_kernels.py prints it."""
        if self.kernel == "forward":
            return f"ForwardTile<{self.head_dim}, {self.queries}, {self.keys}, {self.warps}>"
        return (
            f"BackwardTile<{self.head_dim}, {self.keys}, {self.queries}, {self.stages}, "
            f"{self.warps}, {self.depth_parts}>"
        )


@cache
def tiles() -> dict[tuple[str, int, int], Tile]:
    """(kernel, head_dim, KiB of shared memory a block) -> the tile that tiles.h gives it."""
    found = {}
    for line in run_with_tiles(PRINTER).splitlines():
        kernel, shared, *numbers = line.split()
        tile = Tile(kernel, *map(int, numbers))
        found[kernel, tile.head_dim, int(shared)] = tile
    return found


def instantiations() -> list[str]:
    """Every main kernel that is compiled, as ``with_types`` of heads.cuh says."""
    return [
        f"attention_{tile.kernel}_kernel<{dtype}, {tile.name}, {score}>"
        for tile in dict.fromkeys(tiles().values())
        for dtype in ("bf16", "fp16")
        for score in ("PlainScore", "BentScore")
        if tile.head_dim < 256 or score == "BentScore"
    ]


# --- counting ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Code that stands once and runs so many times a step, in a warp."""

    runs: int
    hmma: int
    ldsm: int


def sections(tile: Tile) -> list[Section]:
    """The matrix products of a step, as the UNROLL_BY(1) loops cut them."""
    rows, panels = tile.row_tiles, tile.head_dim // 64
    four = 4  # steps of 16 columns in a panel of 64
    if tile.kernel == "forward":
        return [
            # multiply: S = Q K^T; of each 16 columns the rows of Q, and of K two 8-row tiles at a time.
            Section(panels, four * rows * tile.keys // 8, four * (rows + tile.keys // 16)),
            # multiply_rows: O += P V, 16 keys at a time
            Section(
                1,
                tile.keys // 16 * rows * tile.head_dim // 8,
                tile.keys // 16 * tile.head_dim // 16,
            ),
        ]
    passes = tile.queries // tile.pass_
    return [
        # multiply, twice: S^T = K Q^T and dP^T = V dO^T. Two loops over panels, each in each pass.
        Section(
            passes * panels, 2 * four * rows * tile.pass_ // 8, 2 * four * (rows + tile.pass_ // 16)
        ),
        # multiply_rows, twice: dV += P^T dO and dK += dS^T Q, 16 queries at a time
        Section(
            passes,
            2 * (tile.pass_ // 16) * rows * tile.columns // 8,
            2 * (tile.pass_ // 16) * tile.columns // 16,
        ),
        # add_dq: 32 rows x 32 columns, 16 keys at a time: 2 + 2 fragments, 2 x 4 products
        Section(tile.dq_columns // 32, tile.keys // 16 * 8, tile.keys // 16 * 4),
    ]


def hand_count(tile: Tile) -> dict[str, int]:
    """How often HMMA, LDSM and LDGSTS stand in a main kernel's machine code."""
    step = tile.threads // (tile.head_dim // 8)  # rows that a copy_async has at once
    if tile.kernel == "forward":
        # The queries; keys and values before the loop, and in it.
        copies = tile.queries // step + 2 * (2 * tile.keys // step)
    else:
        # Keys and values; before the loop, and in it, queries, dO, and lse2 and delta together.
        copies = 2 * tile.keys // step + 2 * (2 * tile.queries // step + 1)
    return {
        "HMMA": sum(section.hmma for section in sections(tile)),
        "LDSM": sum(section.ldsm for section in sections(tile)),
        "LDGSTS": copies,
    }


@dataclass(frozen=True)
class Step:
    """What a step takes of a multiprocessor; clocks where no other name is given.

    Attributes:
        flops: that the caller counts: 4 (forward) or 10 (backward) for each query, key and column.
        read: bytes from global memory.
        summed: bytes of dQ that are added in global memory.
    """

    flops: int
    hmma: int
    ldsm: int
    shared: float
    exp2: float
    read: int
    summed: int

    def tensor(self, card: Card) -> float:
        return self.hmma * HMMA_FMAS / card.fmas


def step_of(tile: Tile) -> Step:
    q, k, d = tile.queries, tile.keys, tile.head_dim
    hmma, ldsm = (
        tile.warps * sum(section.runs * getattr(section, name) for section in sections(tile))
        for name in ("hmma", "ldsm")
    )
    if tile.kernel == "forward":
        read, summed, flops = 2 * k * d * 2, 0, 4 * q * k * d
        others = tile.warps * 2  # what the warp's first and last row see
        scores = q * k
    else:
        read, summed, flops = 2 * q * d * 2 + 2 * q * 4, q * d * 4, 10 * q * k * d
        passes = q // tile.pass_
        # Each warp reads lse2 and delta of 8 queries at a time, and two ranges a pass; dS is written
        # once, 8 keys x 8 queries a store.
        others = tile.warps * (2 * q // 8 + 2 * passes) + k // 8 * (q // 8)
        scores = q * k * tile.depth_parts
    shared = 4 * ldsm + others + read / SHARED_BYTES_A_CLOCK
    return Step(flops, hmma, ldsm, shared, scores / EXP2_A_CLOCK, read, summed)


@dataclass(frozen=True)
class Ceiling:
    bound: str  # the unit that is busiest
    clocks: float  # of a step
    tflops: float
    read: float  # bytes a clock and multiprocessor from global memory at that speed


def ceiling(tile: Tile, card: Card) -> Ceiling:
    step = step_of(tile)
    units = {"tensor cores": step.tensor(card), "shared memory": step.shared, "exp2": step.exp2}
    bound = max(units, key=units.__getitem__)
    clocks = units[bound]
    rate = card.multiprocessors * card.clock * 1e9
    return Ceiling(bound, clocks, step.flops / clocks * rate / 1e12, step.read / clocks)


def resident(tile: Tile, shared: int, registers: int = 255) -> int:
    """Blocks of a main kernel on a multiprocessor whose blocks may have so many KiB."""
    by_registers = REGISTERS // (tile.threads * (-(-registers // 8) * 8))
    whole, _ = CLASSES[shared]
    return min(by_registers, whole * KIB // (tile.shared_bytes + KIB))


# --- machine code --------------------------------------------------------------------------------


@cache
def compiled(archs: tuple[str, ...] = ("80", "90a")) -> list:
    """A Report of check_kernels.py for each file of main kernels and architecture."""
    tools = check_kernels.find_tools("nvcc")
    if isinstance(tools, str):
        raise FileNotFoundError(tools)
    sources = [
        CSRC / "attention" / f"{kernel}_sm80_d{head_dim}.cu"
        for kernel in ("forward", "backward")
        for head_dim in HEAD_DIMS
    ]
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(
                lambda work: check_kernels.compile_one(tools, *work),
                [(source, arch) for source in sources for arch in archs],
            )
        )


# --- the page ------------------------------------------------------------------------------------


def used() -> dict[Tile, list[int]]:
    """Each tile, and the shared memory of the cards that use it."""
    found: dict[Tile, list[int]] = {}
    order = sorted(tiles().items(), key=lambda item: (item[0][0] == "backward", item[0][1:]))
    for (_, _, shared), tile in order:
        found.setdefault(tile, []).append(shared)
    return found


def tile_table() -> str:
    rows = []
    for tile, classes in used().items():
        blocks = [resident(tile, shared) for shared in classes]
        where = "all" if len(classes) == len(CLASSES) else "; ".join(CLASSES[c][1] for c in classes)
        rows.append(
            (
                f"{tile.kernel} {tile.head_dim}",
                where,
                f"{tile.queries} × {tile.keys}",
                tile.stages,
                f"{tile.warps} of {16 * tile.row_tiles}",
                f"{tile.shared_bytes / KIB:.4g}",
                "; ".join(map(str, dict.fromkeys(blocks))),
            )
        )
    return table(
        "kernel, width | cards | queries × keys | stages | warps of rows | KiB a block | blocks resident",
        rows,
    )


def step_table() -> str:
    rows = []
    for tile in used():
        step = step_of(tile)
        rows.append(
            (
                f"{tile.kernel} {tile.head_dim}, {tile.queries} × {tile.keys}",
                f"{step.hmma:,}",
                f"{step.ldsm:,}",
                *(f"{step.tensor(card):,.0f}" for card in CARDS),
                f"{step.shared:,.0f}",
                f"{step.exp2:,.0f}",
                f"{step.read / KIB:.4g}" + (f" + {step.summed / KIB:.4g}" if step.summed else ""),
            )
        )
    heads = " | ".join(f"tensor, {card.name}" for card in CARDS)
    rows = list(dict.fromkeys(rows))  # the number of stages makes no difference
    return table(f"step | HMMA | LDSM | {heads} | shared | exp2 | KiB read + summed", rows)


def ceiling_table() -> str:
    rows = []
    for kernel in ("forward", "backward"):
        for head_dim in HEAD_DIMS:
            cells: list[str] = []
            for card in CARDS:
                found = ceiling(tiles()[kernel, head_dim, card.shared], card)
                cells += [f"{found.tflops:.0f}, {found.bound}", f"{found.read:.1f}"]
            rows.append((f"{kernel} {head_dim}", *cells))
    heads = " | ".join(f"{card.name}, TFLOP/s | B/clock" for card in CARDS)
    return table(f"kernel, width | {heads}", rows)


def constants_table() -> str:
    rows = []
    for card in CARDS:
        rate = card.multiprocessors * card.clock * 1e9
        rows.append(
            (
                card.name,
                card.multiprocessors,
                card.clock,
                f"{card.fmas:.0f}",
                f"{2 * card.fmas * rate / 1e12:.0f}",
                f"{card.dram / rate:.1f}",
            )
        )
    head = "card | multiprocessors | GHz | FMA a clock by mma.sync | TFLOP/s by mma.sync | DRAM, B/clock"
    return table(head, rows)


def code_table() -> str:
    """Registers and instructions of the bf16 kernels; needs nvcc."""
    kernels = [kernel for report in compiled() for kernel in report.kernels]
    rows = []
    for tile in used():
        of_tile = [k for k in kernels if f"<bf16, {tile.name}, " in k.name]
        registers = max(-(-k.registers // 8) * 8 for k in of_tile)
        counts = [max(k.instructions[name] for k in of_tile) for name in hand_count(tile)]
        rows.append((f"`{tile.name}`", registers, *counts))
    return table("tile | registers | HMMA | LDSM | LDGSTS", rows)


FAST = {
    "tiles": tile_table,
    "steps": step_table,
    "cards": constants_table,
    "ceilings": ceiling_table,
}
SLOW = {"code": code_table}
SCRIPT = "attention_estimate.py"


def main(arguments: list[str] | None = None) -> int:
    return page_main(arguments, __doc__, PAGE, FAST, SLOW, SCRIPT)


if __name__ == "__main__":
    sys.exit(main())
