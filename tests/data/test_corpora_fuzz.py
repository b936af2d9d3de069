"""Arbitrary bytes as every kind of file: documents or a UserError, and nothing else."""

import gzip
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from almostgpt.config import DataConfig
from almostgpt.data.corpora import CORPORA, read_documents
from almostgpt.data.corpora.base import BuiltIn
from almostgpt.data.shards import open_shard, write_shard
from almostgpt.errors import UserError

KINDS = [name for name, corpus in CORPORA.items() if not isinstance(corpus, BuiltIn)]
NAMES = ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.subject", "1.", "wiki_00", "wiki.raw"]
PACKED = ["a.jsonl.gz", "a.txt.bz2", "a.csv.xz", "a.jsonl.zst"]
fast = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# Pieces that mean something to one of the readers, between bytes that do not.
PIECES = [
    b'{"text": "a"}\n', b'{"text": ', b'"message"', b"}", b"[[[", b"\n", b"\r\n", b"\r", b",", b'"', b'""',
    b"text,title\n", b"message\n", b"\xef\xbb\xbf", b"\xff", b"\0", b"\xed\xa0\x80", b"\\ud800",
    b"*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n", b"*** END OF THIS PROJECT GUTENBERG EBOOK",
    b"*END*THE SMALL PRINT! X*END*\n", b"Produced by ", b"(CNN)", b"By . ", b"PUBLISHED: . 1 . ",
    b"Subject: x\n", b"Content-Type: multipart/mixed; boundary=a\n\n--a\n", b"Content-Type: text/plain; "
    b"charset=\"\xff\"\n", b"Content-Transfer-Encoding: base64\n\n", b"=?utf-8?b?/w==?=", b"> quoted\n",
    b"-----Original Message-----\n", b"\n@subject\n", b" = T = \n", b"\n \n", b" @.@ ", b"(; ", b" ()",
]  # fmt: skip
# Beginnings of what the patterns look for.
UNITS = [
    "\n",
    " ",
    "=",
    "(",
    "(; ",
    ">",
    "> ",
    "From: a\n",
    "*",
    "*** START OF THE ",
    "a: ",
    "<br",
    "-",
]
CONTENTS = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=20)), max_size=30).map(
    b"".join
)


def documents(folder: Path, name: str, content: bytes, corpus: str, column=None):
    """What is read, or None for a refusal that names the file."""
    (folder / name).write_bytes(content)
    data = DataConfig(path=str(folder / name), corpus=corpus, column=column)
    try:
        found = list(read_documents(data, folder))
    except UserError as error:
        assert str(folder / name) in str(error)
        return None
    for document in found:
        document.text.encode("utf-8")  # what is handed on can be encoded
    return found


@fast
@given(content=CONTENTS, corpus=st.sampled_from(KINDS), name=st.sampled_from(NAMES))
@example(content=b"", corpus="text", name="a.csv")
@example(content=b"\xef\xbb\xbf", corpus="wikitext", name="a.jsonl")
@example(content=b'"\n"', corpus="cnn", name="a.csv")
@example(content=b"a:" * 50_000, corpus="enron", name="1.")
def test_readers_take_any_bytes(content, corpus, name, tmp_path):
    documents(tmp_path, name, content, corpus)


@fast
@given(
    content=CONTENTS, corpus=st.sampled_from(KINDS), name=st.sampled_from(PACKED), data=st.data()
)
def test_readers_take_any_damage_of_packed_files(content, corpus, name, data, tmp_path):
    whole = gzip.compress(content) if name.endswith("gz") else content
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    documents(tmp_path, name, cut, corpus)


@fast
@given(data=st.data())
def test_parquet_takes_any_damage(data, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"] * 5}), buffer, row_group_size=4)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    documents(tmp_path, "a.parquet", content, data.draw(st.sampled_from(KINDS)))


@pytest.mark.parametrize("corpus", KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_cleaning_takes_linear_time(corpus, unit):
    """Half a megabyte of what a pattern begins with: no reader hangs on it (a day, if quadratic)."""
    CORPORA[corpus].clean(unit * (500_000 // len(unit)) + "x")


@fast
@given(st.lists(st.text(), max_size=8))
def test_json_lines_come_back(texts):
    """Any text that UTF-8 can hold, through any row."""
    with tempfile.TemporaryDirectory() as folder:
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        found = documents(Path(folder), "a.jsonl", lines.encode(), "text")
    expected = [text for text in texts if text]
    assert [document.text for document in found or []] == expected


@fast
@given(st.binary(max_size=3000), st.booleans())
def test_shards_take_any_bytes(content, with_header):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.bin")
        if with_header:
            write_shard(file, np.zeros(100, np.uint16))
            whole = bytearray(file.read_bytes())
            whole[: min(len(content), 20)] = content[:20]
            content = bytes(whole)
        file.write_bytes(content)
        try:
            tokens = open_shard(file)
        except UserError as error:
            assert str(file) in str(error)
        else:
            assert len(content) == 1024 + tokens.nbytes
            tokens.sum()
