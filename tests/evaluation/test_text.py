"""The same tokens from a text, a shard and a prepared folder; and what is none of them."""

import os

import numpy as np
import pytest

from almostgpt.config import DataConfig
from almostgpt.data.prepare import prepare
from almostgpt.data.shards import write_shard
from almostgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from almostgpt.errors import UserError
from almostgpt.evaluation.text import read_tokens

TEXT = "Ärger! 🙂 to be or not to be\r\n" * 20
TOKENS = np.frombuffer(TEXT.encode(), np.uint8)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return file


def prepared(tmp_path, text_file, **options):
    """A folder of several validation shards."""
    data = DataConfig(path=str(text_file), val_fraction=0.5, shard_tokens=100, **options)
    return prepare(data, tmp_path / "tokens", cache=tmp_path, progress=False)


def test_a_text_is_encoded_byte_for_byte_whatever_its_name(text_file):
    for name in ("text.txt", "README", "code.py"):
        file = text_file.rename(text_file.with_name(name))
        assert np.array_equal(read_tokens(file, ByteTokenizer()), TOKENS)
        text_file = file


def test_a_shard_is_mapped_and_equals_its_text(tmp_path, text_file):
    write_shard(tmp_path / "own.bin", TOKENS.astype(np.uint16))
    tokens = read_tokens(tmp_path / "own.bin", ByteTokenizer())
    assert isinstance(tokens, np.memmap)
    assert np.array_equal(tokens, read_tokens(text_file, ByteTokenizer()))


def test_of_a_prepared_folder_all_shards_that_validate(tmp_path, text_file):
    dataset = prepared(tmp_path, text_file, tokenizer="byte")
    assert len(dataset.val) > 1
    tokens = read_tokens(dataset.folder, ByteTokenizer())
    assert np.array_equal(tokens, TOKENS[len(TOKENS) // 2 :])
    first = read_tokens(dataset.folder / "train_000000.bin", ByteTokenizer())
    assert np.array_equal(first, TOKENS[:100])


def test_of_a_folder_of_public_shards_those_named_val(tmp_path):
    for split, tokens in (("train", TOKENS), ("val", TOKENS[:50])):
        write_shard(tmp_path / f"public_{split}_0.bin", tokens.astype(np.uint16))
    assert np.array_equal(read_tokens(tmp_path, ByteTokenizer()), TOKENS[:50])


def test_shards_of_another_vocabulary_are_refused(tmp_path, text_file):
    dataset = prepared(tmp_path, text_file)  # characters
    of_this_text, of_another = CharTokenizer(TEXT), CharTokenizer(TEXT + "x")
    for path in (dataset.folder, dataset.folder / "val_000000.bin"):
        assert len(read_tokens(path, of_this_text))
        with pytest.raises(UserError, match="made with another char tokenizer"):
            read_tokens(path, of_another)
        with pytest.raises(UserError, match="made with the char tokenizer, but the model with the"):
            read_tokens(path, ByteTokenizer())


def test_a_character_unknown_to_the_model_names_the_file(text_file):
    with pytest.raises(UserError, match=r"text\.txt: the character 'Ä' .* not in the vocabulary"):
        read_tokens(text_file, CharTokenizer("abc"))


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ole")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text: byte 0xe9 at offset 3"):
        read_tokens(tmp_path / "latin.txt", ByteTokenizer())
    (tmp_path / "text.bin").write_bytes(b"text" * 1000)
    with pytest.raises(UserError, match=r"text\.bin: not a token shard"):
        read_tokens(tmp_path / "text.bin", ByteTokenizer())
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read_tokens(tmp_path / "nowhere.txt", ByteTokenizer())
    with pytest.raises(UserError, match="but not a prepared one"):
        read_tokens(tmp_path, ByteTokenizer())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(text_file):
    text_file.chmod(0)
    with pytest.raises(UserError, match=r"text\.txt: cannot be read"):
        read_tokens(text_file, ByteTokenizer())
