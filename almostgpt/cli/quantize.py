"""``almostgpt quantize``: a trained model with its matrices in 8 bits, stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from almostgpt import checkpoint
from almostgpt.cli.arguments import parse
from almostgpt.config import resolve
from almostgpt.config_file import load_config
from almostgpt.files import expand
from almostgpt.model.quantized import quantize

DESCRIPTION = """Writes a folder with the model in 8 bits, a quarter of it, for generation and evaluation.
The last line on stdout is a JSON object with the sizes.

examples:
  almostgpt quantize --checkpoint runs/quickstart --out quickstart-int8
  almostgpt generate --checkpoint quickstart-int8 --prompt "def "
  almostgpt eval --checkpoint quickstart-int8 --perplexity book.txt"""


@dataclass(frozen=True)
class QuantizeArguments:
    checkpoint: Path  # a run folder (its newest whole checkpoint) or one checkpoint folder
    out: Path  # the folder to make; it must not exist


def run(arguments: list[str]) -> int:
    given = parse(QuantizeArguments, arguments, prog="almostgpt quantize", description=DESCRIPTION)
    source = checkpoint.find(given.checkpoint)
    model, tokenizer = checkpoint.load(source)
    before = _bytes(model)
    config = resolve(load_config(source / checkpoint.CONFIG))
    checkpoint.export(expand(given.out), quantize(model), tokenizer, config)
    result = {"out": str(given.out), "bytes_before": before, "bytes": _bytes(model)}
    print(json.dumps({**result, "parameters": model.num_parameters()}))
    return 0


def _bytes(model) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
