"""A whole training step, ours against the same model written plainly (plain_gpt.py).

The step is what each would do in real life: fetch a batch, forward, backward, clip, update, in a
process of its own (steppers.py). Both begin with the same weights, and must give the same loss.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from almostgpt import kernels
from almostgpt.config import Config, overlay, resolve
from almostgpt.config_file import load_config
from almostgpt.data.dataset import Dataset
from almostgpt.data.shards import open_shard, write_shard
from almostgpt.model import GPT
from almostgpt.training.schedule import learning_rate
from almostgpt.training.trainer import AUTOCAST, Trainer

from . import harness
from .plain_gpt import PlainConfig, PlainGPT, PlainTrainer
from .steppers import Step, steppers


@dataclass(frozen=True)
class Case:
    """A preset as it is trained, but for accumulation, which would only repeat the step."""

    preset: str
    position: str
    vocab_size: int  # of characters; or GPT-2's, padded as nanoGPT does
    batch_size: int
    changed: tuple[tuple[str, object], ...] = ()  # settings of the model or the training

    def __str__(self) -> str:
        return "-".join([self.preset, self.position, *(f"{k}{v}" for k, v in self.changed)])


ON_CUDA = harness.DEVICE.type == "cuda"
if ON_CUDA:
    CASES = [
        Case("shakespeare-char", "rope", 65, 64),
        Case("gpt2-124m", "learned", 50304, 16),
    ]
    CALLS = {case: 10 for case in CASES}
else:  # the preset as it is, and with nanoGPT's positions; GPT-2's size, as far as a laptop goes
    SMALL = [
        Case("shakespeare-char-cpu", "rope", 65, 12),
        Case("shakespeare-char-cpu", "learned", 65, 12),
    ]
    CASES = [*SMALL, Case("gpt2-124m", "learned", 50304, 1, (("block_size", 256),))]
    CALLS = {case: 10 if case in SMALL else 1 for case in CASES}
SECONDS = 10 if ON_CUDA else 8
STEP = 200  # which step's learning rate; after the warm-up


def cases() -> list:
    """Every case, eager and compiled; to compile a large model for a CPU takes minutes."""
    return [
        pytest.param(
            case,
            compiled,
            id=f"{case}-{'compiled' if compiled else 'eager'}",
            marks=pytest.mark.slow if compiled and case_is_large(case) else (),
        )
        for case in CASES
        for compiled in (False, True)
    ]


def case_is_large(case: Case) -> bool:
    return not ON_CUDA and case not in SMALL


@pytest.mark.parametrize("case, compiled", cases())
def test_training_step(case: Case, compiled: bool, race, report, benchmark, tmp_path):
    trouble = harness.compile_trouble() if compiled else None
    if trouble:
        pytest.skip(trouble)
    config = case_config(case, compiled)
    write_tokens(tmp_path, config.model.vocab_size)
    makers = {"almostgpt": (make_ours, config, tmp_path), "plain": (make_plain, config, tmp_path)}
    if case_is_large(case) and not compiled:  # where products take nearly all of the time
        medium = overlay(config, {"training.matmul": "medium"})
        makers["almostgpt, matmul medium"] = (make_ours, medium, tmp_path)
    if ON_CUDA:  # on a CPU that is what ours runs anyway
        makers["almostgpt, all references"] = (make_reference, config, tmp_path)
    with steppers(makers) as peers:
        losses = {name: stepper.made for name, stepper in peers.items()}
        exact = config.training.precision == "fp32"
        for loss in losses.values():
            assert math.isclose(loss, losses["plain"], rel_tol=1e-4 if exact else 1e-2)
        calls = CALLS[case]
        timers = {name: stepper.seconds for name, stepper in peers.items()}
        result = race(timers, lambda peer: peer(calls), seconds=SECONDS)
        peaks = {name: stepper.peak_bytes() for name, stepper in peers.items()}

    ratio = result.speedup("almostgpt", over="plain")
    mode = "torch.compile" if compiled else "eager"
    tokens = config.training.batch_size * config.model.block_size
    report(
        harness.Table(
            f"training step, {case}, {config.training.precision}, {mode}: "
            f"ours is {ratio:.3f} times as fast",
            ("", "ms/step", "± %", "tokens/s", "speed-up", "peak MiB"),
            [
                [
                    name,
                    1e3 * result.median(name),
                    100 * result.spread(name),
                    tokens / result.median(name),
                    result.speedup(name, over="plain"),
                    peaks[name] / 2**20,
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
                config.model,
                position=case.position,
                vocab_size=case.vocab_size,
                dropout=0.0,
                **dict(case.changed),
            ),
            training=dataclasses.replace(
                config.training,
                batch_size=case.batch_size,
                accumulate=1,
                compile=compiled,
                # No processor here has matrix units for bfloat16: autocast only makes it slower.
                precision=config.training.precision if ON_CUDA else "fp32",
            ),
        )
    )


def write_tokens(folder: Path, vocab_size: int) -> None:
    """The same for both, random ones: the time of a step does not depend on them."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=1_000_000).astype(np.uint16)
    write_shard(folder / "shard.bin", tokens)
    tokens.tofile(folder / "plain.bin")


def make_ours(config: Config, folder: Path) -> tuple[Step, float]:
    """A step of our trainer, and the loss it begins with."""
    shards = [open_shard(folder / "shard.bin")]
    dataset = Dataset(folder, None, shards, shards, fingerprint="random")
    trainer = Trainer(config, dataset, folder, harness.DEVICE)
    lr = learning_rate(config, STEP)
    return lambda: trainer.step(STEP, lr), first_loss(trainer.model, config)


def make_reference(config: Config, folder: Path) -> tuple[Step, float]:
    """The same without any kernel of ours; the process is its own, so nobody has to undo it."""
    kernels.use_backend("reference").__enter__()
    return make_ours(config, folder)


def make_plain(config: Config, folder: Path) -> tuple[Step, float]:
    """A step of the plain trainer, and the loss it begins with: of our weights."""
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
    torch.manual_seed(config.seed)  # as the trainer does
    copy_weights(GPT(config.model), model)
    trainer = PlainTrainer(
        model.to(harness.DEVICE),
        folder / "plain.bin",
        batch_size=config.training.batch_size,
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        dtype=AUTOCAST.get(config.training.precision),
        compile=config.training.compile,
    )
    lr = learning_rate(config, STEP)
    return lambda: trainer.step(lr), first_loss(model, config)


@torch.no_grad()
def first_loss(model: torch.nn.Module, config: Config) -> float:
    generator = torch.Generator().manual_seed(0)
    ids, targets = (
        torch.randint(
            config.model.vocab_size, (4, config.model.block_size), generator=generator
        ).to(harness.DEVICE)
        for _ in range(2)
    )
    return float(model(ids, targets)[1])


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
