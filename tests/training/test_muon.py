"""Muon: the iteration against an SVD, its steps against torch's, and in a trainer."""

import pytest
import torch

from almostgpt import GPT, GPTConfig
from almostgpt.config import OptimizerConfig
from almostgpt.training import muon as muon_module
from almostgpt.training.muon import Muon, orthogonalize
from almostgpt.training.optimizer import FiniteGuard, build_optimizer, optimizer_tensors
from almostgpt.training.schedule import learning_rate
from almostgpt.training.trainer import Trainer

MUON = {"optimizer.name": "muon"}


def take_steps(trainer: Trainer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        trainer.step_number += 1
        rate = learning_rate(trainer.config, trainer.step_number)
        losses.append(trainer.step(trainer.step_number, rate)[0].item())
    return losses


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimizer state, copied."""
    tensors = optimizer_tensors(trainer.optimizer, trainer.model) | trainer.model.state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def poison(trainer: Trainer, step: int, name: str, value: float) -> None:
    """Puts ``value`` into one gradient in the backward pass of one step."""
    steps = iter(range(1, 1000))

    def spoil(gradient):
        return torch.full_like(gradient, value) if next(steps) == step else gradient

    trainer.model.get_parameter(name).register_hook(spoil)


# ---------------------------------------------------------------- the optimizer alone


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 24, 96)])
def test_orthogonalize_against_the_svd(shape):
    """The singular vectors stay, and each singular value goes through the quintic five times."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    expected = S / S.norm(dim=1, keepdim=True)
    large = expected > 0.002
    for _ in range(5):
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    found = U.mT @ orthogonalize(x).double() @ Vh.mT
    torch.testing.assert_close(found, torch.diag_embed(expected), rtol=0, atol=0.04)  # bfloat16
    values = found.diagonal(dim1=1, dim2=2)[large]
    assert 0.65 < values.min() and values.max() < 1.25


def test_nothing_comes_of_a_matrix_of_zeros():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 8)).float(), torch.zeros(1, 4, 8))


def test_steps_are_those_of_torch(monkeypatch):
    """torch.optim.Muon with every matrix a parameter of its own; ours in batches of two."""
    monkeypatch.setattr(muon_module, "MATRICES_AT_ONCE", 2 * 32 * 32)
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 32), (64, 32), (32, 64), (32, 32), (32, 32), (32, 32)]
    rows = (32, 16, 16)
    ours, theirs, pairs = [], [], []
    for i, shape in enumerate(shapes):
        weight = torch.randn(shape, generator=generator)
        ours.append(weight.clone().requires_grad_())
        heights = rows if i < 2 else (shape[0],)
        theirs.append([p.clone().requires_grad_() for p in weight.split(heights)])
        pairs.append((ours[-1], theirs[-1], heights))
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.5}
    groups = [{"params": ours[:2], "rows": rows}, {"params": ours[2:]}]
    parts = [p for part in theirs for p in part]
    optimizers = (
        Muon(groups, **settings),
        torch.optim.Muon(parts, **settings, nesterov=True, adjust_lr_fn="match_rms_adamw"),
    )
    before = [p.detach().clone() for p in ours]
    for _ in range(3):
        for whole, split, heights in pairs:
            whole.grad = torch.randn(whole.shape, generator=generator)
            for part, gradient in zip(split, whole.grad.split(heights), strict=True):
                part.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, (whole, split, _) in zip(before, pairs, strict=True):
        moved = (whole - start).square().mean().sqrt()
        difference = (whole - torch.cat(split)).square().mean().sqrt()
        assert difference < 0.02 * moved  # both iterate in bfloat16, in another order of sums


