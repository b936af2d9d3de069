"""The training step on a GPU, where nothing may wait for the device and bad numbers stay out."""

from __future__ import annotations

import pytest
import torch

from almostgpt import kernels
from almostgpt.data.prefetch import Prefetcher
from almostgpt.training.schedule import learning_rate
from almostgpt.training.trainer import Trainer, TrainingDiverged

PRECISIONS = ["fp32", "bf16"]


def take_steps(trainer: Trainer, count: int) -> list[torch.Tensor]:
    """The losses of the next steps, still on the device."""
    losses = []
    for _ in range(count):
        step = trainer.step_number + 1
        losses.append(trainer.step(step, learning_rate(trainer.config, step))[0])
        trainer.step_number = step
    return losses


def numbers(losses: list[torch.Tensor]) -> list[float]:
    return torch.stack(losses).tolist()


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def poison(trainer: Trainer, values: list[float]) -> None:
    """Multiplies the loss of the next steps by ``values``, without a wait of the host."""
    factors = iter(torch.tensor(values, device=trainer.device).unbind())
    model = trainer.model

    def forward(*batch):
        return None, model(*batch)[1] * next(factors)

    trainer.forward = forward


@pytest.mark.parametrize("precision", PRECISIONS)
def test_20_steps_on_our_kernels_and_on_the_reference(make_trainer, precision):
    settings = {"training.precision": precision}
    ours = numbers(take_steps(make_trainer("ours", **settings), 20))
    with kernels.use_backend("reference"):
        reference = numbers(take_steps(make_trainer("reference", **settings), 20))
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) <= 0.02
    assert ours[-1] < ours[0] - 0.5  # it learns


@pytest.mark.parametrize("settings", [
    {"training.precision": "fp32"},
    {"training.precision": "bf16", "training.accumulate": 2},
    {"training.precision": "fp16"},
    {"training.precision": "bf16", "optimizer.name": "muon"},
    {"training.precision": "fp16", "optimizer.name": "muon"},
    {"training.precision": "bf16", "model.gradient_checkpointing": "selective"},
    {"training.precision": "bf16", "data.documents": "packed"},
], ids=lambda settings: "-".join(map(str, settings.values())))  # fmt: skip
def test_no_step_waits_for_the_device(make_trainer, no_host_sync, settings):
    trainer = make_trainer(**settings)
    take_steps(trainer, 2)  # allocators and libraries may wait while they start
    no_host_sync()
    take_steps(trainer, 3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_never_reaches_the_weights(make_trainer, no_host_sync, precision, optimizer):
    trainer = make_trainer(**{"training.precision": precision, "optimizer.name": optimizer})
    take_steps(trainer, 2)
    poison(trainer, [1.0, float("nan"), 1.0, 1.0])
    no_host_sync()
    take_steps(trainer, 1)
    good = weights(trainer)
    take_steps(trainer, 3)
    torch.cuda.set_sync_debug_mode("default")
    for before, after in zip(good, weights(trainer), strict=True):
        assert torch.equal(before, after)
    with pytest.raises(TrainingDiverged, match="step 4;"):
        trainer._raise_if_diverged()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_scales_the_loss(make_trainer, optimizer):
    trainer = make_trainer(**{"training.precision": "fp16", "optimizer.name": optimizer})
    losses = numbers(take_steps(trainer, 30))
    assert losses[-1] < losses[0] - 0.5
    trainer._raise_if_diverged()

    before, scale = weights(trainer), trainer.scaler.get_scale()
    poison(trainer, [1e30])  # a finite loss whose gradients overflow fp16
    take_steps(trainer, 1)
    trainer._raise_if_diverged()  # that is expected: a skipped step and a lower scale, no alarm
    assert trainer.scaler.get_scale() == scale / 2
    for old, new in zip(before, weights(trainer), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", [*PRECISIONS, "fp16"])
def test_a_resumed_run_goes_on(make_trainer, precision, optimizer):
    settings = {
        "training.precision": precision,
        "model.dropout": 0.1,
        "optimizer.name": optimizer,
    }
    whole = numbers(take_steps(make_trainer("whole", **settings), 12))
    first = make_trainer("resumed", **settings)
    take_steps(first, 6)
    first.save()
    second = make_trainer("resumed", **settings)
    assert second.step_number == 6
    # Not bit-equal: the gradient of the embedding is summed in no fixed order on a GPU.
    assert numbers(take_steps(second, 6)) == pytest.approx(whole[6:], abs=5e-3)


def test_prepared_batches_arrive_whole(make_trainer):
    """The loader's own, though the device is behind and the thread ahead."""
    trainer = make_trainer(**{"data.documents": "packed"})
    expected = trainer._loader("train")
    busy = torch.randn(4096, 4096, device=trainer.device)
    sums, right = [], []
    with Prefetcher(trainer._loader("train"), trainer.device, ahead=3) as batches:
        for _ in range(50):
            batch = batches.next_batch()
            busy = torch.nn.functional.normalize(busy @ busy)  # what is queued before the use
            sums.append(torch.stack([part.double().sum() for part in batch]))
            del batch  # its memory may be reused once the sums are done, not before
            right.append([part.double().sum().item() for part in expected.next_batch()])
    assert torch.stack(sums).tolist() == right


def test_checkpointing_saves_memory_and_changes_nothing(make_trainer):
    """Bytes at the peak of a step whose activations outweigh all else."""
    settings = {"training.precision": "bf16", "training.batch_size": 256, "model.n_layer": 4}
    losses, peaks = {}, {}
    for kind in ("none", "selective", "full"):
        trainer = make_trainer(kind, **settings, **{"model.gradient_checkpointing": kind})
        take_steps(trainer, 1)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        losses[kind] = numbers(take_steps(trainer, 3))
        peaks[kind] = torch.cuda.max_memory_allocated() - held
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    for kind in ("selective", "full"):
        assert losses[kind] == pytest.approx(losses["none"], abs=2e-3)


@pytest.mark.parametrize("settings", [
    {},
    {"model.gradient_checkpointing": "selective"},
    {"model.gradient_checkpointing": "full"},
    {"optimizer.name": "muon"},
], ids=lambda settings: "-".join(settings.values()) or "plain")  # fmt: skip
def test_the_compiled_trainer_trains(make_trainer, settings):
    trainer = make_trainer(**settings, **{"training.compile": True, "training.precision": "bf16"})
    losses = numbers(take_steps(trainer, 20))
    assert losses[-1] < losses[0] - 0.5
