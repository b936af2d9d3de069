"""The feed-forward parts against their definitions, and where their names are listed."""

import inspect
from pathlib import Path

import pytest
import torch
from activation_truth import TRUTH

from almostgpt import GPT, GPTConfig
from almostgpt.model.feedforward import FEEDFORWARDS
from almostgpt.model.gpt import PARTS

ROOT = Path(__file__).resolve().parents[2]
PLAIN = [name for name in FEEDFORWARDS if name != "moe"]  # tests/model/test_experts.py has that
DEFINITIONS = {name: TRUTH[{"relu2": "relu_squared"}.get(name, name)] for name in PLAIN}


@pytest.mark.parametrize("name", PLAIN)
def test_a_part_is_its_definition(name):
    part = FEEDFORWARDS[name](GPTConfig(n_embd=12, mlp_hidden=20, bias=True)).double()
    into = part.gate_up if name == "swiglu" else part.up
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    hidden = DEFINITIONS[name](x @ into.weight.T + into.bias)
    torch.testing.assert_close(part(x)[0], hidden @ part.down.weight.T + part.down.bias)


def test_a_relu2_model_trains():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32, feedforward="relu2")
    )
    before = [block.feedforward.up.weight.detach().clone() for block in model.blocks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(31, (4, 17))
    losses = []
    for _ in range(30):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.3 and losses[-1] < 1.5, losses
    for block, weight in zip(model.blocks, before, strict=True):
        assert not torch.equal(block.feedforward.up.weight, weight)


def test_every_part_is_named_where_users_look():
    config = inspect.getsource(GPTConfig)
    page = (ROOT / "docs" / "model_architecture.md").read_text(encoding="utf-8")
    for kind, parts in PARTS.items():
        (listed,) = [line for line in config.splitlines() if line.strip().startswith(f"{kind}:")]
        assert set(listed.partition("#")[2].replace("|", " ").split()) == set(parts)
        assert all(f"`{name}`" in page for name in parts)
