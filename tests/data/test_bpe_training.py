"""The trainer against byte-pair encoding as it is defined, merge by merge."""

import gzip
import json
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from bpe_truth import chunks_of, merges_by_definition, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data import bpe_training
from almostgpt.data.bpe import PATTERNS
from almostgpt.data.tokenizer import train_bpe
from almostgpt.errors import UserError

_bpe = pytest.importorskip("almostgpt._bpe", reason="the trainer was not built")

several = settings(max_examples=150, deadline=None)
# Few letters: many pairs are equally frequent, and many overlap.
REPETITIVE = st.text(st.sampled_from("aab \n'sé"), max_size=80)


def merges_of_trainer(documents, pattern="gpt4", count=100, threads=2):
    trainer = _bpe.Trainer(pattern, threads)
    for document in documents:
        trainer.add(document.encode() if isinstance(document, str) else document)
    return trainer.train(count)[0]


def real_texts(folder: Path) -> dict[str, str]:
    """Of each kind a piece that the definition can go over again and again."""
    texts = {
        "shakespeare": (folder / "tinyshakespeare.txt").read_text("utf-8"),
        "wikitext": (folder / "wikitext2" / "valid.txt").read_text("utf-8"),
        "python": Path(json.__file__).with_name("decoder.py").read_text("utf-8")
        + Path(random.__file__).read_text("utf-8"),
    }
    for file in sorted((folder / "books").glob("*.gz"))[:2]:
        texts[file.name] = gzip.decompress(file.read_bytes()).decode("utf-8")
    for file in sorted((folder / "samples").rglob("*.*")):
        if file.suffix in (".txt", ".csv", ".jsonl", ".json"):
            texts[str(file.relative_to(folder))] = file.read_bytes().decode("utf-8", "replace")
    return texts


# ---------------------------------------------------------------- the merges


@pytest.mark.parametrize("pattern", PATTERNS)
def test_real_texts(test_data, pattern):
    texts = [text[5000:8000] for text in real_texts(test_data).values()]
    expected = merges_by_definition(chunks_of(texts, pattern), 60)
    assert merges_of_trainer(texts, pattern, 60) == expected


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_real_texts_by_themselves(test_data, pattern):
    for name, text in real_texts(test_data).items():
        text = text[:60_000]
        expected = merges_by_definition(chunks_of([text], pattern), 200)
        assert merges_of_trainer([text], pattern, 200) == expected, name


@several
@given(st.lists(REPETITIVE | st.text(max_size=30), max_size=4), st.sampled_from(list(PATTERNS)))
def test_drawn_texts(documents, pattern):
    """To the very end, when no pair is left."""
    expected = merges_by_definition(chunks_of(documents, pattern), 1000)
    assert merges_of_trainer(documents, pattern, 1000) == expected


@pytest.mark.parametrize("text", ["", "a", "aa", "aaa", "aaaa", "aaaaaaa", "abab", "ab" * 9 + "a"])
def test_smallest_texts(text):
    expected = merges_by_definition(chunks_of([text], "gpt4"), 20)
    assert merges_of_trainer([text], count=20) == expected


def test_no_pair_goes_over_the_border_of_a_document():
    assert merges_of_trainer(["a", "b"] * 9) == []
    assert merges_of_trainer(["ab"] * 2 + ["ba"]) == [(97, 98), (98, 97)]


@several
@given(st.lists(st.binary(max_size=200), max_size=5), st.sampled_from(list(PATTERNS)))
def test_any_bytes(documents, pattern):
    """What is no UTF-8 is trained on, too: chunks as test_bpe_split.py has them."""
    chunks = Counter(chunk for document in documents for chunk in _bpe.split(document, pattern))
    assert merges_of_trainer(documents, pattern) == merges_by_definition(chunks, 100)


# ---------------------------------------------------------------- threads, and pieces of a text


def long_text() -> str:
    """Some pieces of a MiB, with stretches in which there is nowhere to cut."""
    drawn = random.Random(5)
    words = ["".join(drawn.choices("abcdeé世 '\n", k=drawn.randint(1, 9))) for _ in range(5000)]
    return (" ".join(drawn.choices(words, k=250_000)) + "=-" * 700_000) + "Ω" + "x1" * 200_000


def test_any_number_of_threads_gives_the_same(tmp_path):
    text = long_text()
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    expected = merges_by_definition(chunks_of([text], "gpt4"), 3)
    files = [tmp_path / "long.txt"]
    one = train_bpe(files, 2000, threads=1)
    assert list(one.tokens[:259]) == tokens_of(expected)
    for threads in (2, 3, 4):
        assert train_bpe(files, 2000, threads=threads).same_as(one)
    assert train_bpe([text], 2000).same_as(one)
    assert train_bpe(iter([text.encode()]), 2000).same_as(one)


def test_pieces_of_a_long_text_are_cut_where_chunks_end():
    text = long_text().encode()
    chunks = Counter(_bpe.split(text, "gpt2"))
    trainer = _bpe.Trainer("gpt2", 2)
    trainer.add_chunks(chunks)
    assert merges_of_trainer([text], "gpt2", 1500) == trainer.train(1500)[0]


def test_a_trainer_begins_anew_after_training():
    trainer = _bpe.Trainer("gpt4", 2)
    for text in ("abab", "cdcd"):
        trainer.add(text.encode())
        assert trainer.train(1) == ([(ord(text[0]), ord(text[1]))], 1)
    assert trainer.train(1) == ([], 0)


# ---------------------------------------------------------------- other patterns


