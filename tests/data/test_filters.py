"""What is done to documents of every corpus: lengths, normalisation, duplicates."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from almostgpt.config import Config, DataConfig, overlay, resolve
from almostgpt.data.corpora import Document
from almostgpt.data.filters import KEYS, SeenKeys, kept_documents, key_of
from almostgpt.data.prepare import cached_dataset, prepare
from almostgpt.errors import UserError


def test_lengths_count_characters_after_normalisation():
    texts = ["", "e\u0301", "e\u0301e", "abc", "\ufb01x"]
    documents = [Document("a", text) for text in texts]
    for form, length, kept, dropped in [
        ("none", 0, texts[1:], {"empty": 1}),
        ("NFC", 2, ["\u00e9e", "abc", "\ufb01x"], {"empty": 1, "short": 1}),
        ("NFKC", 3, ["abc", "fix"], {"empty": 1, "short": 2}),
    ]:
        counted = Counter()
        found = [d.text for d in kept_documents(documents, form, length, counted)]
        assert (found, dict(counted)) == (kept, dropped)


@given(st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=30), st.integers(0, 30))
def test_seen_keys_are_a_set(batches, resumed_at):
    keys, known = SeenKeys(), set()
    for number, batch in enumerate(batches):
        if number == resumed_at:  # as after a kill: from the keys on the disk
            keys = SeenKeys(np.array(sorted(known), KEYS))
        # Trailing zeros, too: numpy's byte strings end at the last other byte.
        drawn = np.array([value.to_bytes(16, "big")[::-1] for value in batch], KEYS)
        expected = []
        for key in drawn.tolist():
            expected.append(key not in known)
            known.add(key)
        assert keys.add(drawn).tolist() == expected
    assert sum(map(len, keys._runs)) == len(known)


def test_seen_keys_take_16_bytes_each():
    keys = SeenKeys()
    for start in range(0, 200_000, 1000):
        batch = [key_of(str(i).encode()) for i in range(start, start + 1000)]
        assert keys.add(np.array(batch, KEYS)).all()
    assert sum(run.nbytes for run in keys._runs) == 16 * 200_000
    assert len(keys._runs) < 12
    assert not keys.add(np.array([key_of(b"7"), key_of(b"199999")], KEYS)).any()


def test_equal_texts_in_other_files_are_duplicates(tmp_path):
    for name, text in [("a", "same"), ("b", "other"), ("c", "same"), ("d", "e\u0301"), ("e", "é")]:
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    data = DataConfig(path=str(tmp_path / "texts"), tokenizer="byte", deduplicate=True)
    dataset = prepare(data, tmp_path / "out", progress=False)
    tokens = np.concatenate([np.asarray(shard) for shard in dataset.train + dataset.val])
    assert dataset.tokenizer.decode(tokens) == "<|endoftext|>".join(
        ["same", "other", "e\u0301", "é"]
    )


def test_the_cache_knows_what_was_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "three"}\n{"text": "one"}\n')
    data = DataConfig(path=str(tmp_path / "a.jsonl"), tokenizer="byte")
    folders = {
        cached_dataset(overlay(Config(data=data), change).data, tmp_path / "cache", False).folder
        for change in (
            {},
            {"data.deduplicate": True},
            {"data.min_length": 4},
            {"data.min_length": 5},  # keeps the same
            {"data.normalize": "NFC"},  # changes nothing
        )
    }
    assert len(folders) == 3


@pytest.mark.parametrize(
    "option", [{"min_length": 3}, {"deduplicate": True}, {"normalize": "NFC"}, {"column": "text"}]
)
def test_options_of_a_text_are_refused_for_a_prepared_folder(text_file, tmp_path, option):
    prepare(DataConfig(path=str(text_file), tokenizer="byte"), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=f"already prepared, so data.{next(iter(option))} would"):
        cached_dataset(DataConfig(path=str(tmp_path / "out"), **option), tmp_path)


def test_wrong_values_are_refused():
    for change, message in [
        ({"data.normalize": "nfc"}, "data.normalize is 'nfc'"),
        ({"data.min_length": -1}, "data.min_length is -1"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve(overlay(Config(), change))


def test_nothing_left_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    data = DataConfig(path=str(tmp_path / "a.jsonl"), tokenizer="byte", min_length=10)
    with pytest.raises(UserError, match="no text in it to train on: dropped 1 empty, 2 short"):
        prepare(data, tmp_path / "out", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
