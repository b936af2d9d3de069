"""The mixture of experts against its definition, an expert and a token at a time."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_parts import make, random_ids, small_config
from torch.nn.functional import gelu, silu

from almostgpt import GPT
from almostgpt.config_model import resolve_model
from almostgpt.model.experts import MixtureOfExperts
from almostgpt.model.quantized import (
    Int8ExpertLinear,
    dequantize_rows,
    quantize,
    quantize_rows,
)


def layer(seed: int = 0, **options) -> MixtureOfExperts:
    torch.manual_seed(seed)
    made = MixtureOfExperts(resolve_model(small_config(feedforward="moe", **options)))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def definition(layer: MixtureOfExperts, x: torch.Tensor):
    """y of rows x (N, n_embd), and of each the probabilities, in float64, one token after the other."""
    x, E, k = x.double(), layer.n_experts, layer.k
    first = layer.gate_up if layer.gated else layer.up
    probabilities = (x @ layer.router.weight.double().T).softmax(-1)
    rows = []
    for token, p in zip(x, probabilities, strict=True):
        chosen = p.argsort(descending=True)[:k].tolist()
        total = sum(p[e] for e in chosen) if k > 1 else 1.0
        y = 0
        for e in chosen:
            h = first.weight[e].double() @ token
            if first.bias is not None:
                h = h + first.bias.double().view(E, -1)[e]
            h = silu(h[: len(h) // 2]) * h[len(h) // 2 :] if layer.gated else gelu(h)
            out = layer.down.weight[e].double() @ h
            if layer.down.bias is not None:
                out = out + layer.down.bias.double().view(E, -1)[e]
            y = y + p[e] / total * out
        rows.append(y)
    return torch.stack(rows), probabilities


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.data(),
    st.sampled_from(["gelu", "swiglu"]),
    st.booleans(),
    st.integers(1, 20),
)
def test_output_and_gradients_are_those_of_the_definition(n_experts, data, expert, bias, tokens):
    k = data.draw(st.integers(1, n_experts))
    made = layer(n_experts=n_experts, experts_per_token=k, expert=expert, bias=bias, mlp_hidden=20)
    x = torch.randn(1, tokens, 32, requires_grad=True)
    y, routing = made(x)
    expected, _ = definition(made, x[0])
    torch.testing.assert_close(y[0].double(), expected, rtol=1e-4, atol=1e-4)
    inputs = (x, *made.parameters())
    upstream = torch.randn(tokens, 32)
    found = torch.autograd.grad((y[0] * upstream).sum(), inputs, allow_unused=True)
    truth = torch.autograd.grad((expected * upstream).sum(), inputs, allow_unused=True)
    for ours, theirs in zip(found, truth, strict=True):
        theirs = 0.0 * ours if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert routing.load.sum().item() == pytest.approx(1)


def test_penalty_and_load_are_the_closed_forms():
    made = layer(n_experts=4, experts_per_token=2, balance_loss=0.3, router_z_loss=0.07)
    x = torch.randn(3, 5, 32)
    _, routing = made(x)
    _, probabilities = definition(made, x.flatten(0, 1))
    chosen = probabilities.argsort(descending=True)[:, :2]
    load = torch.stack([(chosen == e).double().sum() for e in range(4)]) / 30
    logits = x.flatten(0, 1).double() @ made.router.weight.double().T
    balance = 4 * (load * probabilities.mean(0)).sum()
    z = logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(routing.load.double(), load, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.penalty.double(), 0.3 * balance + 0.07 * z)


def test_no_token_is_dropped_when_all_go_to_one_expert():
    made = layer(n_experts=4, experts_per_token=1)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[2] = 5.0
    x = torch.rand(2, 30, 32)  # positive: logits of expert 2 are the largest
    y, routing = made(x)
    assert routing.load.tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(
        y.flatten(0, 1).double(), definition(made, x.flatten(0, 1))[0], rtol=1e-4, atol=1e-4
    )


def test_the_penalty_is_a_part_of_the_loss_in_training_alone():
    model = make(feedforward="moe", balance_loss=0.5, router_z_loss=0.1)
    ids = random_ids(2, 16)
    plain = model(ids, ids)[1]
    found = []
    for block in model.blocks:
        block.feedforward.register_forward_hook(lambda _m, _i, out: found.append(out[1]))
    model.train()
    loss = model(ids, ids)[1]
    assert len(found) == 2
    torch.testing.assert_close(loss, plain + sum(routing.penalty for routing in found))
    torch.testing.assert_close(model.expert_load, torch.stack([r.load for r in found]))


def test_a_router_without_its_penalty_lets_experts_starve_and_with_it_does_not():
    """It begins with a preference, which the text gives no reason to lose."""
    peaks = []
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        model = GPT(small_config(feedforward="moe", n_experts=4, balance_loss=weight))
        for block in model.blocks:  # a router that prefers one expert for every token
            torch.nn.init.normal_(block.feedforward.router.weight, std=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(40):
            ids = random_ids(8, 17, seed=step)
            optimizer.zero_grad()
            model(ids[:, :-1], ids[:, 1:])[1].backward()
            optimizer.step()
        peaks.append(model.expert_load.max().item())
    assert peaks[1] < 0.4 and peaks[1] < peaks[0], peaks


@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_in_8_bits_it_is_the_layer_with_rounded_matrices(expert):
    model = make(feedforward="moe", expert=expert, n_experts=3, bias=True)
    rounded = make(feedforward="moe", expert=expert, n_experts=3, bias=True)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.dim() >= 2 and "router" not in name:
                codes, scales = quantize_rows(parameter.flatten(0, -2))
                parameter.copy_(dequantize_rows(codes, scales, torch.float32).view_as(parameter))
    before = model.num_parameters()
    ids = random_ids(2, 16)
    found = quantize(model)(ids, all_logits=True)[0]
    assert model.num_parameters() == before
    stored = [b.dtype for n, b in model.named_buffers() if n.endswith("down.weight")]
    assert stored == [torch.int8] * 2
    # Activations of the other matrices go through 16 bits.
    with torch.no_grad():
        torch.testing.assert_close(found, rounded(ids, all_logits=True)[0], rtol=0.02, atol=0.02)
        one = model(ids[:1, :1])[0], rounded(ids[:1, :1])[0]  # fewer choices than experts
        torch.testing.assert_close(*one, rtol=0.02, atol=0.02)
    again = GPT(dataclasses.replace(model.config))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(ids, all_logits=True)[0], found)


def test_in_8_bits_one_token_takes_its_own_experts_alone():
    """As all rows together to rounding, though the other experts' matrices are not read."""
    layer = Int8ExpertLinear(5, 24, 16)
    layer.fill(torch.randn(5 * 16, 24))
    torch.nn.init.normal_(layer.bias)
    x, expert = torch.randn(7, 24), torch.tensor([0, 0, 1, 1, 1, 3, 4])
    offsets = torch.tensor([2, 5, 5, 6, 7], dtype=torch.int32)
    with torch.no_grad():
        whole = layer(x, offsets, expert)
        layer.weight[2 * 16 : 3 * 16] = 127
        layer.scales[2 * 16 : 3 * 16] = torch.nan  # whom nobody was sent to
        few = torch.tensor([0, 3, 5])
        ends = torch.tensor([1, 2, 2, 3, 3], dtype=torch.int32)
        torch.testing.assert_close(layer(x[few], ends, expert[few]), whole[few])


def test_experts_are_seen_in_the_metrics_and_a_resumed_run_logs_the_same(tmp_path):
    from almostgpt.cli.main import main

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    common = ["train", "--data.path", str(text), "--model.feedforward", "moe"]
    common += ["--model.n-layer", "2", "--model.n-embd", "32", "--model.block-size", "16"]
    common += [
        "--training.log-every",
        "1",
        "--checkpoint.every",
        "2",
        "--training.eval-batches",
        "1",
    ]
    assert main([*common, "--training.steps", "4", "--out", str(tmp_path / "a")]) == 0
    metrics = tmp_path / "a" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        assert len(line["expert_load"]) == 2 and len(line["expert_load"][0]) == 8
        assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in line["expert_load"])
    assert lines[0]["expert_load"] != lines[1]["expert_load"]
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-00000004")
    assert main(["train", "--resume", "--out", str(tmp_path / "a")]) == 0
    again = [json.loads(line) for line in metrics.read_text().splitlines()]
    for before, after in zip(lines, again, strict=True):
        assert [before[k] for k in ("loss", "expert_load")] == [
            after[k] for k in ("loss", "expert_load")
        ]
