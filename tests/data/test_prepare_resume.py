"""Preparation in many processes, killed and begun again: the folder is always the same."""

import io
import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest

from almostgpt.config import DataConfig
from almostgpt.data import pieces, workers
from almostgpt.data.prepare import cached_dataset, prepare
from almostgpt.errors import UserError

WORDS = "the of and to in is was he for it with as his on be at by had are but".split()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rows(count, seed=0):
    """Texts of 0 to 300 words, some of them twice."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(300))) for _ in range(count)]
    return texts + draw.choices(texts, k=count // 10)


def write_rows(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def small_batches(monkeypatch):
    for module in ("pieces", "corpora.base", "corpora.tables"):
        monkeypatch.setattr(f"almostgpt.data.{module}.BLOCK_BYTES", 5000)


@pytest.fixture
def source(tmp_path, small_batches):
    return write_rows(tmp_path / "rows.jsonl", rows(400))


def settings_of(file, **changed):
    settings = {"tokenizer": "byte", "shard_tokens": 20_000, "deduplicate": True, "min_length": 20}
    return DataConfig(path=str(file), **{**settings, **changed})


# ---------------------------------------------------------------- many processes


@pytest.mark.parametrize("split", ["tail", "document"])
def test_any_number_of_workers_makes_the_same(source, tmp_path, split):
    data = settings_of(source, split=split)
    one, three = (
        prepare(data, tmp_path / str(count), progress=False, workers=count) for count in (1, 3)
    )
    assert len(one.train) > 5
    assert contents(one.folder) == contents(three.folder)


def test_what_is_dropped_is_reported(source, tmp_path):
    texts = rows(400)
    dataset = prepare(settings_of(source, min_length=200), tmp_path / "out", progress=False)
    manifest = json.loads((dataset.folder / "dataset.json").read_text())
    long = [text for text in texts if len(text) >= 200]
    assert manifest["dropped"] == {
        "duplicate": len(long) - len(set(long)),
        "empty": texts.count(""),
        "short": len([text for text in texts if 0 < len(text) < 200]),
    }
    assert manifest["source"]["documents"] == len(set(long))
    tokens = np.concatenate([np.asarray(shard) for shard in dataset.train + dataset.val])
    assert dataset.tokenizer.decode(tokens).split("<|endoftext|>") == list(dict.fromkeys(long))


def test_char_alphabet_of_many_processes(source, tmp_path):
    data = settings_of(source, tokenizer="char")
    dataset = cached_dataset(data, tmp_path / "cache", progress=False, workers=2)
    assert dataset.tokenizer.characters == "".join(sorted(set("".join(WORDS) + " ")))


def test_workers_hand_on_errors_with_file_and_row(tmp_path, small_batches):
    lines = [json.dumps({"text": text}) for text in rows(300)]
    lines[200] = '{"text": "cut off'
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 201: damaged JSON"):
        prepare(settings_of(file), tmp_path / "out", progress=False, workers=2)


def test_a_worker_that_dies_is_one_message(source, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_START", "import os; os._exit(3)")
    with pytest.raises(UserError, match=r"ended unexpectedly \(code 3\).*--workers"):
        prepare(settings_of(source), tmp_path / "out", progress=False, workers=3)


def test_memory_is_bounded_by_what_waits(source, monkeypatch):
    """The reader is never far ahead of the writer."""
    read = 0

    def batches():
        nonlocal read
        for _ in range(200):
            read += 1
            yield pieces.Batch([pieces.Block("f", "f", b'{"text": "abc"}', 1)])

    task = pieces.Task("text", None, 0, "none", False, False)
    ahead = [
        read - taken for taken, _ in enumerate(workers.pieces_of(batches(), task, None, 2, None))
    ]
    assert len(ahead) == 200 and max(ahead) <= 2 * workers.BATCHES_A_WORKER + 1


# ---------------------------------------------------------------- kills


def killed_after(calls, data, out):
    """Prepares in a child that is killed (-9) at a call that changes the disk; whether it was."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(calls, data, out))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _child(calls, data, out):
    left = calls

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "truncate"):
        setattr(os, name, counted(getattr(os, name)))
    prepare(data, out, progress=False, workers=1)


def points(run, first, step):
    """Calls ``run(n)`` for n = first, first + step, … until it returns False; how often it did."""
    number = first
    while run(number):
        number += step
    return (number - first) // step


@pytest.mark.parametrize("split", ["tail", "document"])
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_change_of_the_disk(source, tmp_path, split, step):
    data = settings_of(source, split=split)
    expected = contents(prepare(data, tmp_path / "undisturbed", progress=False).folder)

    def run(number):
        out = tmp_path / f"out{number}"
        killed = killed_after(number, data, out)
        if killed:
            assert not out.exists() or contents(out) == expected
        if not out.exists():
            prepare(data, out, progress=False)
        assert contents(out) == expected
        return killed

    assert points(run, 3, step) > 50 // step
    assert not list(tmp_path.glob(".*.unfinished"))


