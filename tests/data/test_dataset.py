"""Prepared folders: every damage is refused by name; public shards open as they are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from almostgpt.config import DataConfig
from almostgpt.data.dataset import digest_of, open_dataset
from almostgpt.data.prepare import cached_dataset, prepare
from almostgpt.data.shards import write_shard
from almostgpt.errors import UserError


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    base = tmp_path_factory.mktemp("prepared")
    text = base / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 50)
    return prepare(DataConfig(path=str(text), shard_tokens=1000), base / "set", progress=False)


@pytest.fixture
def folder(undamaged, tmp_path):
    return Path(shutil.copytree(undamaged.folder, tmp_path / "set"))


def test_what_a_dataset_holds(folder):
    dataset = open_dataset(folder)
    assert [len(shard) for shard in dataset.train + dataset.val] == [1000, 935, 215]
    assert (dataset.train_tokens, dataset.val_tokens) == (1935, 215)
    assert dataset.vocab_size == dataset.tokenizer.vocab_size
    manifest = json.loads((folder / "dataset.json").read_text())
    assert manifest["tokens"] == {"train": 1935, "val": 215}
    assert manifest["source"]["documents"] == 1
    assert sorted(file.name for file in folder.iterdir()) == [
        "almostgpt_tokenizer.json",
        "dataset.json",
        "train_000000.bin",
        "train_000001.bin",
        "val_000000.bin",
    ]


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


FILES = ["train_000000.bin", "train_000001.bin", "val_000000.bin", "almostgpt_tokenizer.json"]


@pytest.mark.parametrize("name", [*FILES, "dataset.json"])
def test_a_flipped_bit_anywhere_is_refused_by_name(folder, name):
    size = (folder / name).stat().st_size
    for at in {0, 4, 8, 1023, 1024, size // 2, size - 3}:
        if at < size:
            flip(folder / name, at)
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                open_dataset(folder)
            flip(folder / name, at)
    open_dataset(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "extended", "missing", "another's"])
def test_damaged_file_is_refused_by_name(folder, name, damage):
    file = folder / name
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-2])
    elif damage == "extended":
        file.write_bytes(content + b"\0\0")
    elif damage == "missing":
        file.unlink()
    else:
        write_shard(file, np.zeros(1000, np.uint16))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        open_dataset(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 2}', b"\xff", b"null"])
def test_damaged_manifest_is_refused_by_name(folder, content):
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        open_dataset(folder)


def test_manifest_of_other_counts(folder):
    file = folder / "dataset.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0]["tokens"] = 999
    manifest["sha256"] = digest_of({k: v for k, v in manifest.items() if k != "sha256"})
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train_000000\.bin: holds 1000 tokens.*999"):
        open_dataset(folder)


# ---------------------------------------------------------------- public shards


@pytest.fixture
def public(tmp_path):
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    for name, first in [("train_000002", 200), ("train_000001", 100), ("val_000000", 0)]:
        write_shard(folder / f"fineweb_{name}.bin", np.arange(first, first + 50, dtype=np.uint16))
    return folder


def test_public_shards_open_by_name(public, tmp_path, tiktoken_cache):
    dataset = cached_dataset(DataConfig(path=str(public), tokenizer="gpt2"), tmp_path)
    assert [int(shard[0]) for shard in dataset.train] == [100, 200]
    assert [int(shard[0]) for shard in dataset.val] == [0]
    assert (dataset.vocab_size, dataset.train_tokens) == (50257, 100)
    assert dataset.fingerprint != open_dataset(public, "byte").fingerprint


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("fineweb_train_000001.bin", "fineweb_val_000000.bin"),  # modded-nanogpt
        ("edu_fineweb_train_000001.bin", "edu_fineweb_val_000000.bin"),  # llm.c
        ("TinyStories_train.bin", "TinyStories_val.bin"),
        ("finepdfs_train_000001.bin", "finepdfs_val_000000.bin"),
        ("medieval_train_000001.bin", "medieval_val_000000.bin"),
        ("train-00001.bin", "validation-00000.bin"),
        ("Train.bin", "VALID.bin"),
    ],
)
def test_public_names_say_the_split(train, val, tmp_path):
    for name, first in ((train, 100), (val, 0), ("gpt2_tokenizer.bin", 0), ("trained.bin", 0)):
        write_shard(tmp_path / name, np.arange(first, first + 50, dtype=np.uint16))
    dataset = open_dataset(tmp_path, "byte")
    assert [int(shard[0]) for shard in dataset.train] == [100]
    assert [int(shard[0]) for shard in dataset.val] == [0]


def test_public_shards_need_a_tokenizer(public, tmp_path):
    with pytest.raises(UserError, match="set data.tokenizer"):
        cached_dataset(DataConfig(path=str(public)), tmp_path)


def test_public_shards_need_both_splits(public):
    (public / "fineweb_val_000000.bin").unlink()
    with pytest.raises(UserError, match="'train' and 'val'.*fineweb_train_000001"):
        open_dataset(public, "byte")


def test_headerless_files_are_refused(public):
    (public / "fineweb_val_000000.bin").write_bytes(np.arange(5000, dtype=np.uint16).tobytes())
    with pytest.raises(UserError, match=r"fineweb_val_000000\.bin: not a token shard"):
        open_dataset(public, "byte")


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(UserError, match="not a prepared folder"):
        open_dataset(tmp_path)
