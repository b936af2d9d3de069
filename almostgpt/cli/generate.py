"""``almostgpt generate``: text from a trained model, streamed as it is made."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from almostgpt import checkpoint
from almostgpt.cli.arguments import parse
from almostgpt.cli.interactive import converse
from almostgpt.data.tokenizer import Tokenizer
from almostgpt.device import pick_device, pick_precision
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.cache_options import check_options
from almostgpt.inference.chat import Chat, Conversation
from almostgpt.inference.decoder import feed
from almostgpt.inference.sampling import Sampling, seed_or_new
from almostgpt.inference.text import Completion, TextStream, check_stop
from almostgpt.model import GPT

DESCRIPTION = """Continues prompts with a trained model. The text goes to stdout, remarks to stderr.

examples:
  almostgpt generate --checkpoint runs/quickstart --prompt "def "
  almostgpt generate --checkpoint runs/quickstart --prompt "class " --temperature 0 --stop "def " "class "
  almostgpt generate --checkpoint runs/quickstart --prompt "def " "class " "import " --json
  almostgpt generate --checkpoint runs/quickstart --prompt-file prompts.txt --batch-size 16 --json
  almostgpt generate --checkpoint runs/quickstart/checkpoints/step-00000500 --num-samples 3 --seed 1
  almostgpt generate --checkpoint runs/quickstart --interactive      (quit ends it, clear forgets)
  almostgpt generate --checkpoint runs/quickstart --max-tokens 5000 --cache rolling --window 128
  almostgpt generate --checkpoint runs/quickstart --quantize int8"""


@dataclass(frozen=True)
class GenerateArguments:
    checkpoint: Path  # a run folder (its newest whole checkpoint) or one checkpoint folder
    prompt: tuple[str, ...] = ("",)  # texts to continue; an empty one begins a new text
    prompt_file: Path | None = None  # more of them, one a line
    max_tokens: int = 100  # tokens to add to each
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = 200  # draw from the k most likely tokens; null: all
    top_p: float | None = 0.9  # draw from the fewest tokens with this probability; null: all
    min_p: float | None = None  # draw from tokens this likely, relative to the likeliest; null: all
    repetition_penalty: float = 1.0  # above 1: tokens that the text has already come less often
    seed: int | None = None  # repeats the same text; null draws a new one each time
    sequence: int = 0  # number of the first text; the next ones count on. Each has its own draws
    num_samples: int = 1  # texts to make of each prompt
    stop: tuple[str, ...] = ()  # end a text before the first of these strings
    stop_ids: tuple[int, ...] = ()  # end a text at the first of these tokens
    past_the_end: bool = False  # go on where the model draws its end-of-text token
    json: bool = False  # one JSON object a text, each in a line, instead of the text
    logprobs: bool = False  # in JSON, the log-probability of each new token
    batch_size: int = 8  # texts made at the same time, with several prompts or JSON
    interactive: bool = False  # read prompts in turn; each continues the conversation so far
    plain: bool = False  # interactive: as one text, though the tokenizer has a chat template
    cache: str = "auto"  # auto (full, or rolling past a window) | full | rolling | int8 | none
    window: int | None = None  # of a rolling cache: tokens that each one sees; null: block_size
    sink_tokens: int | None = None  # of them, from the very beginning of the text; null: 4
    quantize: str = "none"  # none | int8: linear layers in 8 bits, less to read for every token
    precision: str = "auto"  # of the weights: auto (bf16 on a GPU, else fp32) | fp32 | bf16 | fp16
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps


def run(arguments: list[str]) -> int:
    given = parse(GenerateArguments, arguments, prog="almostgpt generate", description=DESCRIPTION)
    _check(given)
    prompts = _prompts(given)
    seed = seed_or_new(given.seed)
    for terminal in (sys.stdin, sys.stdout):  # a character that it cannot show ends nothing
        if isinstance(terminal, io.TextIOWrapper):
            terminal.reconfigure(errors="replace")
    device = pick_device(given.device)
    precision = pick_precision(given.precision, device)
    model, tokenizer = checkpoint.load(given.checkpoint, device, quantize=given.quantize)
    model.to(precision)
    if given.interactive:
        converse(_conversation(model, tokenizer, given), prompts[0], _write)
    elif given.json or len(prompts) > 1:
        _check_prompts(tokenizer, prompts)
        _batches(model, tokenizer, given, prompts, seed)
    else:
        _samples(model, tokenizer, given, prompts[0], seed)
    return 0


def _check(given: GenerateArguments) -> None:
    """What can be said before the model is loaded."""
    _sampling(given)
    check_options(given.cache, given.window, given.sink_tokens)
    check_stop(given.stop)
    if given.num_samples < 1 or given.max_tokens < 0 or given.batch_size < 1:
        raise UserError(
            "--num-samples and --batch-size must be at least 1, --max-tokens at least 0"
        )
    if not 0 <= given.sequence <= 2**62:  # with room to count on
        raise UserError(f"--sequence is {given.sequence}, but must be in 0 … {2**62}")
    if given.logprobs and not given.json:
        raise UserError("--logprobs is for --json")
    if given.interactive and (given.json or given.num_samples > 1 or given.prompt_file):
        raise UserError("--interactive goes with neither --json, --num-samples nor --prompt-file")
    if given.plain and not given.interactive:
        raise UserError(
            "--plain is for --interactive: elsewhere prompts are always continued as text"
        )
    if given.interactive and len(given.prompt) > 1:
        raise UserError("--interactive takes one --prompt to begin with")


def _prompts(given: GenerateArguments) -> list[str]:
    if given.prompt_file is None:
        return list(given.prompt) or [""]
    try:
        lines = given.prompt_file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{given.prompt_file}: not a text in UTF-8: {error}") from error
    lines = [line.removesuffix("\r") for line in lines]
    prompts = [prompt for prompt in (*given.prompt, *lines) if prompt]
    if not prompts:
        raise UserError(f"{given.prompt_file}: no line with a prompt")
    return prompts


def _check_prompts(tokenizer: Tokenizer, prompts: list[str]) -> None:
    """Raises ``UserError`` for text that the tokenizer cannot express, before any of it is continued."""
    for number, prompt in enumerate(prompts, 1):
        try:
            tokenizer.encode(prompt)
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error


def _sampling(given: GenerateArguments) -> Sampling:
    return Sampling(
        given.repetition_penalty, given.temperature, given.top_k, given.top_p, given.min_p
    )


def _stop_ids(tokenizer: Tokenizer, given: GenerateArguments) -> tuple[int, ...]:
    return given.stop_ids if given.past_the_end else (*given.stop_ids, *tokenizer.stop_ids)


def _conversation(model: GPT, tokenizer: Tokenizer, given: GenerateArguments) -> Conversation:
    kind = Conversation if given.plain or tokenizer.chat_template is None else Chat
    return kind(
        model,
        tokenizer,
        given.max_tokens,
        _sampling(given),
        seed=given.seed,
        stop=given.stop,
        stop_ids=_stop_ids(tokenizer, given),
        cache=given.cache,
        window=given.window,
        sink_tokens=given.sink_tokens,
    )


def _texts(model, tokenizer, given, prompts: list[str], seed: int, first: int, **cache):
    """A stream of the texts that continue prompts; what cannot be is an error now."""
    options = {"cache": given.cache, "window": given.window, "sink_tokens": given.sink_tokens}
    return TextStream(
        model,
        tokenizer,
        prompts,
        given.max_tokens,
        stop=given.stop,
        stop_ids=_stop_ids(tokenizer, given),
        seed=seed,
        sequences=range(first, first + len(prompts)),
        logprobs=given.logprobs,
        **vars(_sampling(given)),
        **(cache or options),
    )


# ---------------------------------------------------------------- one prompt, streamed


def _samples(
    model: GPT, tokenizer: Tokenizer, given: GenerateArguments, prompt: str, seed: int
) -> None:
    """Texts of one prompt, one after the other; what they share of it is computed once."""
    cache = _shared_cache(model, tokenizer, given, prompt)
    for number in range(given.num_samples):
        if given.num_samples > 1:
            print(f"--- sample {number + 1}", file=sys.stderr)
        own = {} if cache is None else {"cache": cache.fork(1)}
        sequence = given.sequence + number
        started = time.perf_counter()
        texts = _texts(model, tokenizer, given, [prompt], seed, sequence, **own)
        _write(prompt)
        first = None
        for _, text in texts:
            first = first or time.perf_counter() - started
            _write(text)
        seconds = time.perf_counter() - started
        _write("\n")
        _remark(texts.completions[0], seconds, first, seed, sequence)


def _shared_cache(
    model: GPT, tokenizer: Tokenizer, given: GenerateArguments, prompt: str
) -> KVCache | None:
    """A cache of the prompt, where several samples have something of it to be computed once."""
    ids = tokenizer.encode_from_start(prompt)
    if given.num_samples == 1 or given.max_tokens == 0 or len(ids) < 2:
        return None
    tokens = len(ids) + given.max_tokens
    cache = KVCache.for_model(model, 1, given.cache, tokens, given.window, given.sink_tokens)
    if cache is not None:  # all but the last, which each sample feeds to draw its first token from
        feed(model, torch.tensor([ids[:-1]], device=model.device), cache)
    return cache


def _remark(completion: Completion, seconds: float, first: float | None, seed: int, sequence: int):
    tokens = len(completion.ids)
    if not tokens:
        return
    stopped = f", stopped by {completion.stopped_by!r}" if completion.finish == "stop" else ""
    began = "" if first is None else f", the first after {first:.2f} s"
    number = f", sequence {sequence}" if sequence else ""
    print(
        f"[{tokens} tokens, {tokens / seconds:.1f} tokens/s{began}, seed {seed}{number}{stopped}]",
        file=sys.stderr,
    )


# ---------------------------------------------------------------- many, in batches


def _batches(
    model: GPT, tokenizer: Tokenizer, given: GenerateArguments, prompts: list[str], seed: int
) -> None:
    """Texts of all prompts, side by side; each is written when its batch is done."""
    prompts = [prompt for prompt in prompts for _ in range(given.num_samples)]
    for number in range(0, len(prompts), given.batch_size):
        batch = prompts[number : number + given.batch_size]
        first = given.sequence + number
        started = time.perf_counter()
        texts = _texts(model, tokenizer, given, batch, seed, first)
        for done, sequence in zip(texts.run(), range(first, first + len(batch)), strict=True):
            if given.json:
                record = _record(done, seed, sequence)
                _write(json.dumps(record, ensure_ascii=not _shows_all()) + "\n")
            else:
                print(f"--- text {sequence - given.sequence + 1}", file=sys.stderr)
                _write(f"{done.prompt}{done.text}\n")
        seconds = time.perf_counter() - started
        tokens = sum(len(completion.ids) for completion in texts.completions)
        print(
            f"[{first + len(batch) - given.sequence} of {len(prompts)} texts, {tokens} tokens, "
            f"{tokens / seconds:.1f} tokens/s, seed {seed}]",
            file=sys.stderr,
        )


def _record(completion: Completion, seed: int, sequence: int) -> dict:
    record = {**asdict(completion), "seed": seed, "sequence": sequence}
    if completion.logprobs is None:
        del record["logprobs"]
    return record


def _shows_all() -> bool:
    """Whether stdout takes every character; in JSON the others can be escaped."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def _write(text: str) -> None:
    print(text, end="", flush=True)
