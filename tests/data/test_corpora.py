"""Documents: the built-in corpora and local text."""

import hashlib
import io
import sysconfig
from pathlib import Path
from urllib.error import URLError

import pytest

from almostgpt.config import DataConfig
from almostgpt.data.corpora import Document, read_documents, shakespeare, stdlib
from almostgpt.errors import UserError


def read(cache, **settings) -> list[Document]:
    return list(read_documents(DataConfig(**settings), cache))


# ---------------------------------------------------------------- stdlib


def test_stdlib_is_large_plain_and_in_order(tmp_path):
    documents = read(tmp_path, corpus="stdlib")
    names = [document.name for document in documents]
    text = "".join(document.text for document in documents)
    assert len(text) > 5_000_000
    assert text.isascii() and len(set(text)) <= 100
    assert names == sorted(set(names))
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert documents[names.index("argparse.py")].text.encode() == source
    assert list(tmp_path.iterdir()) == []


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(UserError, match=r"(?s)python\.zip.*--data\.path"):
        read(tmp_path, corpus="stdlib")


def test_unknown_corpus(tmp_path):
    with pytest.raises(UserError, match="did you mean shakespeare"):
        read(tmp_path, corpus="shakespear")


# ---------------------------------------------------------------- tiny Shakespeare


@pytest.fixture
def small_play(monkeypatch):
    """Puts a short text in the place of the real one; yields it and the list of downloads."""
    content, calls = b"First Citizen:\nSpeak.\n", []

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(shakespeare, "urlopen", urlopen)
    return content, calls


def test_shakespeare_is_downloaded_once(small_play, tmp_path):
    content, calls = small_play
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        assert read(cache, corpus="shakespeare") == [
            Document("tinyshakespeare.txt", content.decode())
        ]
    assert calls == [shakespeare.URL]
    assert [file.name for file in cache.iterdir()] == ["tinyshakespeare.txt"]


def test_shakespeare_damaged_in_the_cache_is_fetched_again(small_play, tmp_path):
    content, calls = small_play
    (tmp_path / "tinyshakespeare.txt").write_bytes(content[:-1])
    assert read(tmp_path, corpus="shakespeare")[0].text.encode() == content
    assert len(calls) == 1


def test_shakespeare_of_wrong_content(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "urlopen", lambda url, timeout: io.BytesIO(b"<html>log in"))
    with pytest.raises(UserError, match="SHA-256 differs"):
        read(tmp_path, corpus="shakespeare")
    assert list(tmp_path.iterdir()) == []


def test_shakespeare_offline(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise URLError("Name or service not known")

    monkeypatch.setattr(shakespeare, "urlopen", urlopen)
    with pytest.raises(UserError, match=r"--data\.path"):
        read(tmp_path, corpus="shakespeare")


def test_shakespeare_from_a_warm_cache(tmp_path, test_data, monkeypatch):
    monkeypatch.setattr(shakespeare, "urlopen", None)
    content = (test_data / "tinyshakespeare.txt").read_bytes()
    (tmp_path / "tinyshakespeare.txt").write_bytes(content)
    assert len(content) == shakespeare.BYTES
    assert read(tmp_path, corpus="shakespeare")[0].text.encode() == content


# ---------------------------------------------------------------- local text


def test_folder_is_read_in_order_and_byte_for_byte(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "2.txt").write_bytes("zwei\r\nüber\n".encode())
    (folder / "a.txt").write_bytes(b"one")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "notes.md").write_bytes(b"not read")
    documents = read(tmp_path, path=str(folder), corpus="shakespeare")  # the path wins
    assert documents == [Document("a.txt", "one"), Document("b/2.txt", "zwei\r\nüber\n")]
    assert read(tmp_path, path=str(folder / "a.txt")) == [Document("a.txt", "one")]


def test_text_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("gone.txt", "gone.txt: no such file"),
        ("empty.txt", "empty.txt: there is no text in it"),
        ("folder", "folder: none of the files in it says by its name"),
        ("latin.txt", "latin.txt: not UTF-8 text: byte 0xfc at offset 2"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path, path=str(tmp_path / name))
