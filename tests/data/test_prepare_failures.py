"""What may go wrong while data is prepared: nothing half-made is ever taken for whole."""

import errno
import threading
import time

import numpy as np
import pytest

from almostgpt.config import DataConfig
from almostgpt.data import prepare as preparation
from almostgpt.data.dataset import open_dataset
from almostgpt.data.prepare import cached_dataset, prepare
from almostgpt.data.tokenizer import ByteTokenizer
from almostgpt.errors import UserError


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def joined(shards):
    return np.concatenate([np.asarray(shard) for shard in shards]).tolist()


def test_two_writers_at_once_agree(text_file, tmp_path, monkeypatch):
    """Both looked into the empty cache: one does the work, the other waits for it."""
    data, cache = DataConfig(path=str(text_file)), tmp_path / "cache"
    barrier, results, written = threading.Barrier(2, timeout=20), [], []
    build_tokenizer, write_manifest = preparation.build_tokenizer, preparation.write_manifest

    def together(*args):  # after the survey, before the folder is looked for
        barrier.wait()
        return build_tokenizer(*args)

    def slowly(*args):
        written.append(args)
        time.sleep(0.3)
        write_manifest(*args)

    monkeypatch.setattr(preparation, "build_tokenizer", together)
    monkeypatch.setattr(preparation, "write_manifest", slowly)
    threads = [
        threading.Thread(target=lambda: results.append(cached_dataset(data, cache, False)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0].folder == results[1].folder
    assert len(written) == 1
    assert joined(results[0].train) == joined(results[1].train)
    assert list((cache / "datasets").iterdir()) == [results[0].folder]


def test_two_writers_of_one_folder(text_file, tmp_path, monkeypatch):
    """For a folder that a user names, the second one is told."""
    data, other = DataConfig(path=str(text_file)), []

    def meanwhile(*args):
        with pytest.raises(UserError, match="another process is preparing it") as error:
            prepare(data, tmp_path / "out", progress=False)
        other.append(error)
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "write_manifest", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out", progress=False)
    assert len(other) == 1


def test_output_in_use_is_left_alone(text_file, tmp_path):
    data, out = DataConfig(path=str(text_file)), tmp_path / "out"
    out.mkdir()
    prepare(data, out, progress=False)  # an empty folder is fine
    before = contents(out)
    with pytest.raises(UserError, match="out: already exists"):
        prepare(data, out, progress=False)
    assert contents(out) == before


class FullDisk:
    """Stands for ``open``: files that take ``room`` bytes in all, then no more."""

    def __init__(self, room):
        self.room = room

    def __call__(self, path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        if not set(mode) & set("wa+"):
            return file
        disk, write = self, file.write

        class Writer:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, content):
                disk.room -= len(content)
                if disk.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(content)

        return Writer()


@pytest.mark.parametrize("split", ["tail", "document"])
def test_full_disk_is_one_message_and_nothing_is_lost(text_folder, tmp_path, monkeypatch, split):
    settings = {"split": split, "tokenizer": "byte", "deduplicate": True, "shard_tokens": 400}
    data, cache = DataConfig(path=str(text_folder), **settings), tmp_path / "cache"
    reference = prepare(data, tmp_path / "undisturbed", progress=False)
    monkeypatch.setattr("almostgpt.data.pieces.BLOCK_BYTES", 500)  # several batches
    failures, continued, room = 0, 0, 0
    while True:  # the disk is full after 0, 700, 1400 ... bytes: in shards, journal, json
        disk = FullDisk(room)
        for module in ("files", "data.token_runs", "data.encoding", "data.journal"):
            monkeypatch.setattr(f"almostgpt.{module}.open", disk, raising=False)
        try:
            dataset = cached_dataset(data, cache, progress=False)
            break
        except UserError as error:
            assert "No space left on device" in str(error) and "Make room" in str(error)
            failures += 1
        left = [folder.name for folder in (cache / "datasets").iterdir()]
        assert all(name.endswith(".unfinished") for name in left) and len(left) <= 1
        continued += len(left)
        room += 700
    assert failures > 5 and continued > 2
    assert disk.room >= 0
    assert contents(dataset.folder) == contents(reference.folder)
    assert list((cache / "datasets").iterdir()) == [dataset.folder]


def test_interruption_of_a_beginning_leaves_nothing(text_file, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("almostgpt.data.encoding._Sink.take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(DataConfig(path=str(text_file)), tmp_path / "out", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["poem.txt"]


def test_interruption_keeps_what_is_finished(text_file, poem, tmp_path, monkeypatch, capsys):
    data = DataConfig(path=str(text_file))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out")
    assert "is kept in" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.setattr("almostgpt.data.pieces._encode", None)  # nothing is encoded again
    dataset = prepare(data, tmp_path / "out")
    assert "going on after" in capsys.readouterr().err
    assert dataset.tokenizer.decode(joined(dataset.train + dataset.val)) == poem
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "poem.txt"]


def test_unusable_cache(text_file, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match="ALMOSTGPT_CACHE"):
        cached_dataset(DataConfig(path=str(text_file)), tmp_path / "cache", progress=False)


def test_too_large_shards(text_file, tmp_path):
    data = DataConfig(path=str(text_file), shard_tokens=2**31)
    with pytest.raises(UserError, match="data.shard_tokens"):
        prepare(data, tmp_path / "out", progress=False)


def test_progress_is_plain_lines_on_stderr(text_file, tmp_path, capsys):
    data = DataConfig(path=str(text_file), tokenizer="byte")
    prepare(data, tmp_path / "out", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["preparing", "prepared"]
    prepare(data, tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    assert open_dataset(tmp_path / "quiet").vocab_size == ByteTokenizer.vocab_size
