"""Tokenizers against their definitions, and against damage."""

import json

import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.tokenizer import (
    FILE_NAME,
    TOKENIZERS,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    build_tokenizer,
    load_tokenizer,
)
from almostgpt.errors import UserError

ODD = "Grüße, 世界! 🙂\r\n\t<|endoftext|>\x00 é"


def test_char_vocabulary_is_nanogpts(test_data):
    text = (test_data / "tinyshakespeare.txt").read_text()
    chars = sorted(list(set(text)))
    stoi = {ch: i for i, ch in enumerate(chars)}
    tokenizer = build_tokenizer("char", [text])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (65, None)
    assert tokenizer.encode("\n !") == [0, 1, 2]
    assert tokenizer.encode_array(text).tolist() == [stoi[ch] for ch in text]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1))
def test_char_round_trip(text):
    tokenizer = CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert ids == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@settings(max_examples=150, deadline=None)
@given(st.text(), st.integers(0, 40), st.integers(0, 40))
def test_byte_round_trip_and_any_cut(text, start, length):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    cut = ids[start : start + length]
    assert tokenizer.decode(cut) == bytes(cut).decode("utf-8", errors="replace")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 256)))
def test_byte_decodes_any_ids(ids):
    expected = b"".join(b"<|endoftext|>" if i == 256 else bytes([i]) for i in ids)
    assert ByteTokenizer().decode_bytes(ids) == expected


def test_ids_may_be_lists_arrays_or_tensors():
    tokenizer = ByteTokenizer()
    for ids in ([72, 105], (72, 105), np.array([72, 105], np.uint16), torch.tensor([72, 105])):
        assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(np.int64(i) for i in (72, 105)) == "Hi"


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()])
@pytest.mark.parametrize("beyond", [-1, None, 10**9])
def test_foreign_id_is_named(tokenizer, beyond):
    beyond = tokenizer.vocab_size if beyond is None else beyond
    with pytest.raises(UserError, match=f"token id {beyond} is not in the vocabulary"):
        tokenizer.decode([0, beyond])


def test_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'€' \(U\+20AC, position 2\).*training text"):
        CharTokenizer("abc").encode("ab€")
    with pytest.raises(UserError, match=r"'!' \(U\+0021, position 0\)"):
        CharTokenizer("abc").encode("!")


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer()])
def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UserError, match="lone surrogate at position 1"):
        tokenizer.encode("a\ud800")


def test_dtype_is_the_smallest():
    assert CharTokenizer("abc").encode_array("abc").dtype == np.uint16
    many = [chr(code) for code in range(0x10000, 0x20001)]
    large = CharTokenizer(many)
    assert large.vocab_size == 65537
    assert large.encode_array(many[-1]).dtype == np.uint32
    assert large.encode(many[-1]) == [65536] and large.decode([65536]) == many[-1]


# ---------------------------------------------------------------- gpt2


def reference_bpe(folder):
    """GPT-2's own algorithm in the plainest form, from OpenAI's two files."""
    ids = json.loads((folder / "encoder.json").read_text())
    lines = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    rank = {tuple(line.split()): i for i, line in enumerate(lines)}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {b: chr(b) for b in plain}
    shown |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

    def encode(text):
        out = []
        for chunk in regex.findall(pattern, text):
            parts = [shown[byte] for byte in chunk.encode()]
            while len(parts) > 1:
                pairs = list(zip(parts, parts[1:], strict=False))
                best = min(pairs, key=lambda pair: rank.get(pair, len(rank)))
                if best not in rank:
                    break
                i = pairs.index(best)
                parts[i : i + 2] = ["".join(best)]
            out += [ids[part] for part in parts]
        return out

    return encode


def test_gpt2_against_the_plain_algorithm(tiktoken_cache, test_data):
    tokenizer = load_tokenizer("gpt2")
    encode = reference_bpe(test_data / "gpt2_bpe")
    text = (test_data / "tinyshakespeare.txt").read_text()[:20_000] + ODD
    ids = tokenizer.encode(text)
    assert ids == encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert tokenizer.encode_array(text).dtype == np.uint16
    assert 50256 not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_gpt2_decodes_from_any_cut(tiktoken_cache):
    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode(ODD * 2)
    for start in range(len(ids)):
        for end in range(start, len(ids)):
            assert isinstance(tokenizer.decode(ids[start:end]), str)
    with pytest.raises(UserError, match="50257"):
        tokenizer.decode([50257])
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("\udfff")


def test_gpt2_without_network_says_what_to_do(tmp_path, monkeypatch):
    import requests
    import tiktoken.registry

    def offline(*args, **kwargs):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("tokenizer", [CharTokenizer(ODD), ByteTokenizer()])
def test_save_and_load(tokenizer, tmp_path):
    file = tokenizer.save(tmp_path / "new" / "folder")
    assert [f.name for f in file.parent.iterdir()] == [FILE_NAME]
    assert json.loads(file.read_text())["kind"] == tokenizer.name
    for again in (load_tokenizer(file.parent), type(tokenizer).load(file.parent)):
        assert type(again) is type(tokenizer)
        assert (again.vocab_size, again.settings()) == (tokenizer.vocab_size, tokenizer.settings())
        assert again.decode(again.encode(ODD)) == ODD


def test_save_and_load_gpt2(tiktoken_cache, tmp_path):
    load_tokenizer("gpt2").save(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode(" world") == [995]


def test_load_of_another_kind(tmp_path):
    ByteTokenizer().save(tmp_path)
    with pytest.raises(UserError, match="holds a byte tokenizer, not char"):
        CharTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"kind": "chr"}',
        b'{"kind": ["char"]}',
        b'{"kind": "char"}',
        b'{"kind": "char", "characters": ""}',
        b'{"kind": "char", "characters": "ba"}',
        b'{"kind": "char", "characters": ["a"]}',
        b'{"kind": "char", "characters": "\\ud800"}',
    ],
)
def test_damaged_file_is_named(content, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=FILE_NAME):
        load_tokenizer(tmp_path)


def test_names_that_are_none(tmp_path):
    with pytest.raises(UserError, match="did you mean gpt2"):
        load_tokenizer("gpt-2")
    with pytest.raises(UserError, match="takes its vocabulary from a text"):
        load_tokenizer("char")
    with pytest.raises(UserError, match=f"{FILE_NAME}: no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="empty"):
        build_tokenizer("char", [])


def test_registry_names():
    assert {name: kind.name for name, kind in TOKENIZERS.items()} == {
        name: name for name in ("char", "byte", "gpt2", "bpe", "huggingface", "sentencepiece")
    }
