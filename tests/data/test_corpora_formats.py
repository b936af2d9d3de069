"""Files of every format, whole and damaged: what is read, and the one message otherwise."""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import sys

import pytest

from almostgpt.config import DataConfig
from almostgpt.data.corpora import read_documents, tables
from almostgpt.errors import UserError

TEXTS = ["one\r\ntwo", 'say "hi", twice', "ärger 🙂", "  kept  ", "x" * 200_000]


def read(path, **settings):
    settings = {"corpus": "text", **settings}
    return list(read_documents(DataConfig(path=str(path), **settings), None))


def texts(path, **settings):
    return [document.text for document in read(path, **settings)]


def as_jsonl(texts, column="text"):
    return "".join(json.dumps({"id": i, column: t}) + "\n" for i, t in enumerate(texts)).encode()


def write_csv(file, texts, column="text", delimiter=","):
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerow(["id", column])
        writer.writerows(enumerate(texts))
    return file


def write_parquet(file, columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), file, row_group_size=3)
    return file


def packed(suffix, content):
    if suffix == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](content)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_every_format_gives_the_same_texts(tmp_path, monkeypatch, block):
    for module in ("base", "tables"):
        monkeypatch.setattr(f"almostgpt.data.corpora.{module}.BLOCK_BYTES", block)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    (tmp_path / "a.ndjson").write_bytes(b"\xef\xbb\xbf" + as_jsonl(TEXTS).rstrip())
    write_csv(tmp_path / "a.csv", TEXTS)
    write_csv(tmp_path / "a.tsv", TEXTS, delimiter="\t")
    for suffix in ("jsonl", "ndjson", "csv", "tsv"):
        documents = read(tmp_path / f"a.{suffix}")
        assert [document.text for document in documents] == TEXTS, suffix
        assert [document.row for document in documents] == [1, 2, 3, 4, 5]
        assert {document.name for document in documents} == {f"a.{suffix}"}


def test_parquet(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"n": range(5), "content": TEXTS})
    assert texts(file) == TEXTS
    file = write_parquet(tmp_path / "b.parquet", {"text": ["a", None, "", "b"]})
    assert [(document.text, document.row) for document in read(file)] == [("a", 1), ("b", 4)]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed(suffix, as_jsonl(TEXTS)))
    # Two streams one after the other, as tools append them.
    two = packed(suffix, b"first ") + packed(suffix, b"second")
    (tmp_path / f"a.txt{suffix}").write_bytes(two)
    assert texts(tmp_path / f"a.jsonl{suffix}") == TEXTS
    assert texts(tmp_path / f"a.txt{suffix}") == ["first second"]


