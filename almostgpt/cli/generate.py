"""``almostgpt generate``: text from a trained model, streamed as it is made."""

from __future__ import annotations

import codecs
import io
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from almostgpt import checkpoint
from almostgpt.cli.arguments import parse
from almostgpt.config import MAX_SEED
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.cache_options import check_options
from almostgpt.inference.generate import feed, stream
from almostgpt.inference.sampling import check_sampling
from almostgpt.model import GPT

DESCRIPTION = """Continues a prompt with a trained model. The text goes to stdout, remarks to stderr.

examples:
  almostgpt generate --checkpoint runs/quickstart --prompt "def "
  almostgpt generate --checkpoint runs/quickstart --prompt "class " --temperature 0
  almostgpt generate --checkpoint runs/quickstart/checkpoints/step-00000500 --num-samples 3 --seed 1
  almostgpt generate --checkpoint runs/quickstart --interactive      (quit ends it, clear forgets)
  almostgpt generate --checkpoint runs/quickstart --max-tokens 5000 --cache rolling --window 128"""


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
    cache: str = (
        "auto"  # auto (full, or rolling for more than a window) | full | rolling | int8 | none
    )
    window: int | None = None  # of a rolling cache: tokens that each one sees; null: block_size
    sink_tokens: int | None = None  # of them, from the very beginning of the text; null: 4
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps


def run(arguments: list[str]) -> int:
    given = parse(GenerateArguments, arguments, prog="almostgpt generate", description=DESCRIPTION)
    check_sampling(given.temperature, given.top_k, given.top_p, given.seed)
    check_options(given.cache, given.window, given.sink_tokens)
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
    cache = _cache(model, given, len(ids) + given.max_tokens) if _shared(ids, given) else None
    if cache is not None:  # all but the last, which each sample feeds to draw its first token from
        feed(model, _row(ids[:-1], model), cache)
    for number in range(given.num_samples):
        if given.num_samples > 1:
            print(f"--- sample {number + 1}", file=sys.stderr)
        seed = _seed(given.seed, number)
        start = ids or _random_start(tokenizer, seed)
        own = None if cache is None else cache.fork(1)
        new = _stream(model, tokenizer, start, given, seed, own)
        _write(given.prompt)
        _show(tokenizer, new, seed, shown_first=() if ids else start)
        _write("\n")
    return 0


def _shared(ids: list[int], given: GenerateArguments) -> bool:
    """Whether several samples have something of a prompt to be computed once."""
    return given.num_samples > 1 and given.max_tokens > 0 and len(ids) > 1


def _converse(model: GPT, tokenizer: Tokenizer, given: GenerateArguments) -> None:
    """Reads a line, answers, and keeps both as the context of the next one.

    The cache stays from turn to turn, so that each feeds only what is new.
    """
    print("a prompt a line; `clear` forgets what was said, `quit` ends", file=sys.stderr)
    history: list[int] = []
    cache = _cache(model, given, None)
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
            if cache is not None:
                cache.reset()
        else:
            seed = _seed(given.seed, turn)
            answer = _answer(model, tokenizer, history, prompt, given, seed, cache)
            if answer is not None:
                history = answer
                turn += 1
        prompt = ""


def _answer(
    model: GPT,
    tokenizer: Tokenizer,
    history: list[int],
    prompt: str,
    given: GenerateArguments,
    seed: int,
    cache: KVCache | None,
) -> list[int] | None:
    """Writes prompt and answer; returns all tokens so far, or None where there was an error to tell."""
    try:
        ids = history + tokenizer.encode(prompt) or _random_start(tokenizer, seed)
    except UserError as error:  # a character the model has never seen
        print(f"error: {error}", file=sys.stderr)
        return None
    try:
        new = _stream(model, tokenizer, ids, given, seed, cache)
    except UserError as error:  # no room
        print(f"error: {error}{'; `clear` starts anew' if history else ''}", file=sys.stderr)
        return None
    _write(prompt)
    history = ids + _show(tokenizer, new, seed)
    _write("\n")
    return history


def _cache(model: GPT, given: GenerateArguments, tokens: int | None) -> KVCache | None:
    return KVCache.for_model(model, 1, given.cache, tokens, given.window, given.sink_tokens)


def _row(ids: list[int], model: GPT) -> Tensor:
    return torch.tensor([ids], device=model.token_embedding.weight.device)


def _stream(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    given: GenerateArguments,
    seed: int,
    cache: KVCache | None,
) -> Iterator[Tensor]:
    """The tokens that continue ``ids``; what cannot be is an error now, before any is drawn."""
    options = {"cache": given.cache, "window": given.window, "sink_tokens": given.sink_tokens}
    return stream(
        model,
        _row(ids, model),
        given.max_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        **(options if cache is None else {"cache": cache}),
    )


def _show(
    tokenizer: Tokenizer, drawn: Iterable[Tensor], seed: int, shown_first: Iterable[int] = ()
) -> list[int]:
    """Writes tokens as they are drawn; returns them."""
    started = time.perf_counter()
    new: list[int] = []

    def tokens() -> Iterator[int]:
        yield from shown_first
        for token in drawn:
            new.append(int(token))
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
