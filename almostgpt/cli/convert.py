"""``almostgpt convert``: a model of Hugging Face as one of ours, and the other way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from almostgpt import checkpoint
from almostgpt.cli.arguments import parse
from almostgpt.config import Config, resolve
from almostgpt.device import PRECISIONS
from almostgpt.errors import UserError, not_one_of
from almostgpt.files import expand
from almostgpt.hub import load_pretrained, save_pretrained

DESCRIPTION = """Reads a model of Hugging Face (GPT-2, Llama, SmolLM2, Mistral, Qwen2, Qwen3), a folder or
an id of the hub, and writes a folder that every command here takes; or writes one of ours for transformers.
The last line on stdout is a JSON object with what was written.

examples:
  almostgpt convert --from HuggingFaceTB/SmolLM2-135M-Instruct --to smollm2
  almostgpt generate --checkpoint smollm2 --interactive
  almostgpt convert --from ./Llama-3.2-1B --to llama --precision bf16 --block-size 8192
  almostgpt convert --from runs/mine --to-hf mine-hf
  python -c "from transformers import pipeline; print(pipeline('text-generation', 'mine-hf')('To be'))\""""


@dataclass(frozen=True)
class ConvertArguments:
    source: Annotated[str, tyro.conf.arg(name="from")]  # a Hugging Face folder or hub id, or a run
    to: Path | None = None  # the folder to make, in our format; it must not exist
    to_hf: Path | None = None  # the folder to make, in Hugging Face's format; it must not exist
    precision: str = "fp32"  # of what is written: fp32 | bf16 | fp16
    block_size: int | None = None  # with --to: shorter than the model's own; null: its own
    revision: str | None = None  # of a hub id: branch, tag or commit; null: the newest


def run(arguments: list[str]) -> int:
    given = parse(ConvertArguments, arguments, prog="almostgpt convert", description=DESCRIPTION)
    if (given.to is None) == (given.to_hf is None):
        raise UserError("give either --to (our format) or --to-hf (Hugging Face's)")
    if given.precision not in PRECISIONS:
        raise UserError(f"--precision is {not_one_of(given.precision, PRECISIONS)}")
    out = expand(given.to or given.to_hf)
    if out.exists():  # now, rather than after a download
        raise UserError(f"{out}: already exists")
    result = _in(given, out) if given.to is not None else _out(given, out)
    print(json.dumps(result))
    return 0


def _in(given: ConvertArguments, out: Path) -> dict:
    model, tokenizer = load_pretrained(
        given.source,
        revision=given.revision,
        dtype=PRECISIONS[given.precision],
        block_size=given.block_size,
    )
    checkpoint.export(out, model, tokenizer, resolve(Config()))
    return {
        "out": str(given.to),
        "parameters": model.num_parameters(),
        "block_size": model.config.block_size,
        "vocab_size": model.config.vocab_size,
    }


def _out(given: ConvertArguments, out: Path) -> dict:
    if given.block_size is not None or given.revision is not None:
        raise UserError("--block-size and --revision are for --to")
    model, tokenizer = checkpoint.load(given.source)
    model_type = save_pretrained(model.to(PRECISIONS[given.precision]), out, tokenizer)
    return {
        "out": str(given.to_hf),
        "model_type": model_type,
        "parameters": model.num_parameters(),
    }
