"""Preparation from text to shards, and the cache."""

import numpy as np
import pytest

from almostgpt.config import DataConfig
from almostgpt.data import prepare as preparation
from almostgpt.data.corpora import Document
from almostgpt.data.prepare import cached_dataset, prepare
from almostgpt.data.survey import place
from almostgpt.data.tokenizer import CharTokenizer
from almostgpt.errors import UserError


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def joined(shards):
    return np.concatenate([np.asarray(shard) for shard in shards]).tolist()


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.001])
def test_tail_split_is_nanogpts(text_file, poem, tmp_path, val_fraction):
    data = DataConfig(path=str(text_file), val_fraction=val_fraction)
    dataset = prepare(data, tmp_path / "out", progress=False)
    stoi = {ch: i for i, ch in enumerate(sorted(set(poem)))}
    ids, n = [stoi[ch] for ch in poem], len(poem)
    assert joined(dataset.train) == ids[: int(n * (1 - val_fraction))]
    assert joined(dataset.val) == ids[int(n * (1 - val_fraction)) :]
    assert dataset.vocab_size == len(stoi)


def test_tail_split_of_tiny_shakespeare(test_data, tmp_path):
    file = test_data / "tinyshakespeare.txt"
    dataset = cached_dataset(DataConfig(path=str(file)), tmp_path, progress=False)
    text = file.read_text()
    stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}
    ids, n = [stoi[ch] for ch in text], len(text)
    assert joined(dataset.train) == ids[: int(n * 0.9)]
    assert joined(dataset.val) == ids[int(n * 0.9) :]
    assert (dataset.vocab_size, dataset.train_tokens, dataset.val_tokens) == (65, 1003854, 111540)


def test_end_of_text_stands_between_documents(text_folder, tmp_path):
    data = DataConfig(path=str(text_folder), tokenizer="byte")
    dataset = prepare(data, tmp_path / "out", progress=False)
    tokens = joined(dataset.train) + joined(dataset.val)
    texts = [file.read_bytes() for file in sorted(text_folder.iterdir())]
    assert tokens == sum(([256, *text] for text in texts), [])[1:]


def test_characters_have_no_separator(text_folder, tmp_path):
    dataset = prepare(DataConfig(path=str(text_folder)), tmp_path / "out", progress=False)
    tokens = joined(dataset.train) + joined(dataset.val)
    text = "".join(file.read_text() for file in sorted(text_folder.iterdir()))
    assert dataset.tokenizer.decode(tokens) == text


def test_document_split_keeps_documents_whole(text_folder, tmp_path):
    data = DataConfig(path=str(text_folder), tokenizer="byte", split="document", val_fraction=0.2)
    dataset = prepare(data, tmp_path / "out", progress=False)
    sides = [
        dataset.tokenizer.decode(joined(shards)).split("<|endoftext|>")
        for shards in (dataset.train, dataset.val)
    ]
    files = sorted(text_folder.iterdir())
    in_val = [place(Document(file.name, file.read_text())) < 0.2 for file in files]
    assert sides[0] == [f.read_text() for f, val in zip(files, in_val, strict=True) if not val]
    assert sides[1] == [f.read_text() for f, val in zip(files, in_val, strict=True) if val]
    assert 1 <= len(sides[1]) <= 20


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_document_split_has_both_sides(text_folder, tmp_path, val_fraction):
    data = DataConfig(path=str(text_folder), split="document", val_fraction=val_fraction)
    dataset = prepare(data, tmp_path / "out", progress=False)
    few = min(dataset.train_tokens, dataset.val_tokens)
    assert few in {len(file.read_text()) for file in text_folder.iterdir()}


def test_document_split_of_one_document(text_file, tmp_path):
    with pytest.raises(UserError, match="two documents or more.*data.split=tail"):
        prepare(DataConfig(path=str(text_file), split="document"), tmp_path / "out", progress=False)


def test_gpt2(text_file, poem, tmp_path, tiktoken_cache):
    import tiktoken

    data = DataConfig(path=str(text_file), tokenizer="gpt2")
    dataset = prepare(data, tmp_path / "out", progress=False)
    reference = tiktoken.get_encoding("gpt2").encode_ordinary(poem)
    assert joined(dataset.train) + joined(dataset.val) == reference
    assert dataset.vocab_size == 50257


