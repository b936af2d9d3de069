"""``almostgpt tokenizer``: train a vocabulary, look at what it makes of a text, and how good it is."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from almostgpt.cli.arguments import parse
from almostgpt.data.progress import progress_bar, say
from almostgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from almostgpt.data.tokenizer_base import END_OF_TEXT
from almostgpt.data.tokenizer_stats import Amount, measure, peers_here
from almostgpt.errors import UserError, not_one_of
from almostgpt.files import expand, fsync_folder, temporary_beside

HELP = """usage: almostgpt tokenizer {train,encode,stats} [options]      (--help after one shows its options)

  train   a byte-level BPE vocabulary from text
  encode  the ids of a text
  stats   bytes per token by file and script, beside gpt2 and cl100k

examples:
  almostgpt tokenizer train --input book.txt texts/ --vocab-size 32768 --out tokenizers/mine
  almostgpt tokenizer encode --tokenizer tokenizers/mine --text "To be, or not" --pieces
  almostgpt tokenizer stats --tokenizer tokenizers/mine --input book.txt
  almostgpt train --data.path book.txt --data.tokenizer tokenizers/mine"""

TRAIN = """Trains a byte-level BPE vocabulary. Each file is one document. The folder that is made has our
own file, tokenizer.json for Hugging Face's libraries, and tokenizer.tiktoken for tiktoken.
The last line on stdout is a JSON object with what was written.

examples:
  almostgpt tokenizer train --input book.txt --out tokenizers/book
  almostgpt tokenizer train --input texts/ --vocab-size 8192 --pattern gpt2 --out tokenizers/small
  almostgpt tokenizer train --input a.txt --special-tokens "<|endoftext|>" "<|user|>" --out tokenizers/chat
  almostgpt tokenizer train --input a.txt --pattern "\\p{L}+|\\d|[\\s\\S]" --out tokenizers/mine"""

ENCODE = """The ids of a text. The last line on stdout is a JSON object that has them.

examples:
  almostgpt tokenizer encode --tokenizer tokenizers/mine --text "To be, or not" --pieces
  almostgpt tokenizer encode --tokenizer gpt2 --input book.txt"""

STATS = """Bytes per token by file and by the script of its lines, beside gpt2 and cl100k where tiktoken has
their files in its cache. More is better. The last line on stdout is a JSON object with the figures.

examples:
  almostgpt tokenizer stats --tokenizer tokenizers/mine --input book.txt texts/"""


@dataclass(frozen=True)
class TrainArguments:
    input: tuple[Path, ...]  # text files (UTF-8), or folders: every .txt file in them
    out: Path  # the folder to make; it must not exist
    vocab_size: int = 32768  # ids in all, with bytes and special tokens
    pattern: str = "gpt4"  # gpt2 | gpt4, or a regular expression: how text is split
    special_tokens: tuple[str, ...] = (END_OF_TEXT.decode(),)  # texts with an id of their own
    threads: int | None = None  # that split and count; null: one for each core


@dataclass(frozen=True)
class EncodeArguments:
    tokenizer: str  # gpt2 | byte, or a folder with a tokenizer
    text: str | None = None  # the text itself
    input: Path | None = None  # a file with it (UTF-8); - : what comes in on stdin
    pieces: bool = False  # also the text of each token


@dataclass(frozen=True)
class StatsArguments:
    tokenizer: str  # gpt2 | byte, or a folder with a tokenizer
    input: tuple[Path, ...]  # text files (UTF-8), or folders: every .txt file in them


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        raise SystemExit(0)
    name, *rest = arguments
    if name not in ACTIONS:
        raise UserError(f"almostgpt tokenizer: the action is {not_one_of(name, ACTIONS)}")
    kind, description, action = ACTIONS[name]
    given = parse(kind, rest, prog=f"almostgpt tokenizer {name}", description=description)
    print(json.dumps(action(given)))
    return 0


def _train(given: TrainArguments) -> dict:
    out = expand(given.out)
    if out.exists():  # now, rather than after all the work
        raise UserError(f"{out}: already exists")
    start = time.perf_counter()
    tokenizer = train_bpe(
        _files(given.input),
        given.vocab_size,
        given.pattern,
        given.special_tokens,
        threads=given.threads,
        progress=True,
    )
    _save(tokenizer, out)
    seconds = time.perf_counter() - start
    say(f"{out}: a vocabulary of {tokenizer.vocab_size:,} ids in {seconds:.1f} s")
    return {
        "out": str(given.out),
        "vocab_size": tokenizer.vocab_size,
        "pattern": tokenizer.pattern,
        "special_tokens": tokenizer.special_ids,
        "seconds": seconds,
    }


def _save(tokenizer: Tokenizer, out: Path) -> None:
    """The folder is there with all that belongs into it, or not at all."""
    temporary = temporary_beside(out)
    try:
        tokenizer.save(temporary)
        os.rename(temporary, out)
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(given: EncodeArguments) -> dict:
    if (given.text is None) == (given.input is None):
        raise UserError("give either --text or --input")
    tokenizer = load_tokenizer(given.tokenizer)
    text = given.text if given.input is None else _text(given.input)
    ids = tokenizer.encode(text)
    pieces = {"pieces": [tokenizer.decode_bytes([id]).decode("utf-8", "replace") for id in ids]}
    size = len(text.encode())
    return {
        "tokenizer": given.tokenizer,
        "tokens": len(ids),
        "bytes": size,
        "bytes_per_token": size / len(ids) if ids else None,
        "ids": ids,
        **(pieces if given.pieces else {}),
    }


def _stats(given: StatsArguments) -> dict:
    tokenizer, files = load_tokenizer(given.tokenizer), _files(given.input)
    others, missing = peers_here()
    others.pop(given.tokenizer, None)
    counts = {given.tokenizer: lambda text: len(tokenizer.encode_array(text)), **others}
    total = sum(file.stat().st_size for file in files)
    with progress_bar("encoding", total) as advance:
        by_file, by_script = measure(files, counts, advance)
    for title, amounts in (("file", by_file), ("script", by_script)):
        say(_table(title, list(counts), amounts))
    if missing:
        say(f"(not in tiktoken's cache, and so left out: {', '.join(missing)})")
    return {
        "tokenizer": given.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "files": _figures(by_file),
        "scripts": _figures(by_script),
    }


def _figures(amounts: dict[str, Amount]) -> dict:
    return {
        name: {"bytes": amount.bytes, "bytes_per_token": amount.bytes_per_token()}
        for name, amount in amounts.items()
    }


def _table(title: str, names: list[str], amounts: dict[str, Amount]) -> str:
    """Bytes per token, a row for each amount, the largest first."""
    largest_first = sorted(amounts.items(), key=lambda item: -item[1].bytes)
    rows = [[title, "bytes", *names]]
    for name, amount in largest_first:
        ratios = amount.bytes_per_token()
        rows.append([name, f"{amount.bytes:,}", *(f"{ratios.get(n, 0):.3f}" for n in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        )
        for first, *rest in rows
    )


def _text(file: Path) -> str:
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else expand(file).read_bytes()
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at {error.start}") from error


def _files(paths: tuple[Path, ...]) -> list[Path]:
    """The files of ``--input``: of a folder every ``*.txt`` below it, in the order of their paths."""
    files = []
    for path in map(expand, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*.txt") if file.is_file())
            if not found:
                raise UserError(f"{path}: no .txt file in this folder; name the files themselves")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return files


ACTIONS = {
    "train": (TrainArguments, TRAIN, _train),
    "encode": (EncodeArguments, ENCODE, _encode),
    "stats": (StatsArguments, STATS, _stats),
}
