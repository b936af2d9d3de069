"""``almostgpt eval``: how good a trained model is."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from almostgpt import checkpoint
from almostgpt.cli.arguments import parse
from almostgpt.config import not_one_of
from almostgpt.data.progress import progress_bar, say
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.evaluation.perplexity import Perplexity, checked_options, perplexity
from almostgpt.evaluation.text import read_tokens
from almostgpt.training.metrics import finite

DESCRIPTION = """Perplexity and bits per byte of a trained model on a text, by a sliding window.
Remarks go to stderr; the last line on stdout is a JSON object with the result.

examples:
  almostgpt eval --checkpoint runs/quickstart --perplexity book.txt
  almostgpt eval --checkpoint runs/quickstart --perplexity book.txt --stride 16     more context, slower
  almostgpt eval --checkpoint runs/mine --perplexity tokens/book         a prepared folder: what validates
  almostgpt eval --checkpoint runs/mine --perplexity tokens/book/train_000000.bin --max-tokens 100000
  almostgpt eval --checkpoint runs/mine --perplexity book.txt --device cuda --precision bf16"""


@dataclass(frozen=True)
class EvalArguments:
    checkpoint: Path  # a run folder (its newest whole checkpoint) or one checkpoint folder
    perplexity: Path  # a text file (UTF-8), a .bin shard, or a prepared folder: what validates
    window: int | None = None  # tokens that the model sees at once; null: its block_size
    stride: int | None = None  # tokens from window to window; null: half a window
    batch_size: int = 8  # windows at a time; changes speed and memory only
    max_tokens: int | None = None  # only the first so many of the text; null: all
    quantize: str = "none"  # none | int8: matrices in 8 bits, as `generate` has them
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    precision: str = "fp32"  # fp32 | bf16 (autocast)


def run(arguments: list[str]) -> int:
    given = parse(EvalArguments, arguments, prog="almostgpt eval", description=DESCRIPTION)
    if given.precision not in ("fp32", "bf16"):
        raise UserError(f"precision is {not_one_of(given.precision, ('fp32', 'bf16'))}")
    if given.max_tokens is not None and given.max_tokens < 2:
        raise UserError(f"--max-tokens is {given.max_tokens}, but must be at least 2")
    device = pick_device(given.device)
    model, tokenizer = checkpoint.load(given.checkpoint, device, quantize=given.quantize)
    # Refused now, rather than when a large text is encoded.
    window, stride = checked_options(model, given.window, given.stride, given.batch_size)
    tokens = read_tokens(given.perplexity, tokenizer)[: given.max_tokens]
    if len(tokens) < 2:
        raise UserError(f"{given.perplexity}: perplexity needs 2 tokens or more, not {len(tokens)}")
    say(
        f"{given.checkpoint} on {given.perplexity}: {len(tokens):,} tokens · windows of {window}, "
        f"a stride of {stride} · {device} · {given.precision}"
    )
    with progress_bar("scoring", len(tokens) - 1) as advance, _autocast(device, given.precision):
        result = perplexity(
            model,
            tokens,
            tokenizer=tokenizer,
            window=window,
            stride=stride,
            batch_size=given.batch_size,
            progress=advance,
        )
    say(_headline(result))
    values = {
        "checkpoint": str(given.checkpoint),
        "file": str(given.perplexity),
        "perplexity": result.perplexity,
        "nll": result.nll,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "windows": result.windows,
        "window": window,
        "stride": stride,
        "device": str(device),
        "precision": given.precision,
        "quantize": model.config.quantize,
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
    }
    print(json.dumps(finite(values), allow_nan=False))
    return 0


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def _headline(result: Perplexity) -> str:
    parts = [f"perplexity {result.perplexity:.4f}", f"{result.nll:.4f} nats a token"]
    if result.bits_per_byte is not None:
        parts.append(f"{result.bits_per_byte:.4f} bits a byte")
    return " · ".join([*parts, f"{result.tokens_per_second:,.0f} tokens/s"])
