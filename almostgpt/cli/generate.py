"""``almostgpt generate``: text from a trained model, streamed as it is made."""

from __future__ import annotations

import codecs
import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from almostgpt import checkpoint
from almostgpt.cli.arguments import parse
from almostgpt.config import MAX_SEED
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.inference.generate import stream
from almostgpt.inference.sampling import check_sampling
from almostgpt.model import GPT

DESCRIPTION = """Continues a prompt with a trained model. The text goes to stdout, remarks to stderr.

examples:
  almostgpt generate --checkpoint runs/quickstart --prompt "def "
  almostgpt generate --checkpoint runs/quickstart --prompt "class " --temperature 0
  almostgpt generate --checkpoint runs/quickstart/checkpoints/step-00000500 --num-samples 3 --seed 1
  almostgpt generate --checkpoint runs/quickstart --interactive      (quit ends it, clear forgets)"""


@dataclass(frozen=True)
class GenerateArguments:
    checkpoint: Path  # a run folder (its newest whole checkpoint) or one checkpoint folder
    prompt: str = ""  # text to continue; an empty one starts from a random token
    max_tokens: int = 100  # tokens to add
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = 200  # draw from the k most likely tokens; null: all
    top_p: float | None = 0.9  # draw from the fewest tokens with this probability; null: all
    seed: int | None = None  # repeats the same text; null draws a new one each time
    num_samples: int = 1  # texts to make
    interactive: bool = False  # read prompts in turn; each continues the conversation so far
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps


def run(arguments: list[str]) -> int:
    given = parse(GenerateArguments, arguments, prog="almostgpt generate", description=DESCRIPTION)
    check_sampling(given.temperature, given.top_k, given.top_p, given.seed)
    for terminal in (sys.stdin, sys.stdout):  # a character that it cannot show ends nothing
        if isinstance(terminal, io.TextIOWrapper):
            terminal.reconfigure(errors="replace")
    if given.num_samples < 1 or given.max_tokens < 0:
        raise UserError("--num-samples must be at least 1, --max-tokens at least 0")
    device = pick_device(given.device)
    model, tokenizer = checkpoint.load(given.checkpoint, device)
    if given.interactive:
        _converse(model, tokenizer, given)
        return 0
    ids = tokenizer.encode(given.prompt)
    for number in range(given.num_samples):
        if given.num_samples > 1:
            print(f"--- sample {number + 1}", file=sys.stderr)
        seed = _seed(given.seed, number)
        _write(given.prompt)
        _continue(
            model, tokenizer, ids or _random_start(tokenizer, seed), given, seed, show_start=not ids
        )
        _write("\n")
    return 0


def _converse(model: GPT, tokenizer: Tokenizer, given: GenerateArguments) -> None:
    """Reads a line, answers, and keeps both as the context of the next one."""
    print("a prompt a line; `clear` forgets what was said, `quit` ends", file=sys.stderr)
    history: list[int] = []
    turn = 0
    prompt = given.prompt
    while True:
        if not prompt:
            try:
                print("> ", end="", file=sys.stderr, flush=True)
                prompt = input()
            except EOFError:
                return
        if prompt.strip() == "quit":
            return
        if prompt.strip() == "clear":
            history = []
        else:
            try:
                new = tokenizer.encode(prompt)
            except (
                UserError
            ) as error:  # a character the model has never seen ends the turn, not the program
                print(f"error: {error}", file=sys.stderr)
            else:
                seed = _seed(given.seed, turn)
                history = history + new or _random_start(tokenizer, seed)
                _write(prompt)
                history += _continue(model, tokenizer, history, given, seed)
                _write("\n")
                turn += 1
        prompt = ""


def _continue(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    given: GenerateArguments,
    seed: int,
    show_start: bool = False,
) -> list[int]:
    """Writes the continuation of ``ids`` as it is made; returns the new ids."""
    started = time.perf_counter()
    new: list[int] = []

    def tokens() -> Iterator[int]:
        yield from ids if show_start else ()
        start = torch.tensor([ids], device=model.token_embedding.weight.device)
        for drawn in stream(
            model,
            start,
            given.max_tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            seed=seed,
            vocab_size=tokenizer.vocab_size,
        ):
            new.append(int(drawn))
            yield new[-1]

    for text in decode_stream(tokenizer, tokens()):
        _write(text)
    seconds = time.perf_counter() - started
    if new:
        sys.stdout.flush()
        print(
            f"\n[{len(new)} tokens, {len(new) / seconds:.1f} tokens/s, seed {seed}]",
            file=sys.stderr,
        )
    return new


def decode_stream(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text as soon as it is certain: a character whose bytes span tokens comes out whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def _random_start(tokenizer: Tokenizer, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tokenizer.vocab_size, (1,), generator=generator).tolist()


def _seed(seed: int | None, number: int) -> int:
    """The seed of the sample ``number``: each sample differs, and each can be repeated."""
    return torch.seed() % 2**31 if seed is None else (seed + number) % (MAX_SEED + 1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