def test_many_characters_need_wide_tokens(tmp_path):
    text = "".join(chr(0x10000 + i) for i in range(66_000))
    (tmp_path / "wide.txt").write_text(text, "utf-8")
    dataset = prepare(DataConfig(path=str(tmp_path / "wide.txt")), tmp_path / "out", progress=False)
    assert dataset.train[0].dtype == np.uint32
    assert joined(dataset.train) + joined(dataset.val) == list(range(66_000))


def test_shards_have_a_fixed_size(text_file, tmp_path):
    data = DataConfig(path=str(text_file), shard_tokens=500)
    dataset = prepare(data, tmp_path / "out", progress=False)
    whole = prepare(DataConfig(path=str(text_file)), tmp_path / "whole", progress=False)
    assert [len(shard) for shard in dataset.train[:-1]] == [500] * (len(dataset.train) - 1)
    assert 0 < len(dataset.train[-1]) <= 500 and len(dataset.train) > 2
    assert joined(dataset.train) == joined(whole.train)


@pytest.mark.parametrize("split", ["tail", "document"])
def test_two_preparations_are_identical(text_folder, tmp_path, split):
    data = DataConfig(path=str(text_folder), split=split, shard_tokens=300)
    one, two = (prepare(data, tmp_path / name, progress=False) for name in ("one", "two"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.fingerprint == two.fingerprint


# ---------------------------------------------------------------- the cache


def test_cache_is_used_again_and_keyed_by_content(text_file, poem, tmp_path, monkeypatch):
    data, cache = DataConfig(path=str(text_file)), tmp_path / "cache"
    first = cached_dataset(data, cache, progress=False)
    monkeypatch.setattr(preparation, "_Preparation", None)  # preparing again would fail
    assert cached_dataset(data, cache, progress=False).folder == first.folder
    monkeypatch.undo()
    folders = {first.folder}
    text_file.write_text(poem + "!", "utf-8")
    for change in (
        {},
        {"tokenizer": "byte"},
        {"val_fraction": 0.2},
        {"shard_tokens": 999},
    ):
        folders.add(cached_dataset(DataConfig(path=str(text_file), **change), cache).folder)
    assert len(folders) == 5
    assert sorted((cache / "datasets").iterdir()) == sorted(folders)


def test_cache_folder_comes_from_the_environment(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "elsewhere"))
    dataset = cached_dataset(DataConfig(path=str(text_file)), progress=False)
    assert dataset.folder.parent == tmp_path / "elsewhere" / "datasets"


def test_prepared_folder_brings_its_own_tokenizer(text_file, tmp_path, capsys):
    prepare(DataConfig(path=str(text_file), tokenizer="byte"), tmp_path / "out", progress=False)
    CharTokenizer("abc").save(tmp_path / "abc")
    for name in ("char", "byte", "gpt2", str(tmp_path / "out"), str(tmp_path / "abc")):
        dataset = cached_dataset(DataConfig(path=str(tmp_path / "out"), tokenizer=name), tmp_path)
        assert dataset.tokenizer.name == "byte"
        noted = f"made with the byte tokenizer, not {name}" in capsys.readouterr().err
        assert noted == (name == "gpt2" or name.endswith("abc"))


def test_saved_tokenizer_of_another_text(text_file, tmp_path):
    first = prepare(DataConfig(path=str(text_file)), tmp_path / "first", progress=False)
    small = tmp_path / "small.txt"
    small.write_text("the dog " * 20, "utf-8")
    data = DataConfig(path=str(small), tokenizer=str(first.folder))
    dataset = cached_dataset(data, tmp_path / "cache", progress=False)
    assert dataset.tokenizer.settings() == first.tokenizer.settings()
    small.write_text("the dog §", "utf-8")
    with pytest.raises(UserError, match=r"small\.txt: the character '§'"):
        cached_dataset(data, tmp_path / "cache", progress=False)
