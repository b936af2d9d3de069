"""Tests that need a GPU. Without one they are skipped, and say so.

They live apart from the rest because no continuous integration of this project has a GPU; on a CUDA
machine ``scripts/gpu_report.sh --stage tests`` runs them and keeps the outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from almostgpt.config import overlay, resolve
from almostgpt.config_file import load_config
from almostgpt.data.dataset import Dataset
from almostgpt.data.tokenizer import load_tokenizer
from almostgpt.training.trainer import Trainer

SMALL = {
    "model.block_size": 64,
    "model.vocab_size": 256,
    "model.n_layer": 2,
    "model.n_head": 4,
    "model.n_embd": 128,
    "training.batch_size": 8,
    "training.steps": 100,
    "schedule.warmup_steps": 5,
    "optimizer.lr": 3e-3,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "conformance: a kernel against float64; scripts/gpu_report.sh runs these first"
    )


@pytest.fixture(scope="session", autouse=True)
def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA GPU; torch {torch.__version__} sees none here")


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """``make_trainer(name, **{"training.precision": "bf16"})``: a small one in folder ``name``."""

    def make(name: str = "run", **settings) -> Trainer:
        config = resolve(overlay(load_config("quickstart"), {**SMALL, **settings}))
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        return Trainer(config, walk(tmp_path), run, torch.device("cuda", 0))

    return make


def walk(folder: Path) -> Dataset:
    """A random walk through the 256 bytes: the next one is nearly known, so it can be learned."""
    steps = np.random.default_rng(0).integers(1, 4, size=100_000)
    tokens = (np.cumsum(steps) % 256).astype(np.uint16)
    return Dataset(folder, load_tokenizer("byte"), [tokens], [tokens], fingerprint="walk")


@pytest.fixture
def no_host_sync() -> Iterator[Callable[[], None]]:
    """Call it, and from then on to the end of the test any wait of the host for the GPU raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
