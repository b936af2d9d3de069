"""Runs with ``data.documents=packed``, from text files to the last checkpoint."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels, load
from almostgpt.cli.main import main
from almostgpt.config_file import load_config
from almostgpt.data.prepare import cached_dataset
from almostgpt.errors import UserError

TINY = {
    "model.block_size": 16,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.dropout": 0.1,  # so that the random state matters
    "data.tokenizer": "byte",
    "data.documents": "packed",
    "data.sampling": "sequential",
    "training.steps": 12,
    "training.batch_size": 4,
    "training.accumulate": 2,
    "training.log_every": 1,
    "training.eval_every": 6,
    "training.eval_batches": 3,
    "checkpoint.every": 4,
    "schedule.warmup_steps": 5,
    "schedule.decay_steps": 12,
    "device": "cpu",
}
END = 256  # the byte tokenizer's


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """300 documents of 1 to 30 characters: shorter and longer than a row."""
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder, draw = tmp_path / "texts", random.Random(0)
    folder.mkdir()
    for number in range(300):
        words = " ".join(draw.choices(["a", "fox", "jumps", "sleeps", "under", "trees"], k=6))
        (folder / f"{number:03}.txt").write_text(words[: draw.randint(1, 30)])
    return folder


def train(texts: Path, out: str, **changes) -> int:
    settings = {**TINY, "data.path": str(texts), **changes}
    return main(["train", "--out", out, *(f"--{key}={value}" for key, value in settings.items())])


def losses(run: str) -> list[tuple]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line.get("val_loss")) for line in lines]


def cut(row: list[int]) -> list[list[int]]:
    """A row's documents: each END begins one, unless nothing stands before it."""
    begins = [0, *(i for i in range(1, len(row)) if row[i] == END)]
    return [row[begin:end] for begin, end in zip(begins, [*begins[1:], len(row)], strict=True)]


def test_validation_loss_is_that_of_each_document_alone(texts):
    """From the prepared tokens, without the loader: row after row, document after document."""
    assert train(texts, "run") == 0
    model, _ = load("run")
    (val,) = cached_dataset(load_config("run/config.yaml").data).val
    assert END in val
    nats = []
    for start in range(0, 3 * 4 * 16, 16):
        start %= (len(val) - 1) // 16 * 16  # round and round
        row, targets = val[start : start + 16].tolist(), val[start + 1 : start + 17].tolist()
        with torch.no_grad():
            logits = [model(torch.tensor([d]), all_logits=True)[0][0] for d in cut(row)]
        nats.append(F.cross_entropy(torch.cat(logits), torch.tensor(targets)).item())
    assert losses("run")[-1][3] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_packing_changes_the_steps_and_not_their_data(texts):
    changes = {"training.steps": 3}
    assert train(texts, "packed", **changes) == train(texts, "packed-again", **changes) == 0
    assert train(texts, "ignored", **changes, **{"data.documents": "ignore"}) == 0
    assert losses("packed") == losses("packed-again")
    for packed, ignored in zip(losses("packed"), losses("ignored"), strict=True):
        assert packed[1] != ignored[1] and packed[1] == pytest.approx(ignored[1], rel=0.05)
    assert len(list(Path("cache/datasets").iterdir())) == 1  # prepared once for both


def test_resumed_is_uninterrupted(texts):
    assert train(texts, "whole") == 0
    assert train(texts, "half", **{"training.steps": 6}) == 0
    assert main(["train", "--out=half", "--resume", "--training.steps=12"]) == 0
    assert losses("half") == losses("whole")  # bit for bit
    whole, half = (load(run)[0].state_dict() for run in ("whole", "half"))
    assert all(torch.equal(half[name], value) for name, value in whole.items())


def test_a_resumed_run_cannot_change_it(texts, capsys):
    assert train(texts, "run", **{"training.steps": 2}) == 0
    assert main(["train", "--out=run", "--resume", "--data.documents=ignore"]) == 2
    assert "data.documents: the run has 'packed', now 'ignore'" in capsys.readouterr().err


def test_a_tokenizer_without_end_of_text_is_named_and_begins_no_run(texts, capsys):
    """For text, and for a prepared folder, which brings its own tokenizer."""
    assert train(texts, "run", **{"data.tokenizer": "char"}) == 2
    err = capsys.readouterr().err
    assert "data.documents=packed" in err and "the char tokenizer has none" in err
    assert main(["prepare", "--out=chars", f"--data.path={texts}"]) == 0
    assert train(Path("chars"), "run") == 2
    assert "the char tokenizer has none" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_prepared_folder_with_end_of_text_trains(texts):
    prepare = ["prepare", "--out=bytes", f"--data.path={texts}", "--data.tokenizer=byte"]
    assert main(prepare) == 0
    changes = {"training.steps": 2}
    assert train(Path("bytes"), "prepared", **changes, **{"data.tokenizer": "char"}) == 0
    assert train(texts, "cached", **changes) == 0
    assert losses("prepared") == losses("cached")


def test_a_backend_that_cannot_pack_begins_no_run(texts, monkeypatch, capsys):
    original = kernels.flash_attention

    def without_packing(*args, cu_seqlens=None, **options):
        if cu_seqlens is not None:
            raise UserError("a forced backend knows no documents")
        return original(*args, **options)

    monkeypatch.setattr(kernels, "flash_attention", without_packing)
    assert train(texts, "run") == 2
    assert "knows no documents" in capsys.readouterr().err
    assert not Path("run").exists()
    assert train(texts, "run", **{"data.documents": "ignore", "training.steps": 1}) == 0


@pytest.mark.slow
def test_compiled_training_follows_eager(texts):
    # As in a process of its own: where other tests compiled the model for other sizes, all sizes are
    # symbols here, and Inductor simplifies them for many minutes.
    torch._dynamo.reset()
    changes = {"model.dropout": 0.0}
    assert train(texts, "eager", **changes) == 0
    assert train(texts, "compiled", **changes, **{"training.compile": "true"}) == 0
    for eager, compiled in zip(losses("eager"), losses("compiled"), strict=True):
        assert compiled[1] == pytest.approx(eager[1], abs=2e-3)
