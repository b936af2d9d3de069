#!/usr/bin/env python3
"""Measure launch settings of the Triton kernels on this GPU, and keep the fastest.

Every candidate is timed on every workload of a kernel: medians of CUDA-event timings, with nothing
of the inputs in the L2 cache. The candidate whose times are the least in geometric mean is written
to kernels/triton_settings.json under the compute capability of the card; the settings of other
cards and other kernels stay as they are.

examples:
  python scripts/tune_triton.py                                   all kernels, a few minutes
  python scripts/tune_triton.py --kernel activation --dry-run     print the table, write nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from almostgpt import kernels
from almostgpt.kernels import triton_ops
from almostgpt.kernels.check import cold_seconds

TABLE = Path(__file__).resolve().parents[1] / "kernels" / "triton_settings.json"

Settings = dict[str, int]
Work = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """What is tried and timed of one kernel.

    Attributes:
        candidates: settings to try; the default of the table is one of them.
        works: gives (label, work) one after the other, so that only one holds memory at a time.
    """

    candidates: list[Settings]
    works: Callable[[], Iterator[tuple[str, Work]]]


# ---------------------------------------------------------------- workloads


def _blocks(sizes: tuple[int, ...], warps: tuple[int, ...]) -> list[Settings]:
    """Every pair that gives a thread 4 to 64 elements."""
    return [
        {"BLOCK": size, "num_warps": count}
        for size in sizes
        for count in warps
        if 4 <= size // (32 * count) <= 64
    ]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _directions(label: str, function: Callable, x: Tensor) -> Iterator[tuple[str, Work]]:
    """The forward and the backward pass of a function of one tensor."""
    x.requires_grad_()
    y = function(x)
    dy = torch.randn_like(y)
    yield f"{label} forward", torch.no_grad()(lambda: function(x))
    yield f"{label} backward", lambda: torch.autograd.grad(y, x, dy, retain_graph=True)


def _activation() -> Iterator[tuple[str, Work]]:
    for rows, hidden in ((8192, 11008), (32768, 2048)):
        yield from _directions(f"swiglu {rows}x{hidden}", kernels.swiglu, _random(rows, 2 * hidden))
    yield from _directions("gelu 32768x3072", kernels.gelu, _random(32768, 3072))


def _cross_entropy() -> Iterator[tuple[str, Work]]:
    for rows, vocab in ((8192, 50304), (4096, 128256)):
        targets = torch.randint(vocab, (rows,), device="cuda")

        def loss(logits: Tensor, targets: Tensor = targets) -> Tensor:
            return kernels.cross_entropy(logits, targets)

        yield from _directions(f"cross_entropy {rows}x{vocab}", loss, _random(rows, vocab))


def _rope() -> Iterator[tuple[str, Work]]:
    for heads, width in ((32, 128), (12, 64)):
        cos, sin = (torch.rand(2048, width // 2, device="cuda") for _ in range(2))

        def rotate(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            return kernels.rope(x, cos, sin)

        x = _random(8, 2048, heads, width)
        yield from _directions(f"rope 8x2048x{heads}x{width}", rotate, x)


WORKLOADS: dict[str, Workload] = {
    "activation": Workload(_blocks((512, 1024, 2048, 4096), (2, 4, 8, 16)), _activation),
    "cross_entropy": Workload(_blocks((1024, 2048, 4096, 8192), (4, 8, 16)), _cross_entropy),
    "rope": Workload(_blocks((256, 512, 1024, 2048), (2, 4, 8)), _rope),
}


# ---------------------------------------------------------------- measuring, choosing, writing


def measure(
    kernel: str, card: str, timer: Callable[[Work], float] = cold_seconds
) -> dict[str, list[float]]:
    """Seconds of each work of a kernel, by its label: one number a candidate."""
    workload = WORKLOADS[kernel]

    def timed(work: Work, candidate: Settings) -> float:
        with patch.dict(triton_ops._table()[kernel], {card: candidate}):
            return timer(work)

    return {
        label: [timed(work, candidate) for candidate in workload.candidates]
        for label, work in workload.works()
    }


def scores(measured: dict[str, list[float]]) -> list[float]:
    """Of each candidate how many times as long as the best of each work it takes, in the mean."""
    slowdowns = [[each / min(seconds) for each in seconds] for seconds in measured.values()]
    return [statistics.geometric_mean(of_one) for of_one in zip(*slowdowns, strict=True)]


def show(kernel: str, measured: dict[str, list[float]]) -> None:
    """A line a candidate, the best first; times in µs."""
    labels = list(measured)
    print(f"{kernel}: us of " + ", ".join(labels))
    rows = zip(scores(measured), WORKLOADS[kernel].candidates, *measured.values(), strict=True)
    for score, candidate, *seconds in sorted(rows, key=lambda row: row[0]):
        settings = " ".join(f"{name}={value}" for name, value in candidate.items())
        times = "".join(f"{1e6 * each:10.1f}" for each in seconds)
        print(f"  {settings:32}{score:6.3f} times the best{times}")


def write(table: dict[str, dict[str, Settings]], path: Path) -> None:
    """A line a card, so that a change is a change of one line."""
    blocks = []
    for kernel, cards in table.items():
        lines = [f'    "{card}": {json.dumps(settings)}' for card, settings in cards.items()]
        blocks.append(f'  "{kernel}": {{\n' + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def tune(
    names: list[str], card: str, path: Path, *, dry_run: bool, timer=cold_seconds
) -> dict[str, Settings]:
    """Measure kernels, show the outcome and (but for a dry run) write the best settings."""
    best = {}
    for name in names:
        measured = measure(name, card, timer)
        show(name, measured)
        of_candidates = scores(measured)
        best[name] = WORKLOADS[name].candidates[of_candidates.index(min(of_candidates))]
    if not dry_run:
        table = json.loads(path.read_text(encoding="utf-8"))
        for name, settings in best.items():
            table[name][card] = settings
        write(table, path)
    return best


def _no_gpu() -> str | None:
    if triton_ops.INTERPRETED:
        return "TRITON_INTERPRET is set"
    return triton_ops.MISSING or (None if torch.cuda.is_available() else "torch finds no GPU")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kernel",
        action="append",
        choices=list(WORKLOADS),
        help="tune only this one; may be given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and print; write nothing")
    options = parser.parse_args(arguments)
    if why := _no_gpu():
        print(f"nothing to tune on: {why}", file=sys.stderr)
        return 2
    card = "{}.{}".format(*torch.cuda.get_device_capability())
    with kernels.use_backend("triton"):
        tune(options.kernel or list(WORKLOADS), card, TABLE, dry_run=options.dry_run)
    print("nothing written" if options.dry_run else f"written to {TABLE}, under {card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
