"""``almostgpt prepare``: text into a folder of token shards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from almostgpt.cli.arguments import parse
from almostgpt.config import Config, DataConfig, overlay, resolve
from almostgpt.data.prepare import prepare

DESCRIPTION = """Tokenizes text into shards that training reads in place (--data.path OUT).
`almostgpt train` does so by itself, into a cache folder; this command is for sets that you keep.
The last line on stdout is a JSON object with the counts.

examples:
  almostgpt prepare --data.path book.txt --out tokens/book
  almostgpt prepare --data.path texts/ --data.tokenizer gpt2 --data.split document --out tokens/texts
  almostgpt train --data.path tokens/texts"""


@dataclass(frozen=True)
class PrepareArguments:
    out: Path  # the folder to make; it must not exist
    data: Annotated[DataConfig, tyro.conf.FlagConversionOff] = field(default_factory=DataConfig)


def run(arguments: list[str]) -> int:
    given = parse(PrepareArguments, arguments, prog="almostgpt prepare", description=DESCRIPTION)
    data = resolve(overlay(Config(), {"data": given.data})).data
    dataset = prepare(data, given.out)
    print(
        json.dumps(
            {
                "out": str(given.out),
                "tokenizer": dataset.tokenizer.name,
                "vocab_size": dataset.vocab_size,
                "train_tokens": dataset.train_tokens,
                "val_tokens": dataset.val_tokens,
            }
        )
    )
    return 0
