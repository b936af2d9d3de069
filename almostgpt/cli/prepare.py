"""``almostgpt prepare``: text into a folder of token shards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from almostgpt.cli.arguments import parse
from almostgpt.config import Config, DataConfig, overlay, resolve
from almostgpt.data.manifest import dropped_from
from almostgpt.data.prepare import prepare

DESCRIPTION = """Tokenizes text into shards that training reads in place (--data.path OUT).
`almostgpt train` does so by itself, into a cache folder; this command is for sets that you keep.
After a kill, a full disk or a bad row the same command goes on where it stopped: finished shards are
kept, and the result is the same. The last line on stdout is a JSON object with the counts.

examples:
  almostgpt prepare --data.path book.txt --out tokens/book
  almostgpt prepare --data.path texts/ --data.tokenizer gpt2 --data.split document --out tokens/texts
  almostgpt prepare --data.corpus wikipedia --data.path 'dump/**/wiki_*' --out tokens/wiki
  almostgpt prepare --data.path hf://roneneldan/TinyStories --data.tokenizer gpt2 --out tokens/stories
  almostgpt train --data.path tokens/texts"""


@dataclass(frozen=True)
class PrepareArguments:
    out: Path  # the folder to make; it must not exist
    workers: int | None = (
        None  # processes; null: a core each. The result is the same for any number
    )
    data: Annotated[DataConfig, tyro.conf.FlagConversionOff] = field(default_factory=DataConfig)


def run(arguments: list[str]) -> int:
    given = parse(PrepareArguments, arguments, prog="almostgpt prepare", description=DESCRIPTION)
    data = resolve(overlay(Config(), {"data": given.data})).data
    dataset = prepare(data, given.out, workers=given.workers)
    print(
        json.dumps(
            {
                "out": str(given.out),
                "tokenizer": dataset.tokenizer.name,
                "vocab_size": dataset.vocab_size,
                "train_tokens": dataset.train_tokens,
                "val_tokens": dataset.val_tokens,
                "dropped": dropped_from(dataset.folder),
            }
        )
    )
    return 0