def test_a_pattern_of_ones_own(tmp_path):
    pattern = r"\p{Lu}?\p{Ll}+|\d|[\s\S]"
    texts = ["CamelCase and 1999\r\n", "camelCase, CamelCase\n" * 3]
    expected = merges_by_definition(chunks_of(texts, pattern), 8)
    assert list(train_bpe(texts, 265, pattern).tokens) == tokens_of(expected)
    (tmp_path / "a.txt").write_bytes(texts[0].encode())
    mixed = [tmp_path / "a.txt", texts[1].encode()]
    assert list(train_bpe(mixed, 265, pattern).tokens) == tokens_of(expected)
    # The known ones are the same when they are written out.
    for name, written in PATTERNS.items():
        assert train_bpe(texts, 300, name).tokens == train_bpe(texts, 300, written).tokens
    assert train_bpe([b"\xff\xfeab\xff\xfe"], 258, r"[\s\S]+", []).tokens[256] == b"\xff\xfe"


@pytest.mark.parametrize("pattern", [r"\w+", "a*", r"\w+|\W", r"[a-z]+|$"])
def test_a_pattern_that_leaves_text_out(pattern):
    if pattern == r"\w+|\W":
        assert train_bpe(["it is, so it is"], 258, pattern).tokens[256] == b"is"
        return
    with pytest.raises(UserError, match=r"leaves out .*PATTERN\|\[\\s\\S\]"):
        train_bpe(["it is, so it is"], 258, pattern)


# ---------------------------------------------------------------- arguments, and trouble


def test_vocabulary():
    tokenizer = train_bpe(["abcabc"], 300, special_tokens=["<|endoftext|>", "<|user|>"])
    assert tokenizer.tokens[256:] == (b"ab", b"abc", b"abcabc")  # and then no pair is left
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (261, 259)
    assert tokenizer.special_ids == {"<|endoftext|>": 259, "<|user|>": 260}
    assert train_bpe(["abcabc"], 256, special_tokens=()).vocab_size == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], 256), "vocab_size is 256, but must be at least 257"),
        ((["a"], 300.0), "vocab_size is 300.0"),
        ((["a"], True), "vocab_size is True"),
        ((["a"], 1 << 40), "at most"),
        (("a text", 300), r"for one text, \[text\]"),
        (([3], 300), "str, bytes or pathlib.Path, not int"),
        (([], 300), "no text to train on"),
        ((["", b""], 300), "no text to train on"),
        ((["\ud800"], 300), "lone surrogate"),
        ((["a"], 300, "gpt3("), "neither one of gpt2, gpt4 nor a regular expression"),
        ((["a"], 300, "a(?R)?|b"), "nor a regular expression"),
        ((["a"], 300, "gpt4", "<|end|>"), "a list of texts"),
        ((["a"], 300, "gpt4", [""]), "not empty"),
        ((["a"], 300, "gpt4", ["<a>", "<a>"]), "twice"),
        ((["ababab"], 300, "gpt4", ["ab"]), "an ordinary token, too"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        train_bpe(*arguments)


def test_threads_and_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="threads is 0"):
        train_bpe(["a"], 300, threads=0)
    with pytest.raises(UserError, match="a folder"):
        train_bpe([tmp_path], 300)
    with pytest.raises(FileNotFoundError) as error:
        train_bpe([tmp_path / "none.txt"], 300)
    assert error.value.filename == tmp_path / "none.txt"


def test_without_the_native_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "almostgpt._bpe", None)
    monkeypatch.delattr("almostgpt._bpe", raising=False)
    with pytest.raises(UserError, match="Install g\\+\\+"):
        train_bpe(["a"], 300)


def test_too_much_text(monkeypatch):
    class Full:
        def add(self, document):
            pass

        def add_chunks(self, counts):
            pass

        def train(self, merges, progress):
            raise ValueError("the distinct chunks together have 4 GiB or more")

    module = SimpleNamespace(Trainer=lambda pattern, threads: Full())
    monkeypatch.setattr(bpe_training, "native", lambda: module)
    with pytest.raises(UserError, match="4 GiB or more; take a part of it"):
        train_bpe(["a"], 300)


class Stopped(Exception):
    pass


def letters(count: int) -> bytes:
    """Random ones, in words of some thirty: merging goes on for seconds."""
    table = bytes(32 if byte < 8 else 97 + byte % 26 for byte in range(256))
    return random.Random(3).randbytes(count).translate(table)


@pytest.fixture
def alarm():
    """Rings after 0.25 s, as Ctrl-C would at a terminal."""

    def ring(number, frame):
        raise Stopped

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.25)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_signal_ends_the_merging(alarm):
    trainer = _bpe.Trainer("gpt4", 1)
    trainer.add(letters(3_000_000))
    with pytest.raises(Stopped):
        trainer.train(1 << 30)
    trainer.add(b"abab")  # what was counted is gone, and the trainer as good as new
    assert trainer.train(1)[0] == [(97, 98)]


def test_a_signal_ends_the_reading_of_a_file(alarm):
    """One that never ends, but is text."""
    trainer = _bpe.Trainer("gpt4", 1)
    with pytest.raises((Stopped, OSError)):
        while True:
            trainer.add_file(__file__)


def test_a_signal_ends_the_wait_for_a_pipe(alarm, tmp_path):
    import os
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    held = threading.Event()

    def write():
        with open(pipe, "wb") as out:
            out.write(b"some text")
            out.flush()
            held.wait(20)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(Stopped):
            _bpe.Trainer("gpt4", 1).add_file(pipe)
    finally:
        held.set()
        writer.join()


def test_progress_is_told_and_may_end_it():
    calls = []

    def report(done):
        calls.append(done)
        raise Stopped

    trainer = _bpe.Trainer("gpt4", 1)
    trainer.add(letters(3_000_000))
    with pytest.raises(Stopped):
        trainer.train(1 << 30, report)
    assert len(calls) == 1 and calls[0] > 0