def test_finished_shards_are_not_made_again(source, tmp_path, monkeypatch):
    data = settings_of(source)
    killed_after(25, data, tmp_path / "out")
    folder = tmp_path / ".out.unfinished"
    done = json.loads((folder / "journal.json").read_text())
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("all_*.bin")}
    finished = [f"all_{i:06d}.bin" for i in range(len(done["runs"]["all"]["shards"]))]
    encoded, make_piece = [], workers.make_piece

    def counting(task, tokenizer, blocks):
        encoded.append(blocks)
        return make_piece(task, tokenizer, blocks)

    monkeypatch.setattr(workers, "make_piece", counting)
    prepare(data, tmp_path / "out", progress=False, workers=1)
    whole = len(encoded)
    prepare(data, tmp_path / "again", progress=False, workers=1)
    assert len(finished) > 2 and done["batches"] > 3
    assert whole == len(encoded) - whole - done["batches"]
    for name in finished:  # renamed, not written
        after = tmp_path / "out" / name.replace("all", "train")
        assert not after.exists() or after.stat().st_mtime_ns == before[name]


@pytest.mark.slow
def test_killed_at_random_moments_with_workers(tmp_path):
    """The processes of a killed one end, too; each try goes on where the last one was killed."""
    file = write_rows(tmp_path / "rows.jsonl", rows(20_000))
    data = settings_of(file, shard_tokens=300_000)
    expected = contents(prepare(data, tmp_path / "undisturbed", progress=False, workers=1).folder)
    draw, kills = random.Random(1), 0
    context = multiprocessing.get_context("fork")
    while not (tmp_path / "out").exists():
        process = context.Process(
            target=prepare, args=(data, tmp_path / "out"), kwargs={"progress": False, "workers": 2}
        )
        process.start()
        process.join(draw.uniform(0.05, 0.3 + 0.1 * kills))
        kills += process.is_alive()
        children = _children(process.pid)
        process.kill()
        process.join()
        deadline = time.monotonic() + 20
        while any(map(_runs, children)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert kills > 0
    assert contents(tmp_path / "out") == expected


def _children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- what may have changed meanwhile


def stopped_at_a_bad_row(tmp_path, **changed):
    """A preparation that stopped at line 301; its source, its settings and its folder."""
    texts = rows(400)
    file = write_rows(tmp_path / "rows.jsonl", texts)
    good = file.read_text().split("\n")
    file.write_text("\n".join([*good[:300], "{", *good[301:]]))
    data = settings_of(file, **changed)
    with pytest.raises(UserError, match="line 301"):
        prepare(data, tmp_path / "out", progress=False)
    assert len(list((tmp_path / ".out.unfinished").glob("*.bin"))) > 2
    return file, good, data


def test_a_mended_row_is_gone_on_with(tmp_path, small_batches):
    file, good, data = stopped_at_a_bad_row(tmp_path)
    file.write_text("\n".join(good))
    dataset = prepare(data, tmp_path / "out", progress=False)
    assert contents(dataset.folder) == contents(prepare(data, tmp_path / "new").folder)


def test_a_source_that_changed_where_it_was_read(tmp_path, small_batches):
    file, good, data = stopped_at_a_bad_row(tmp_path)
    file.write_text("\n".join(["{}", *good]))
    with pytest.raises(UserError, match="changed since.*unfinished to begin anew"):
        prepare(data, tmp_path / "out", progress=False)
    file.write_text("\n".join(good))  # nothing was lost by the refusal
    prepare(data, tmp_path / "out", progress=False)


def test_other_settings_are_refused(tmp_path, small_batches):
    file, good, data = stopped_at_a_bad_row(tmp_path)
    file.write_text("\n".join(good))
    with pytest.raises(UserError, match=r"other settings \(data.min_length, data.split\)"):
        prepare(settings_of(file, min_length=3, split="document"), tmp_path / "out", progress=False)


def test_the_place_of_the_source_does_not_matter(tmp_path, small_batches):
    file, good, data = stopped_at_a_bad_row(tmp_path)
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    moved.write_text("\n".join(good))
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        prepare(data, tmp_path / "out", progress=False)
    prepare(settings_of(moved), tmp_path / "out", progress=False)


@pytest.mark.parametrize("damage", ["journal", "shard", "keys"])
def test_a_damaged_working_folder(tmp_path, small_batches, damage):
    file, good, data = stopped_at_a_bad_row(tmp_path)
    file.write_text("\n".join(good))
    folder = tmp_path / ".out.unfinished"
    damaged = {"journal": "journal.json", "shard": "all_000001.bin", "keys": "seen.bin"}[damage]
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content[: len(content) // 2])
    if damage == "journal":  # nothing else says how far it was: begun anew
        expected = contents(prepare(data, tmp_path / "new", progress=False).folder)
        assert contents(prepare(data, tmp_path / "out", progress=False).folder) == expected
    else:
        with pytest.raises(UserError, match=damaged):
            prepare(data, tmp_path / "out", progress=False)


def test_a_message_that_ends_in_its_middle_is_none():
    """The other side was killed while it wrote: what came of a block is not taken for the block."""
    whole = io.BytesIO()
    pieces.send(whole, {"blocks": []}, b"0123456789", b"")
    sent = whole.getvalue()
    assert pieces.receive(io.BytesIO(sent)) == (
        {"blocks": [], "sizes": [10, 0]},
        [b"0123456789", b""],
    )
    for length in range(len(sent)):
        assert pieces.receive(io.BytesIO(sent[:length])) is None
