"""A trainer whose batches a thread prepares, as on a GPU; here on CPU tensors."""

import io
import os
import signal
import threading

import numpy as np
import pytest
import torch

from almostgpt import checkpoint
from almostgpt.data.prefetch import Prefetcher
from almostgpt.errors import UserError
from almostgpt.training.progress import PlainProgress
from almostgpt.training.trainer import Trainer

SETTINGS = {
    "model.dropout": 0.1,
    "training.steps": 12,
    "training.accumulate": 2,
    "training.log_every": 1,
    "training.eval_every": 6,
    "training.eval_batches": 2,
    "checkpoint.every": 4,
}


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def train(trainer: Trainer, *, ahead: int) -> list[tuple]:
    """What each step logged."""
    trainer.batches = Prefetcher(trainer.loader, trainer.device, ahead=ahead)
    progress = PlainProgress(io.StringIO())
    lines = []
    progress.step = lambda step, steps, metrics, left: lines.append(
        (step, metrics["loss"], metrics["grad_norm"], metrics.get("val_loss"))
    )
    trainer.train(progress)
    return lines


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_steps_are_the_same_and_so_is_what_is_saved(make_trainer):
    plain = make_trainer("plain", **SETTINGS)
    expected = train(plain, ahead=0)
    threaded = make_trainer("threaded", **SETTINGS)
    assert train(threaded, ahead=3) == expected
    one, other = (checkpoint.newest(trainer.run) for trainer in (plain, threaded))
    assert weights(one) == weights(other)
    assert checkpoint.read(one).state["loader"] == checkpoint.read(other).state["loader"]
    assert checkpoint.read(other).state["loader"]["row"] == 24 * 4


def test_a_signal_ends_it_and_the_resumed_run_is_the_uninterrupted_one(make_trainer):
    expected = train(make_trainer("whole", **SETTINGS), ahead=0)
    trainer = make_trainer("stopped", **SETTINGS)
    step = trainer.step

    def signalled(number, rate):
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number, rate)

    trainer.step = signalled
    assert len(train(trainer, ahead=3)) == 7 and trainer.stop_signal == "SIGTERM"
    assert train(make_trainer("stopped", **SETTINGS), ahead=3) == expected[7:]


def test_an_error_of_the_loader_comes_at_its_step(make_trainer):
    """The fifth of the batches that are taken in order is the first with a foreign id."""
    trainer = make_trainer(**SETTINGS, **{"data.sampling": "sequential"})
    (text,) = trainer.dataset.train
    text[4 * 4 * 16 + 5] = 1000
    with pytest.raises(UserError, match="shard 0: token id 1000 is not in the vocabulary"):
        train(trainer, ahead=3)
    assert trainer.step_number == 2  # of two batches each


def test_a_failing_step_ends_the_thread(make_trainer):
    trainer = make_trainer(**SETTINGS)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(np.nan)
    with pytest.raises(UserError, match="not finite at step 1"):
        train(trainer, ahead=3)
