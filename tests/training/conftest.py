"""A small trainer on made data, for tests that take its steps one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from almostgpt.config import overlay, resolve
from almostgpt.config_file import load_config
from almostgpt.data.dataset import Dataset
from almostgpt.data.tokenizer import load_tokenizer
from almostgpt.training.trainer import Trainer

SMALL = {
    "model.block_size": 16,
    "model.vocab_size": 257,
    "model.n_layer": 2,
    "model.n_head": 4,
    "model.n_kv_head": 2,
    "model.n_embd": 32,
    "training.batch_size": 4,
    "training.steps": 100,
    "schedule.warmup_steps": 5,
    "optimizer.lr": 3e-3,
}


@pytest.fixture
def make_trainer(tmp_path) -> Iterator[Callable[..., Trainer]]:
    """``make_trainer(name, **{"training.precision": "bf16"})``: a small one in folder ``name``."""
    made = []

    def make(name: str = "run", **settings) -> Trainer:
        config = resolve(overlay(load_config("quickstart"), {**SMALL, **settings}))
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        # A random walk through the 256 bytes: the next one is nearly known, so it can be learned.
        steps = np.random.default_rng(0).integers(1, 4, size=20_000)
        tokens = (np.cumsum(steps) % 256).astype(np.uint16)
        data = Dataset(tmp_path, load_tokenizer("byte"), [tokens], [tokens], fingerprint="walk")
        made.append(Trainer(config, data, run, torch.device("cpu")))
        return made[-1]

    yield make
    for trainer in made:
        trainer.batches.close()
