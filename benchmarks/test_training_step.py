"""A whole training step, ours against the same model written plainly (plain_gpt.py).

The step is what each would do in real life: fetch a batch, forward, backward, clip, update. Before
anything is timed, our weights go into the plain model and both must give the same loss.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from almostgpt.config import Config, resolve
from almostgpt.config_file import load_config
from almostgpt.data.dataset import Dataset
from almostgpt.data.shards import open_shard, write_shard
from almostgpt.model import GPT
from almostgpt.training.schedule import learning_rate
from almostgpt.training.trainer import AUTOCAST, Trainer

from . import harness
from .plain_gpt import PlainConfig, PlainGPT, PlainTrainer


@dataclass(frozen=True)
class Case:
    """A preset as it is trained, but for accumulation, which would only repeat the step."""

    preset: str
    position: str
    vocab_size: int  # of characters; or GPT-2's, padded as nanoGPT does
    batch_size: int


ON_CUDA = harness.DEVICE.type == "cuda"
if ON_CUDA:
    CASES = [
        Case("shakespeare-char", "rope", 65, 64),
        Case("gpt2-124m", "learned", 50304, 16),
    ]
else:  # the preset as it is, and with nanoGPT's positions
    CASES = [
        Case("shakespeare-char-cpu", "rope", 65, 12),
        Case("shakespeare-char-cpu", "learned", 65, 12),
    ]
CALLS = 10 if ON_CUDA else 1
SECONDS = 10 if ON_CUDA else 5
STEP = 200  # which step's learning rate; after the warm-up


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.preset}-{case.position}")
def test_training_step(case: Case, compiled: bool, race, report, benchmark, tmp_path):
    trouble = harness.compile_trouble() if compiled else None
    if trouble:
        pytest.skip(trouble)
    config = case_config(case, compiled)
    ours, plain = make_trainers(config, tmp_path)
    check_equal(ours.model, plain.model)

    lr = learning_rate(config, STEP)
    peers = {
        "almostgpt": lambda: lambda: ours.step(STEP, lr),
        "plain": lambda: lambda: plain.step(lr),
    }
    result = race(peers, harness.wall_timer(CALLS), seconds=SECONDS)

    ratio = result.speedup("almostgpt", over="plain")
    mode = "torch.compile" if compiled else "eager"
    report(
        harness.Table(
            f"training step, {case.preset}, {case.position} positions, "
            f"{config.training.precision}, {mode}: ours is {ratio:.3f} times as fast",
            ("", "ms/step", "± %", "tokens/s", "speed-up"),
            [
                [
                    name,
                    1e3 * result.median(name),
                    100 * result.spread(name),
                    ours.tokens_per_step / result.median(name),
                    result.speedup(name, over="plain"),
                ]
                for name in peers
            ],
        )
    )
    benchmark.extra_info["ratio"] = ratio


def case_config(case: Case, compiled: bool) -> Config:
    config = load_config(case.preset)
    return resolve(
        dataclasses.replace(
            config,
            # Without dropout, which would make the losses differ.
            model=dataclasses.replace(
                config.model, position=case.position, vocab_size=case.vocab_size, dropout=0.0
            ),
            training=dataclasses.replace(
                config.training, batch_size=case.batch_size, accumulate=1, compile=compiled
            ),
        )
    )


def make_trainers(config: Config, folder: Path) -> tuple[Trainer, PlainTrainer]:
    """Both on the same tokens, random ones: the time of a step does not depend on them."""
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=1_000_000)
    tokens = tokens.astype(np.uint16)
    write_shard(folder / "shard.bin", tokens)
    tokens.tofile(folder / "plain.bin")
    shards = [open_shard(folder / "shard.bin")]
    dataset = Dataset(folder, None, shards, shards, fingerprint="random")
    ours = Trainer(config, dataset, folder, harness.DEVICE)

    model = PlainGPT(
        PlainConfig(
            block_size=config.model.block_size,
            vocab_size=config.model.vocab_size,
            n_layer=config.model.n_layer,
            n_head=config.model.n_head,
            n_embd=config.model.n_embd,
            rope=config.model.position == "rope",
            gelu_approximate="tanh" if config.model.feedforward == "gelu_tanh" else "none",
        )
    )
    plain = PlainTrainer(
        model.to(harness.DEVICE),
        folder / "plain.bin",
        batch_size=config.training.batch_size,
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        dtype=AUTOCAST.get(config.training.precision),
        compile=config.training.compile,
    )
    return ours, plain


def check_equal(ours: GPT, plain: PlainGPT) -> None:
    """Copies our weights into the plain model; the two must then be the same function."""
    copy_weights(ours, plain)
    generator = torch.Generator().manual_seed(0)
    shape = (4, plain.config.block_size)
    ids, targets = (
        torch.randint(plain.config.vocab_size, shape, generator=generator).to(harness.DEVICE)
        for _ in range(2)
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, targets)[1], plain(ids, targets)[1])


def copy_weights(ours: GPT, plain: PlainGPT) -> None:
    """Our parameters under the plain model's names, the vocabulary's padding left out."""
    weights = {
        "wte.weight": ours.token_embedding.weight[: plain.config.vocab_size],
        "lm_head.weight": ours.token_embedding.weight[: plain.config.vocab_size],
        "ln_f.weight": ours.norm.weight,
    }
    if plain.wpe is not None:
        weights["wpe.weight"] = ours.position.weight
    for i, block in enumerate(ours.blocks):
        weights |= {
            f"h.{i}.ln_1.weight": block.attention_norm.weight,
            f"h.{i}.attn.c_attn.weight": block.attention.qkv.weight,
            f"h.{i}.attn.c_proj.weight": block.attention.out.weight,
            f"h.{i}.ln_2.weight": block.feedforward_norm.weight,
            f"h.{i}.mlp.c_fc.weight": block.feedforward.up.weight,
            f"h.{i}.mlp.c_proj.weight": block.feedforward.down.weight,
        }
    plain.load_state_dict(weights)