def test_patterns_and_folders(tmp_path):
    folder = tmp_path / "data"
    for name in ("b/2.txt", "b/c/3.txt", "1.txt", "x.md", "b/4.rst"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    assert [d.name for d in read(folder)] == ["1.txt", "b/2.txt", "b/c/3.txt"]
    assert [d.name for d in read(f"{folder}/b/*.txt")] == ["2.txt"]
    assert [d.name for d in read(f"{folder}/**/*.txt")] == ["1.txt", "b/2.txt", "b/c/3.txt"]
    assert [d.name for d in read(f"{folder}/**/*.[mr]*")] == ["b/4.rst", "x.md"]
    assert texts(folder / "x.md") == ["this is x.md"]
    (folder / "odd[1].txt").write_text("brackets")
    assert texts(folder / "odd[1].txt") == ["brackets"]


def test_a_pattern_from_where_one_is(tmp_path, monkeypatch):
    (tmp_path / "1.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    assert read("*.txt")[0].name == "1.txt"


def test_column_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "story": "yes"}\n')
    assert texts(tmp_path / "a.jsonl", column="story") == ["yes"]
    file = write_csv(tmp_path / "a.csv", ["yes"], column="story")
    assert texts(file, column="story") == ["yes"]
    (tmp_path / "b.jsonl").write_text('{"only": "this"}\n')
    assert texts(tmp_path / "b.jsonl") == ["this"]


def test_csv_fields_of_any_size(tmp_path):
    before = csv.field_size_limit()
    assert texts(write_csv(tmp_path / "a.csv", ["y" * 3_000_000])) == ["y" * 3_000_000]
    assert csv.field_size_limit() == before


# ---------------------------------------------------------------- what cannot be


def refused(path, **settings):
    """The message, and the documents before it."""
    seen = []
    with pytest.raises(UserError) as error:
        settings = {"corpus": "text", **settings}
        for document in read_documents(DataConfig(path=str(path), **settings), None):
            seen.append(document.text)
    message = str(error.value)
    assert "\n" not in message
    return message, seen


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "cut', "damaged JSON: Unterminated string"),
        (b'{"text": "\xff"}', "not UTF-8 text: byte 0xff at offset 10"),
        (b'{"text": "\\ud800"}', "lone surrogate at position 0"),
        (b'{"text": 3}', "its 'text' is a number, not a text"),
        (b'{"text": ["a"]}', "its 'text' is a list"),
        (b'{"other": "a", "more": "b"}', "no column text, TEXT, .*it has other, more"),
        (b'[{"text": "a"}]', "not a JSON object.*jq"),
        (b'"text"', "not a JSON object"),
        (b"[" * 100_000, "damaged JSON"),
        (b"\0\0\0", "damaged JSON"),
    ],
)
def test_a_bad_row_of_json_lines(tmp_path, line, expected):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "later"}\n')
    message, seen = refused(file)
    assert message.startswith(f"{file}, line 3: ")
    assert re.search(expected, message), message
    assert seen == ["good"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,text\n1,good\n2\n", "row 2: 1 fields instead of the 2"),
        (
            b'id,text\n1,good\n2,"not closed\n',
            "row 2 .*unexpected end of data.*a quote that is not",
        ),
        (b'id,text\n1,good\n2,"a" b\n', "row 2 .*damaged csv"),
        (b"id,text\n1,good\n2,\xff\n", "not UTF-8 text: byte 0xff"),
        (b"a,b\n1,2\n", "no column text.*it has a, b.*data.column"),
        (b"", "no text in it"),
        (b"id,text\n", "no text in it"),
    ],
)
def test_a_bad_row_of_csv(tmp_path, content, expected):
    (tmp_path / "a.csv").write_bytes(content)
    message, seen = refused(tmp_path / "a.csv")
    assert re.search(expected, message), message


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("cut", [0.3, 0.99])
def test_a_truncated_file_is_not_a_short_one(tmp_path, monkeypatch, suffix, cut):
    monkeypatch.setattr(tables, "BLOCK_BYTES", 5000)
    content = packed(suffix, as_jsonl([os.urandom(50).hex() for _ in range(2000)]))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(content[: int(len(content) * cut)])
    message, seen = refused(file)
    assert message.startswith(f"{file}: damaged, truncated or vanished after line ")
    assert len(seen) < 2000 and (seen or suffix in (".bz2", ".zst"))  # those unpack large blocks


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ".parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    elif suffix == ".zst":
        pytest.importorskip("zstandard")
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(b"this is plain text, whatever its name says" * 10)
    assert refused(file)[0].startswith(f"{file}: damaged, truncated or vanished")


def test_truncated_parquet(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "damaged, truncated or vanished after row 0" in refused(file)[0]
    file = write_parquet(tmp_path / "b.parquet", {"text": [1, 2], "b": ["a", "b"]})
    assert "row 1: its 'text' is a number" in refused(file)[0]
    assert "no column 'c'; it has text, b" in refused(file, column="c")[0]


def test_lines_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGEST_ROW", 1000)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 5000)
    assert "line 2 is longer than" in refused(tmp_path / "a.jsonl")[0]
    (tmp_path / "a.csv").write_bytes(b"text\na\n" + b"x" * 5000)
    assert "longer than" in refused(tmp_path / "a.csv")[0]
    (tmp_path / "b.csv").write_bytes(b'text\na\n"' + b"x\n" * 5000)
    assert "field larger than field limit" in refused(tmp_path / "b.csv")[0]


def test_files_of_several_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    message, _ = refused(tmp_path)
    assert "several kinds (1 jsonl, 1 text), perhaps the same text twice" in message


def test_nothing_to_read(tmp_path):
    assert "no file matches this pattern" in refused(f"{tmp_path}/*.txt")[0]
    assert "none of the files in it" in refused(tmp_path)[0]
    assert "needs data.path" in str(
        pytest.raises(UserError, list, read_documents(DataConfig(corpus="text"), None)).value
    )


def test_column_where_there_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert "is text, which has no columns" in refused(tmp_path / "a.txt", column="text")[0]
    with pytest.raises(UserError, match="data.corpus=stdlib has no columns"):
        next(read_documents(DataConfig(column="text"), None))


def test_a_file_that_vanishes(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    documents = read_documents(DataConfig(path=str(tmp_path)), None)
    next(documents)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1\.txt: cannot be read: No such file"):
        list(documents)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.txt").chmod(0)
    assert "Permission denied" in refused(tmp_path / "a.txt")[0]


@pytest.mark.parametrize("module", ["pyarrow", "zstandard"])
def test_an_extra_that_is_not_installed(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / {"pyarrow": "a.parquet", "zstandard": "a.txt.zst"}[module]
    file.write_bytes(b"content")
    assert "pip install 'almostgpt[data]'" in refused(file)[0]
