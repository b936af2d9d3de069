"""A tile of Hopper's attention forward, as in tiles.h, and what it takes of each unit; a module.

The model (attention_model_sm90.py) makes steps of it, and attention_tiles.py looks for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from attention_estimate import EXP2_A_CLOCK, KIB, SHARED_BYTES_A_CLOCK
from attention_page import run_with_tiles

FMAS_A_CLOCK = 2048  # dense 16-bit multiply-adds of wgmma, a multiprocessor's
MOST_SHARED = 227 * KIB
LENGTHS = (2048, 4096, 8192, 16384, 32768)  # of the page's predictions
SHORT = 1024  # at width 64 it has a tile of its own


@dataclass(frozen=True)
class HopperTile:
    """HopperForwardTile of tiles.h, which the tests hold it against."""

    head_dim: int
    consumers: int
    keys: int
    stages: int = 2

    @property
    def name(self) -> str:
        return f"HopperForwardTile<{self.head_dim}, {self.consumers}, {self.keys}, {self.stages}>"

    @property
    def queries(self) -> int:
        return 64 * self.consumers

    @property
    def take_turns(self) -> bool:
        return self.head_dim <= 128

    @property
    def consumer_registers(self) -> int:
        return 240 if self.consumers == 2 else 160

    @property
    def query_bytes(self) -> int:
        return self.queries * self.head_dim * 2

    @property
    def least_bytes(self) -> int:
        barriers = 16 * (1 + 2 * self.stages) + 16
        return self.query_bytes + 4 * self.stages * self.keys * self.head_dim + barriers

    @property
    def out_apart(self) -> bool:
        return self.least_bytes + self.query_bytes <= MOST_SHARED

    @property
    def shared_bytes(self) -> int:
        return self.least_bytes + (self.query_bytes if self.out_apart else 0)

    # A thread's, in registers of 32 bits: scores, out, and P in pairs.
    @property
    def held(self) -> int:
        return self.keys // 2 + self.head_dim // 2 + self.keys // 4

    # --- clocks of one warpgroup in a step

    @property
    def product(self) -> float:
        """Q K^T, and P V the same."""
        return 64 * self.keys * self.head_dim / FMAS_A_CLOCK

    def exp2(self, plain: bool = True) -> float:
        """A softcap is two instructions of that unit more for each score."""
        return (1 if plain else 3) * 64 * self.keys / EXP2_A_CLOCK

    def instructions(self, plain: bool) -> float:
        """Of a warp beside its products, which is clocks of its scheduler. By hand; nvcc's are near.

        Of each of a thread's keys / 2 scores: max, multiply-add, exp2, sum, half a rounding to 16
        bits; and 8 for a softcap. Of each product about 6 for its operands' address.
        """
        score = 4.5 if plain else 12.5
        return score * self.keys / 2 + 6 * self.keys / 16 + 7 * self.head_dim / 16 + 60

    @property
    def mask_instructions(self) -> float:
        return 2 * self.keys / 2  # a comparison and a choice

    @property
    def shared(self) -> float:
        """What its products read there: of S both operands, of O += P V only V, 16 deep each."""
        scores = self.head_dim / 16 * (64 + self.keys) * 16 * 2
        out = self.keys / 16 * self.head_dim * 16 * 2
        return (scores + out) / SHARED_BYTES_A_CLOCK

    @property
    def step_bytes(self) -> int:
        """Keys and values of a step, which TMA brings."""
        return 2 * self.keys * self.head_dim * 2

    def softmax(self, plain: bool, masked: bool) -> float:
        """From the products to their exponentials, of a warpgroup that has the units for itself.

        The first half of its rows finds its tops, at two clocks each, before the first exponential.
        """
        return self.keys / 2 + self.exp2(plain) + (self.mask_instructions if masked else 0)

    @property
    def rounding(self) -> float:
        return self.keys / 2  # keys / 4 pairs, at two clocks each

    def hand_count(self) -> dict[str, int]:
        """What stands in the kernel's machine code."""
        panels = self.head_dim // 64
        return {
            # Q K^T of the first tile and in the loop; P V there and of the last tile.
            "HGMMA": 2 * (self.head_dim // 16) + 2 * (self.keys // 16),
            # Keys; values, in the loop of the producer and after it; each warpgroup's queries.
            "UTMALDG": panels * (1 + 2 + self.consumers),
            "UTMASTG": panels,
            "USETMAXREG": 2,
        }


# --- the tiles of tiles.h -------------------------------------------------------------------------

PRINTER = """
#include <cstdio>
#include "attention/tiles.h"
using namespace almostgpt;

template <int head_dim, bool plain> void all() {
  const int lengths[] = {LENGTHS};
  for (int all_keys = 0; all_keys < 2; ++all_keys)
    for (int tokens : lengths)
      with_hopper_forward_tile<head_dim, plain>(HopperCall{tokens, tokens, 1, all_keys != 0}, [&](auto tile) {
        using Tile = decltype(tile);
        return std::printf("%d %d %d %d  %d %d %d  %d %d %d %d %d\\n", head_dim, plain, all_keys, tokens,
                           Tile::consumers, Tile::keys, Tile::stages, Tile::queries, Tile::take_turns,
                           Tile::consumer_registers, static_cast<int>(Tile::shared_bytes), Tile::out_apart);
      });
}
int main() {
  all<64, true>(), all<64, false>(), all<128, true>(), all<128, false>(), all<256, true>(), all<256, false>();
}
"""


@dataclass(frozen=True)
class Choice:
    """For whom tiles.h has a tile."""

    head_dim: int
    plain: bool
    all_keys: bool
    tokens: int


@cache
def chosen() -> dict[Choice, tuple[HopperTile, tuple[int, ...]]]:
    """The tile that tiles.h gives, and how it describes itself, from ``queries`` on (PRINTER)."""
    found = {}
    lengths = ", ".join(map(str, (SHORT, *LENGTHS)))
    for line in run_with_tiles(PRINTER.replace("LENGTHS", lengths)).splitlines():
        head_dim, plain, all_keys, tokens, consumers, keys, stages, *rest = map(int, line.split())
        choice = Choice(head_dim, bool(plain), bool(all_keys), tokens)
        found[choice] = HopperTile(head_dim, consumers, keys, stages), tuple(rest)
    return found


def tile_for(head_dim: int, tokens: int, causal: bool, plain: bool = True) -> HopperTile:
    return chosen()[Choice(head_dim, plain, not causal, tokens)][0]


def used() -> dict[tuple[HopperTile, bool], None]:
    """The tiles that are compiled, each with its score: plain or bent."""
    return dict.fromkeys((tile, choice.plain) for choice, (tile, _) in chosen().items())


def score_of(plain: bool) -> str:
    return "PlainScore" if plain else "BentScore"
