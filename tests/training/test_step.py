"""One training step: what it must not do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from almostgpt.kernels import linear_cross_entropy_reference, values
from almostgpt.training.optimizer import FiniteGuard

READS = {
    "aten::_local_scalar_dense",  # .item(), float(), int(), bool(), if tensor:
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::nonzero",  # and other results whose shape depends on values
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}


class NoReads(TorchDispatchMode):
    """Raises where the host reads a tensor's value, which on a GPU would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in READS:
            raise AssertionError(f"{func.name()} reads a value")
        return func(*args, **(kwargs or {}))


SETTINGS = [
    {},
    {"training.precision": "bf16", "training.accumulate": 2},
    {"training.precision": "fp16"},
    {"optimizer.name": "muon"},
    {"optimizer.name": "muon", "training.precision": "fp16"},
    {"data.documents": "packed", "model.gradient_checkpointing": "selective"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_on_a_device_no_step_reads_a_value(make_trainer, monkeypatch, settings):
    """The device's path on CPU tensors. (tests/gpu sees what happens below the ops as well.)"""
    for module in (values, linear_cross_entropy_reference):
        monkeypatch.setattr(module, "unread", lambda tensor: True)  # as on a GPU
    trainer = make_trainer(**settings)
    trainer.guard = FiniteGuard(torch.device("cpu"), immediate=False)
    with NoReads():
        for step in (1, 2, 3):
            trainer.step(step, 1e-3)


def test_such_a_read_would_be_seen(make_trainer):
    """On a CPU reading is free, and the guard does."""
    trainer = make_trainer()
    assert trainer.guard.immediate
    with pytest.raises(AssertionError, match="_local_scalar_dense reads a value"), NoReads():
        trainer.step(1, 1e-3)
