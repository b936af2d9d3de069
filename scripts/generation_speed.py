#!/usr/bin/env python3
"""How fast a model generates with so many tokens before: ours in float and int8, with a cache and without,
and transformers' GPT-2 with the same weights, where it has such a model and is installed.

At each length the prompt takes all but the last few tokens, which are drawn greedily one by one. The time
of a token is the mean of these without the first one, which waits for the prompt; peers take turns, and the
median of the rounds counts. Weights are random: time does not depend on them. What is drawn is checked
first, at the shortest length.

Writes the chart, and beside it a .json with all figures, the machine, the date and the command. The last
line on stdout is the same JSON object. The defaults take 2 minutes on 2 idle cores.

examples:
  python scripts/generation_speed.py --out docs/images/generation_speed.svg
  python scripts/generation_speed.py --preset gpt2-medium --lengths 64 512 --new 8 --threads 4
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from almostgpt.config import GPTConfig, not_one_of
from almostgpt.errors import UserError
from almostgpt.model.presets import MODEL_PRESETS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LENGTHS = (64, 128, 256, 512, 1024)
UNCACHED = 2  # tokens drawn without a cache: each costs as much as the prompt
SHORTFALL = {"cpu": 0.01, "cuda": 0.3}  # as in benchmarks/test_generation.py
FORMATS = (".svg", ".png", ".pdf")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2", help="tiny … gpt2-xl; default gpt2")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help=f"in tokens; default {' '.join(map(str, LENGTHS))}"
    )
    parser.add_argument("--new", type=int, default=16, help="tokens timed at a length; default 16")
    parser.add_argument("--batch", type=int, default=1, help="texts side by side; default 1")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, help="of the processor; default: PyTorch's")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the prompts")
    parser.add_argument("--out", type=Path, help="draw the chart here (.svg, .png or .pdf)")
    given = parser.parse_args(arguments)
    try:
        return run(
            given, " ".join(["python scripts/generation_speed.py", *(arguments or sys.argv[1:])])
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace, command: str) -> int:
    config, lengths = checked(given)
    harness, generators = benchmarks("harness"), benchmarks("generators")
    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads or threads)
    try:
        peers, notes = generators.generators(config, given.seed)
        reading = harness.read_bandwidth()
        check(generators, peers, prompts(config, given, lengths[0]), given.new)
        races = [Race(harness, peers, prompts(config, given, n), given.new) for n in lengths]
        for number in range(given.rounds):
            for race in races:
                race.round()
            print(f"round {number + 1}/{given.rounds}", file=sys.stderr, flush=True)
        result = {
            **harness.machine(),
            "command": command,
            "preset": given.preset,
            "batch": given.batch,
            "read_bytes_per_second": round(max(reading, harness.read_bandwidth())),
            "lengths": lengths,
            "peers": {name: figures(name, races, given.batch) for name in peers},
            "notes": notes,
        }
    finally:
        torch.set_num_threads(threads)
    if given.out is not None:
        draw(result, given.out)
        given.out.with_suffix(".json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )
    print(json.dumps(result))
    return 0


def checked(given: argparse.Namespace) -> tuple[GPTConfig, list[int]]:
    """The model's configuration, and lengths from the shortest on; ``UserError`` for what cannot be."""
    if given.preset not in MODEL_PRESETS:
        raise UserError(f"--preset is {not_one_of(given.preset, MODEL_PRESETS)}")
    config = GPTConfig(**MODEL_PRESETS[given.preset])
    for name, least in (("new", 2), ("batch", 1), ("rounds", 1), ("threads", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}, but must be at least {least}")
    if given.out is not None and given.out.suffix not in FORMATS:
        raise UserError(f"--out is {given.out}, but must end in {', '.join(FORMATS)}")
    lengths = given.lengths or [n for n in LENGTHS if given.new < n <= config.block_size]
    lengths = sorted(set(lengths))
    if not lengths or lengths[0] <= given.new or lengths[-1] > config.block_size:
        raise UserError(
            f"--lengths are {' '.join(map(str, lengths)) or 'none'}, but must be above --new, "
            f"{given.new}, and at most {config.block_size}, the model's block_size"
        )
    return config, lengths


def benchmarks(name: str) -> ModuleType:
    """A file of benchmarks/, as a part of its package.

    The folder above it does not come into ``sys.path``: transformers would take kernels/ there for the
    package of that name.
    """
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "benchmarks", BENCHMARKS / "__init__.py", submodule_search_locations=[str(BENCHMARKS)]
        )
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"benchmarks.{name}")


def prompts(config: GPTConfig, given: argparse.Namespace, length: int) -> Tensor:
    """(batch, length − new) random ids."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(given.seed)
    shape = (given.batch, length - given.new)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def check(generators: ModuleType, peers: dict, text: Tensor, new: int) -> None:
    """Whether every peer draws the likeliest tokens of its weights; and a warm-up."""
    for name, generator in peers.items():
        drawn = generator.run(text, tokens_of(generator, new), lambda: None)
        below = generators.shortfall(generator, text, drawn)
        if below > SHORTFALL[text.device.type]:
            raise UserError(
                f"{name} drew a token whose logit lies {below:.2g} deviations below the largest: it "
                "computes something else, so its time means nothing"
            )


def tokens_of(generator, new: int) -> int:
    return new if generator.step_bytes is not None else UNCACHED


class Race:
    """Peers that continue the same text in turns, after prompts (B, T).

    Rounds of all lengths alternate, so a machine that is busy for a while spoils a round of each and no
    length as a whole.
    """

    def __init__(self, harness: ModuleType, peers: dict, text: Tensor, new: int):
        self.peers, self.text, self.new = peers, text, new
        self.firsts: dict[str, list[float]] = {name: [] for name in peers}
        self._contest = harness.Race({name: name for name in peers}, self._later)
        self.round, self.later = self._contest.round, self._contest.median

    def _later(self, name: str) -> float:
        timing = self.peers[name].timed(self.text, tokens_of(self.peers[name], self.new))
        self.firsts[name].append(timing.first)
        return timing.later

    def first(self, name: str) -> float:
        return statistics.median(self.firsts[name])


def figures(name: str, races: list[Race], batch: int) -> dict[str, list[float]]:
    """Of a peer, at each length: medians of the rounds."""
    return {
        "ms_a_token": [round(1e3 * race.later(name), 2) for race in races],
        "tokens_per_second": [round(batch / race.later(name), 2) for race in races],
        "first_token_ms": [round(1e3 * race.first(name), 1) for race in races],
    }


def draw(result: dict, path: Path) -> None:
    """Tokens a second against the length, on logarithmic scales."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, found in result["peers"].items():
        axes.plot(
            result["lengths"], found["tokens_per_second"], marker="o", markersize=3, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xticks(result["lengths"])
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("tokens a second")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "almostgpt"}):  # text as text
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(main())