def test_matrices_of_blocks_go_to_muon_and_all_else_to_adamw():
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "mlp_hidden": 96}
    model = GPT(
        GPTConfig(
            **sizes, vocab_size=31, block_size=8, bias=True, tie_weights=False, position="learned"
        )
    )
    adamw, muon = build_optimizer(model, OptimizerConfig(name="muon")).optimizers
    names = {p: name for name, p in model.named_parameters()}
    of_muon = {names[p]: group["rows"] for group in muon.param_groups for p in group["params"]}
    expected = {
        "attention.qkv.weight": (32, 16, 16),
        "attention.out.weight": None,
        "feedforward.gate_up.weight": (96, 96),
        "feedforward.down.weight": None,
    }
    assert of_muon == {f"blocks.{i}.{k}": v for i in range(2) for k, v in expected.items()}
    of_adamw = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted([*of_adamw, *of_muon]) == sorted(names.values())
    assert {"token_embedding.weight", "position.weight", "head.weight"} <= set(of_adamw)
    decayed = {names[p] for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {"token_embedding.weight", "position.weight", "head.weight"}


# ---------------------------------------------------------------- in the trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns(make_trainer, precision):
    trainer = make_trainer(**MUON, **{"training.precision": precision, "optimizer.lr": 1e-2})
    losses = take_steps(trainer, 60)
    assert losses[0] > 5.4 and losses[-1] < 2.5  # ln 257 = 5.55; the source has ln 3 = 1.10


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer):
    settings = {**MUON, "model.dropout": 0.1, "training.accumulate": 2}
    whole = make_trainer("whole", **settings)
    expected = take_steps(whole, 8)
    first = make_trainer("resumed", **settings)
    take_steps(first, 5)
    first.save()
    second = make_trainer("resumed", **settings)
    assert second.step_number == 5
    assert take_steps(second, 3) == expected[5:]
    after = state(second)
    assert after.keys() == state(whole).keys()
    assert all(torch.equal(after[name], value) for name, value in state(whole).items())
    assert "blocks.0.attention.qkv.weight/momentum_buffer" in after


@pytest.mark.parametrize(
    "name", ["blocks.1.feedforward.gate_up.weight", "blocks.0.attention_norm.weight"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_on_a_device_a_bad_step_leaves_all_weights_alone(make_trainer, name, bad):
    """Whether a gradient of Muon's or of AdamW's is bad, and without a look at it."""
    trainer = make_trainer(**MUON)
    trainer.guard = FiniteGuard(torch.device("cpu"), immediate=False)
    poison(trainer, 4, name, bad)
    take_steps(trainer, 3)
    before = state(trainer)
    take_steps(trainer, 3)
    assert trainer.guard.first_bad_step() == 4
    for key, value in state(trainer).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["blocks.0.attention.out.weight", "token_embedding.weight"])
def test_an_overflow_under_fp16_skips_the_step_of_both(make_trainer, name):
    trainer = make_trainer(**MUON, **{"training.precision": "fp16"})
    poison(trainer, 4, name, float("inf"))
    take_steps(trainer, 3)
    before, scale = state(trainer), trainer.scaler.get_scale()
    take_steps(trainer, 1)
    for key, value in state(trainer).items():
        assert torch.equal(value, before[key]), key
    assert trainer.scaler.get_scale() == scale / 2
    take_steps(trainer, 1)
    changed = [key for key, value in state(trainer).items() if not torch.equal(value, before[key])]
    assert {"blocks.0.attention.out.weight", "token_embedding.weight"} <= set(changed)


def test_the_matrices_of_experts_are_made_orthogonal_one_by_one():
    """A step of a mixture's weights is a step of each expert's gate, up and down by itself."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=32, feedforward="moe",
            n_experts=3, mlp_hidden=24,
        )
    )  # fmt: skip
    layer = model.blocks[0].feedforward
    gradients = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for name, parameter in layer.named_parameters():
        parameter.grad = gradients[name].clone()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    config = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.0)
    build_optimizer(model, config).step()
    for name, height in (("gate_up.weight", 24), ("down.weight", 32)):
        alone = [torch.nn.Parameter(m) for m in before[name].flatten(0, 1).split(height)]
        for matrix, gradient in zip(
            alone, gradients[name].flatten(0, 1).split(height), strict=True
        ):
            matrix.grad = gradient.clone()
        groups = [{"params": alone}]
        Muon(groups, lr=0.1, momentum=config.momentum, weight_decay=0.0).step()
        moved = dict(layer.named_parameters())[name].detach().flatten(0, 1)
        torch.testing.assert_close(moved, torch.cat(alone).detach(), rtol=1e-3, atol=1e-3)
    # The router is AdamW's: its first step is of the size of the learning rate.
    router = layer.router.weight.detach() - before["router.weight"]
    torch.testing.assert_close(router.abs(), torch.full_like(router, 0.1), rtol=1e-3, atol=1e-3)
