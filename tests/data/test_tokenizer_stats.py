"""Bytes per token, by file and by script."""

import pytest

from almostgpt.data.tokenizer_stats import NO_LETTERS, SCRIPTS, measure, peers_here, script_of
from almostgpt.errors import UserError


@pytest.mark.parametrize(
    ("line", "script"),
    [
        ("plain text\n", "Latin"),
        ("1 + 2\n", NO_LETTERS),
        ("", NO_LETTERS),
        ("— 1999 —\n", NO_LETTERS),
        ("Grüße\n", "Latin"),
        ("Всем привет, world\n", "Cyrillic"),
        ("Привет, hello world\n", "Latin"),
        ("世界 a\n", "Han"),
        ("こんにちは世界\n", "Hiragana"),
        ("안녕하세요\n", "Hangul"),
        ("مرحبا\n", "Arabic"),
        ("γεια\n", "Greek"),
        ("ᏣᎳᎩ\n", "other"),
    ],
)
def test_script_of_a_line(line, script):
    assert script_of(line) == script
    assert script in (*SCRIPTS, NO_LETTERS, "other")


def test_every_byte_is_counted_once(tmp_path):
    lines = ["one\n", "two\r\n", "три\n", "four", "\n", "1\n", "пять\n"] * 50
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_bytes("".join(lines).encode())
    size, seen = files[0].stat().st_size, []
    tokenizers = {"character": len, "byte": lambda text: len(text.encode())}
    by_file, by_script = measure(files, tokenizers, seen.append)
    assert sum(seen) == 2 * size
    assert [amount.bytes for amount in by_file.values()] == [size, size]
    assert by_file[str(files[0])].bytes_per_token() == {
        "character": size / len("".join(lines)),
        "byte": 1,
    }
    assert set(by_script) == {"Latin", "Cyrillic", NO_LETTERS}
    assert by_script["Cyrillic"].bytes == 2 * 50 * len("три\nпять\n".encode())
    assert by_script["Cyrillic"].tokens["character"] == 2 * 50 * len("три\nпять\n")
    assert sum(amount.bytes for amount in by_script.values()) == 2 * size


def test_an_empty_file_has_no_figure(tmp_path):
    (tmp_path / "empty").touch()
    by_file, by_script = measure([tmp_path / "empty"], {"byte": len})
    assert by_file[str(tmp_path / "empty")].bytes_per_token() == {} and by_script == {}


def test_what_is_no_text(tmp_path):
    (tmp_path / "bad").write_bytes(b"a\xff")
    with pytest.raises(UserError, match="bad: not UTF-8"):
        measure([tmp_path / "bad"], {"byte": len})


def test_peers_without_a_network(tiktoken_cache, monkeypatch, tmp_path):
    there, missing = peers_here()
    assert (list(there), missing) == (["gpt2"], ["cl100k"])
    assert there["gpt2"]("Hello, my dog is cute") == 6
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache: it would download each time
    assert peers_here() == ({}, ["gpt2", "cl100k"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    assert peers_here() == ({}, ["gpt2", "cl100k"])
