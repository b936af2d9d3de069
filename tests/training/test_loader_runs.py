"""Runs with every way to take the data, from text files to the last checkpoint, through the command line."""

import json
from pathlib import Path

import pytest
import torch

from almostgpt import checkpoint, load
from almostgpt.cli.main import main
from almostgpt.config import Config, overlay
from almostgpt.training.plan import vocabulary

TINY = {
    "model.block_size": 16,
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.dropout": 0.1,  # so that the random state matters
    "data.tokenizer": "byte",
    "training.steps": 8,
    "training.batch_size": 4,
    "training.accumulate": 2,
    "training.log_every": 1,
    "training.eval_every": 4,
    "training.eval_batches": 2,
    "checkpoint.every": 4,
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 8,
    "device": "cpu",
}
WAYS = {
    "shuffled": {"data.sampling": "shuffled", "mixed": False},
    "documents, packed": {"data.sampling": "documents", "data.documents": "packed", "mixed": True},
    "documents": {"data.sampling": "documents", "mixed": False},
    "mixture": {"mixed": True},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Two folders of 60 documents, and what they are prepared to."""
    base = tmp_path_factory.mktemp("sets")
    folders = {}
    for name in ("one", "two"):
        text = base / f"{name}-text"
        text.mkdir()
        for number in range(60):
            (text / f"{number:02}.txt").write_text(f"{name} {number} " * (number % 7 + 1))
        folders[name] = base / name
        common = [f"--data.path={text}", "--data.tokenizer=byte", "--data.shard-tokens=500"]
        assert main(["prepare", f"--out={folders[name]}", *common]) == 0
    return folders


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))


def train(out: str, **changes) -> int:
    settings = TINY | changes
    return main(["train", "--out", out, *(f"--{key}={value}" for key, value in settings.items())])


def losses(run: str) -> list[tuple]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line.get("val_loss")) for line in lines]


@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_uninterrupted(sets, way):
    changes = dict(WAYS[way])
    if changes.pop("mixed"):
        changes |= {"data.mixture": f"{sets['one']}=3,{sets['two']}=1"}
    else:
        changes |= {"data.path": sets["one"]}
    assert train("whole", **changes) == 0
    assert train("half", **changes, **{"training.steps": 4}) == 0
    assert main(["train", "--out=half", "--resume", "--training.steps=8"]) == 0
    assert losses("half") == losses("whole")  # bit for bit
    whole, half = (load(run)[0].state_dict() for run in ("whole", "half"))
    assert all(torch.equal(half[name], value) for name, value in whole.items())
    state = checkpoint.read(checkpoint.newest(Path("half"))).state["loader"]
    assert state["row"] == 8 * 2 * 4
    assert sorted(state["weights"] or []) == ([1, 3] if "data.mixture" in changes else [])


def test_a_resumed_run_cannot_change_its_mixture(sets, capsys):
    mixture = ",".join(f"{path}=1" for path in sets.values())
    few = {"training.steps": 2}
    assert train("run", **few, **{"data.mixture": mixture}) == 0
    again = ["train", "--out=run", "--resume", "--training.steps=3"]
    for change in (f"--data.mixture={sets['one']}=1", "--data.mixture=null"):
        assert main([*again, change]) == 2
        assert "data.mixture: the run has" in capsys.readouterr().err
    turned = ",".join(f"{path}=1" for path in reversed(sets.values()))
    assert main([*again, f"--data.mixture={turned}"]) == 0


def test_the_vocabulary_of_a_mixture_is_known_without_opening_it(sets):
    mixture = {str(path): 1.0 for path in sets.values()}
    assert vocabulary(overlay(Config(), {"data.mixture": mixture})) == (257, [])


def test_a_path_given_twice_is_refused(sets, capsys):
    one = sets["one"]
    assert train("run", **{"data.mixture": f"{one}=1,{one.parent}/./one=2"}) == 2
    assert "names a path twice" in capsys.readouterr().err


def test_documents_need_an_end_of_text_token_and_begin_no_run(sets, capsys):
    text = sets["one"].with_name("one-text")
    changes = {"data.path": text, "data.tokenizer": "char", "data.sampling": "documents"}
    assert train("run", **changes) == 2
    err = capsys.readouterr().err
    assert "data.sampling=documents finds" in err and "set data.sampling=shuffled" in err
    assert not Path("run").exists()
