"""The same training by the kernels, by a compiler and by the reference: the losses must agree.

The CUDA kernels run in the emulator and the Triton kernels in Triton's interpreter, on CPU tensors.
"""

import contextlib

import pytest
import torch

from almostgpt import kernels
from almostgpt.kernels import emulator, triton_ops


def losses(make_trainer, name: str, steps: int, **settings) -> list[float]:
    trainer = make_trainer(name, **settings)
    with trainer.batches:
        return [float(trainer.step(step, 1e-2)[0]) for step in range(1, steps + 1)]


def gradients(make_trainer, name: str, **settings) -> dict[str, torch.Tensor]:
    trainer = make_trainer(name, **settings)
    with trainer.batches:
        batch = trainer.batches.next_batch()
        with trainer._autocast():
            trainer.forward(*batch)[1].backward()
    return {name: p.grad.double() for name, p in trainer.model.named_parameters()}


@pytest.fixture
def count(monkeypatch):
    """How often each Triton kernel is launched, by its name."""
    launched = {}
    launch = triton_ops._Interpreted.__getitem__

    def counting(self, grid):
        name = self.kernel.fn.__name__
        launched[name] = launched.get(name, 0) + 1
        return launch(self, grid)

    monkeypatch.setattr(triton_ops._Interpreted, "__getitem__", counting)
    return launched


@pytest.mark.skipif(not triton_ops.INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start")
@pytest.mark.parametrize(
    "feedforward",
    ["swiglu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gelu_tanh", "relu2"))],
)
def test_twenty_steps_by_the_triton_kernels(feedforward, make_trainer, count):
    small = {"training.batch_size": 2, "model.feedforward": feedforward}
    reference = losses(make_trainer, "reference", 20, **small)
    assert not count
    with kernels.use_backend("triton"):
        ours = losses(make_trainer, "triton", 20, **small)
    assert count == {
        "_rope_kernel": 2 * 2 * 20 + 2,  # two layers, both ways; and the trainer tries one token
        "forward_kernel": 2 * 20 + 2,
        "backward_kernel": 2 * 20,
        "_loss_and_gradient_kernel": 20,
    }
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) <= 0.02
    assert min(ours) < ours[0] - 0.3


@pytest.mark.skipif(not triton_ops.INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start")
@pytest.mark.skipif(emulator.refuse() is not None, reason="the emulator was not built")
@pytest.mark.parametrize("documents", ["ignore", "packed"])
def test_every_kernel_of_a_model_at_once_in_bfloat16(documents, make_trainer):
    """Gradients by the rule: their error at most twice that of the reference in the same dtype."""
    settings = {
        "training.batch_size": 2,
        "training.precision": "bf16",
        "data.documents": documents,
    }
    every = contextlib.ExitStack()
    every.enter_context(kernels.use_backend("triton"))
    every.enter_context(kernels.use_backend("emulator"))
    with every:
        ours = gradients(make_trainer, "kernels", **settings)
    plain = gradients(make_trainer, "reference", **settings)
    exact = gradients(make_trainer, "exact", **{**settings, "training.precision": "fp32"})
    for name, truth in exact.items():
        error, plain_error = ((g[name] - truth).norm() for g in (ours, plain))
        assert error <= 2 * plain_error + 2**-8 * truth.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_two_hundred_compiled_steps(checkpointing, make_trainer):
    torch._dynamo.reset()
    with kernels.use_backend("reference"):
        eager = losses(make_trainer, "eager", 200)
    compiled = losses(
        make_trainer,
        "compiled",
        200,
        **{"training.compile": True, "model.gradient_checkpointing": checkpointing},
    )
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) <= 0.02
    assert compiled[-1] < compiled[0] - 1


def test_a_compiled_step_is_one_graph(make_trainer):
    """Forward and loss without a break: fullgraph raises at one."""
    torch._dynamo.reset()
    trainer = make_trainer()
    with trainer.batches:
        batch = trainer.batches.next_batch()
    loss = torch.compile(trainer.model, fullgraph=True, backend="aot_eager")(*batch)[1]
    torch.testing.assert_close(loss, trainer.model(*batch)[1])
    loss.backward()
