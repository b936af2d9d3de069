"""The splitters written by hand against the regular expressions that they stand for."""

import re
import unicodedata
from importlib.metadata import version
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.bpe import PATTERNS

_bpe = pytest.importorskip("almostgpt._bpe", reason="the trainer was not built")

TABLES = Path(__file__).parents[2] / "csrc" / "bpe" / "unicode_tables.inc"
EXPRESSIONS = {name: regex.compile(pattern) for name, pattern in PATTERNS.items()}
# Where letters, numbers, spaces of several kinds, apostrophes and line breaks meet in all orders.
MIXED = "aZé世١2½ \t\n\r\u00a0\u2028\u3000\x1c\x85'’sSſtTdDmMlLvVeErRK!-_🙂\u0301"
several = settings(max_examples=400, deadline=None)


def by_regex(text: bytes, pattern: str) -> list[bytes]:
    """What is no UTF-8 is a character a byte: a lone surrogate, which is neither letter nor space."""
    found = EXPRESSIONS[pattern].findall(text.decode("utf-8", "surrogateescape"))
    return [chunk.encode("utf-8", "surrogateescape") for chunk in found]


@pytest.fixture(params=PATTERNS)
def pattern(request):
    return request.param


def check(text: bytes, pattern: str) -> None:
    assert _bpe.split(text, pattern) == by_regex(text, pattern)


def code_points() -> list[int]:
    """Of another version of Unicode than the tables', those that Python's older one has, too."""
    same = version("regex") in TABLES.read_text().splitlines()[0]
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    return codes if same else [c for c in codes if unicodedata.category(chr(c)) != "Cn"]


def check_characters(codes: list[int], pattern: str) -> None:
    for start in range(0, len(codes), 5000):
        characters = map(chr, codes[start : start + 5000])
        text = "".join(f"a{c}b {c}1{c}'{c}!{c}\t{c}{c}\n{c} " for c in characters)
        if _bpe.split(text.encode(), pattern) != by_regex(text.encode(), pattern):
            for code in codes[start : start + 5000]:  # which one?
                c = chr(code)
                check(f"a{c}b {c}1{c}'{c}!{c}\t{c}{c}\n{c} ".encode(), pattern)


def test_characters_of_every_block(pattern):
    codes = code_points()
    # Scripts that have spaces and digits of their own; of the large ones, a sample.
    check_characters([c for c in codes if c < 0x3100 or c % 97 == 0], pattern)


@pytest.mark.slow
def test_every_character(pattern):
    check_characters(code_points(), pattern)


@several
@given(st.text(st.sampled_from(MIXED), max_size=60))
def test_texts_where_all_kinds_meet(text):
    for pattern in PATTERNS:
        check(text.encode(), pattern)


@several
@given(st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=60))
def test_any_text(text):
    for pattern in PATTERNS:
        check(text.encode(), pattern)


@several
@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from([*MIXED, "\xe4"]))
    .map("".join)
    .flatmap(
        lambda text: st.integers(0, 5).map(
            lambda cut: text.encode()[cut : len(text.encode()) - cut]
        )
    )
)
def test_any_bytes(text):
    for pattern in PATTERNS:
        check(text, pattern)


@pytest.mark.parametrize(
    "tail", ["", " ", "\n", "  ", " \n ", "\r\n\r\n", "'", "'l", " '", "\t", "\u3000"]
)
def test_ends_of_texts(tail, pattern):
    for head in ("", "a", "1", "!", "\n", "it's"):
        check((head + tail).encode(), pattern)


def test_contractions():
    """Case counts in GPT-2's alone; the long s of old print is an s without it."""
    text = "it's IT'S it'\u017f we'll we'LL 'tis I'Ve"
    assert _bpe.split(text.encode(), "gpt2") == by_regex(text.encode(), "gpt2")
    chunks = [chunk.decode() for chunk in _bpe.split(text.encode(), "gpt4")]
    assert chunks == [
        "it",
        "'s",
        " IT",
        "'S",
        " it",
        "'ſ",
        " we",
        "'ll",
        " we",
        "'LL",
        " '",
        "tis",
    ] + [" I", "'Ve"]


def test_real_texts(test_data, pattern):
    import gzip

    texts = [(test_data / "tinyshakespeare.txt").read_bytes(), Path(re.__file__).read_bytes()]
    texts += [gzip.decompress(next((test_data / "books").glob("Doyle*.gz")).read_bytes())]
    texts += [
        file.read_bytes()[:300_000] for file in sorted((test_data / "samples").rglob("*.txt"))
    ]
    for text in texts:
        check(text, pattern)


def test_names_of_patterns():
    with pytest.raises(ValueError, match="gpt2 and gpt4, not gpt3"):
        _bpe.split(b"a", "gpt3")
