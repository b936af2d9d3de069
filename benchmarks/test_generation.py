"""Greedy generation: the time to the first token, the time of each later one, and the share of the roof.

A step of few sequences reads every weight for hardly any computation, so its time is that of the bytes:
the weights once, and the keys and values of the tokens before. The figure that counts is the share that
they take of what the machine reads meanwhile (``harness.Reading``, a peer in each round).

Against transformers' ``generate`` with the same weights (on a GPU also with its static cache, which it
compiles), and our own model without a cache. Before anything is timed, all that each of them draws must
be the likeliest tokens of its weights, but for near ties; so the float models draw the same text.

A prompt has 64 tokens. On a GPU all of GPT-2's sizes, 128 new tokens, batches of 1, 8 and 64. A processor
gets fewer new tokens, and no batch of 64: its prompts alone, 4,096 tokens, would take most of a minute
for each peer.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass

import pytest
import torch

from almostgpt.config import GPTConfig
from almostgpt.model.presets import MODEL_PRESETS

from . import harness
from .generators import Generator, generators, shortfall

PROMPT = 64
ON_CUDA = harness.DEVICE.type == "cuda"
UNCACHED = 8 if ON_CUDA else 2  # tokens drawn without a cache
SHORTFALL = 0.3 if ON_CUDA else 0.01  # what bf16 and fp32 may round away
READING = "reading"
SECONDS = 5 if ON_CUDA else 12


@dataclass(frozen=True)
class Case:
    preset: str
    batch: int
    new: int

    def __str__(self) -> str:
        return f"{self.preset}-batch{self.batch}"


if ON_CUDA:
    SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    CASES = [Case(preset, batch, 128) for preset in SIZES for batch in (1, 8, 64)]
else:
    CASES = [Case("gpt2", 1, 64), Case("gpt2", 8, 32), Case("gpt2-medium", 1, 16)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generation(case: Case, race, report, benchmark, copy_bandwidth):
    config = GPTConfig(**MODEL_PRESETS[case.preset])
    peers, notes = generators(config)
    prompts = torch.randint(
        config.vocab_size, (case.batch, PROMPT), generator=torch.Generator().manual_seed(1)
    ).to(harness.DEVICE)
    news = {name: new_tokens(case, generator) for name, generator in peers.items()}
    for name, generator in list(peers.items()):  # which is the warm-up, too
        try:
            drawn = generator.run(prompts, news[name], lambda: None)
        except Exception as error:  # transformers compiles on a GPU, which may fail in many ways
            if name.startswith("almostgpt"):
                raise
            notes.append(f"no {name}: {harness.first_line(error)}")
            del peers[name]
            continue
        below = shortfall(generator, prompts, drawn)
        assert below <= SHORTFALL, f"{name} drew a token {below:.2g} deviations below the likeliest"

    reading = harness.Reading()
    firsts: dict[str, list[float]] = {name: [] for name in peers}

    def seconds(name: str) -> float:
        if name == READING:
            return reading.seconds()
        timing = peers[name].timed(prompts, news[name])
        firsts[name].append(timing.first)
        return timing.later

    # Hundreds of steps in a round, so a few rounds do.
    contest = {name: name for name in (*peers, READING)}
    result = race(contest, seconds, seconds=SECONDS, fewest=3, warm_up=0)
    rate = reading.bytes / result.median(READING)
    best = next(iter(peers))

    def row(name: str, generator: Generator) -> list[str | int | float]:
        later, moved, share = result.median(name), "-", "-"
        if generator.step_bytes is not None:  # of a step in the middle
            moved = generator.step_bytes(case.batch, PROMPT + news[name] / 2)
            # Within a round, since a rented machine's rate of reading may double within a minute.
            share = 100 * moved / reading.bytes * result.speedup(name, over=READING)
            moved /= 1e6
        return [
            name,
            1e3 * statistics.median(firsts[name]),
            1e3 * later,
            100 * result.spread(name),
            case.batch / later,
            moved,
            share,
            result.speedup(best, over=name),
        ]

    report(
        harness.Table(
            f"generation, {case.preset}, {case.batch} x ({PROMPT} + {case.new}) tokens, greedy; "
            f"reading {rate / 1e9:.1f} GB/s, a copy {copy_bandwidth / 2e9:.1f} one way",
            (
                "",
                "first token ms",
                "later ones ms",
                "± %",
                "later tokens/s",
                "MB a step",
                "% of reading",
                "ours is faster by",
            ),
            [row(name, generator) for name, generator in peers.items()],
            [*notes, f"no cache: only {UNCACHED} tokens, where the text is shortest"],
        )
    )
    benchmark.extra_info["tokens_per_second"] = case.batch / result.median(best)
    benchmark.extra_info["read_bytes_per_second"] = rate
    peers.clear()
    gc.collect()  # several models, before the next case makes larger ones


def new_tokens(case: Case, generator: Generator) -> int:
    return case.new if generator.step_bytes is not None else min(case.new, UNCACHED)
