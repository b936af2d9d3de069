"""How many bytes of text go into a token: by file, and by the script that its lines are written in."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from almostgpt.errors import UserError

# The scripts of Unicode that most text is written in; `other` has what is none of them.
SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Ethiopic"),
    *("Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam"),
    *("Sinhala", "Thai", "Lao", "Myanmar", "Khmer", "Tibetan"),
    *("Han", "Hiragana", "Katakana", "Hangul"),
)
NO_LETTERS = "no letters"
RUN = 1 << 20  # characters that are encoded at once, about

# What tiktoken downloads for an encoding: https://github.com/openai/tiktoken, tiktoken_ext
PEERS = {
    "gpt2": ("gpt2", ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json")),
    "cl100k": ("cl100k_base", ("encodings/cl100k_base.tiktoken",)),
}
SOURCE = "https://openaipublic.blob.core.windows.net/"

Count = Callable[[str], int]  # of a text, the tokens


@dataclass
class Amount:
    """Bytes of text, and how many tokens each tokenizer makes of them."""

    bytes: int = 0
    tokens: Counter[str] = field(default_factory=Counter)

    def bytes_per_token(self) -> dict[str, float]:
        return {name: self.bytes / tokens for name, tokens in self.tokens.items() if tokens}


def measure(
    files: Iterable[Path],
    tokenizers: Mapping[str, Count],
    advance: Callable[[int], object] = lambda size: None,
) -> tuple[dict[str, Amount], dict[str, Amount]]:
    """By file, and by script: what the tokenizers make of UTF-8 text files.

    A line belongs to the script that most of its letters are of. Lines of a script that follow each other
    are encoded together; ``advance(bytes)`` follows the reading.

    Raises:
        UserError: a file that is not UTF-8.
        OSError: one that cannot be read.
    """
    by_file, by_script = {}, defaultdict(Amount)
    for file in files:
        own = by_file[str(file)] = Amount()
        for script, text in _runs(file):
            size = len(text.encode())
            tokens = {name: count(text) for name, count in tokenizers.items()}
            for amount in (own, by_script[script]):
                amount.bytes += size
                amount.tokens.update(tokens)
            advance(size)
    return by_file, dict(by_script)


def script_of(line: str) -> str:
    """The script of most letters, of equally many the one named first in ``SCRIPTS``."""
    if line.isascii():
        return "Latin" if any(map(str.isalpha, line)) else NO_LETTERS
    found = Counter()
    for match in _letters().finditer(line):
        found[match.lastgroup] += len(match[0])
    return max((*SCRIPTS, "other"), key=lambda script: found[script]) if found else NO_LETTERS


def peers_here() -> tuple[dict[str, Count], list[str]]:
    """tiktoken's gpt2 and cl100k, where their files are in its cache; and the names of those that are not."""
    import tiktoken

    there, missing = {}, []
    for name, (encoding, files) in PEERS.items():
        if all(_is_cached(SOURCE + file) for file in files):
            encode = tiktoken.get_encoding(encoding).encode_ordinary
            there[name] = lambda text, encode=encode: len(encode(text))
        else:
            missing.append(name)
    return there, missing


def _is_cached(url: str) -> bool:
    """Whether tiktoken has it (``tiktoken.load.read_file_cached``); it would download it otherwise."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return folder != "" and Path(folder, hashlib.sha1(url.encode()).hexdigest()).is_file()


def _runs(file: Path) -> Iterator[tuple[str, str]]:
    """The text of a file in parts, each of whole lines of one script."""
    lines: list[str] = []
    script, size = "", 0
    try:
        with open(file, encoding="utf-8", newline="\n") as text:
            for line in text:
                own = script_of(line)
                if lines and (own != script or size > RUN):
                    yield script, "".join(lines)
                    lines, size = [], 0
                script, size = own, size + len(line)
                lines.append(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 text ({error.reason}); convert the file to UTF-8 or leave it out"
        ) from error
    if lines:
        yield script, "".join(lines)


@cache
def _letters():
    import regex  # tiktoken brings it

    parts = [rf"(?P<{script}>[\p{{Script={script}}}&&\p{{L}}]+)" for script in SCRIPTS]
    return regex.compile("|".join([*parts, r"(?P<other>\p{L})"]), regex.VERSION1)
