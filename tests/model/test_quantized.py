"""Models with matrices in 8 bits: what they compute, store, and refuse."""

import dataclasses

import pytest
import torch

from almostgpt import GPT, GPTConfig, checkpoint, load
from almostgpt.config import Config, ScheduleConfig, TrainingConfig, resolve
from almostgpt.data.tokenizer import ByteTokenizer
from almostgpt.errors import UserError
from almostgpt.inference.decoder import feed
from almostgpt.model.quantized import Int8Embedding, Int8Linear, quantize
from almostgpt.training.process import prepare

SHAPES = {
    "tied": {},
    "untied": {"tie_weights": False},
    "gpt2": {
        "norm": "layernorm",
        "feedforward": "gelu_tanh",
        "position": "learned",
        "bias": True,
        "vocab_multiple": 1,
    },
    "grouped": {"n_kv_head": 1, "feedforward": "relu2", "position": "sinusoidal"},
}


def make(**options) -> GPT:
    torch.manual_seed(0)
    sizes = {"block_size": 32, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 48}
    model = GPT(GPTConfig(**{**sizes, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(params=SHAPES)
def model(request) -> GPT:
    return make(**SHAPES[request.param])


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(1))


def rounded_by_hand(model: GPT) -> GPT:
    """The float model whose matrices were rounded to 255 steps a row, in float64."""
    twin = GPT(model.config).double().eval()
    state = {name: value.double() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if value.dim() == 2 and not name.startswith("position"):
            step = value.abs().amax(1, keepdim=True).float().div(127).double()
            state[name] = (value / step).round() * step
    twin.load_state_dict(state)
    return twin


@torch.no_grad()
def test_logits_are_those_of_the_model_with_rounded_matrices(model):
    expected = rounded_by_hand(model)(ids(3, 20), all_logits=True)[0]
    exact = model(ids(3, 20), all_logits=True)[0]
    small = quantize(model)
    assert small is model
    ours = small(ids(3, 20), all_logits=True)[0]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-3 * expected.abs().max())
    assert not torch.allclose(ours, exact, atol=1e-4)  # and rounded they are


@torch.no_grad()
def test_all_matrices_are_in_8_bits_and_nothing_else(model):
    before, parameters = model.state_dict(), model.num_parameters()
    small = quantize(model)
    assert small.num_parameters() == parameters
    for name, value in small.state_dict().items():
        if name in before and (before[name].dim() < 2 or name.startswith("position")):
            assert torch.equal(value, before[name])
        else:
            assert value.dtype == (torch.float32 if name.endswith("scales") else torch.int8)
    kinds = [type(module) for module in small.modules()]
    assert kinds.count(Int8Embedding) == 1
    assert kinds.count(Int8Linear) == 2 * 4 + (not small.config.tie_weights)
    assert small.config.quantize == "int8" and not small.training
    again = {name: value.clone() for name, value in small.state_dict().items()}
    for name, value in quantize(small).state_dict().items():
        assert torch.equal(value, again[name])


@torch.no_grad()
def test_the_loss_is_that_of_the_logits(model):
    quantize(model)
    logits = model(ids(2, 20), all_logits=True)[0]
    loss = model(ids(2, 20), ids(2, 20).roll(-1, 1))[1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids(2, 20).roll(-1, 1).flatten()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("cache", ["full", "int8", "none"])
def test_generation_with_and_without_a_cache(model, cache):
    quantize(model)
    text = model.generate(ids(2, 7), 20, temperature=0, cache=cache)
    if cache == "int8":  # is another rounding
        return
    for end in range(7, 27):
        assert torch.equal(feed(model, text[:, :end]).argmax(-1), text[:, end])


@torch.no_grad()
def test_causal(model):
    quantize(model)
    before = model(ids(1, 20), all_logits=True)[0]
    changed = ids(1, 20)
    changed[0, 12] = (changed[0, 12] + 1) % 257
    after = model(changed, all_logits=True)[0]
    assert torch.equal(before[0, :12], after[0, :12]) and not torch.equal(before, after)


@torch.no_grad()
def test_in_bfloat16_the_scales_stay_in_float32(model):
    expected = quantize(make(**{f: getattr(model.config, f) for f in ("tie_weights",)}))
    expected = expected(ids(1, 9))[0]
    small = quantize(make(tie_weights=model.config.tie_weights)).to(torch.bfloat16)
    assert small.dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 for name, b in small.named_buffers() if "scales" in name)
    logits = small(ids(1, 9))[0]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.05 * expected.abs().max(), rtol=0)


# ---------------------------------------------------------------- stored


def config_of(model: GPT) -> Config:
    return resolve(Config(model=model.config))


def test_a_quantised_model_is_stored_and_read(model, tmp_path):
    quantize(model)
    checkpoint.export(tmp_path / "small", model, ByteTokenizer(), config_of(model))
    read, tokenizer = load(tmp_path / "small")
    assert read.config == model.config and tokenizer.vocab_size == 257
    assert torch.equal(read(ids(2, 9))[0], model(ids(2, 9))[0])
    state = read.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again, _ = load(tmp_path / "small", quantize="int8")
    assert torch.equal(again(ids(2, 9))[0], model(ids(2, 9))[0])
    whole = make(**{**vars(model.config), "quantize": "none"})
    weights = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert weights < 0.45 * sum(p.nbytes for p in whole.parameters())


def test_a_float_model_is_quantised_while_it_is_read(model, tmp_path):
    checkpoint.export(tmp_path / "whole", model, ByteTokenizer(), config_of(model))
    read, _ = load(tmp_path / "whole", quantize="int8")
    assert read.config.quantize == "int8"
    assert torch.equal(read(ids(2, 9))[0], quantize(model)(ids(2, 9))[0])


def test_what_export_leaves_is_whole_or_nothing(model, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: already exists"):
        checkpoint.export(tmp_path / "there", model, ByteTokenizer(), config_of(model))

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.export(tmp_path / "out", model, ByteTokenizer(), config_of(model))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    checkpoint.export(tmp_path / "out", model, ByteTokenizer(), config_of(model))
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged .model.safetensors has"):
        load(tmp_path / "out")


# ---------------------------------------------------------------- refused


def test_quantised_weights_are_not_trained(model):
    for small in (quantize(model), GPT(dataclasses.replace(model.config, quantize="int8"))):
        assert not any(parameter.requires_grad for parameter in small.parameters())
        assert not small.train()(ids(1, 5), ids(1, 5))[1].requires_grad
    config = Config(
        model=dataclasses.replace(model.config, quantize="int8"),
        training=TrainingConfig(steps=1),
        schedule=ScheduleConfig(warmup_steps=0),
    )
    with pytest.raises(UserError, match="model.quantize is int8, but quantised weights cannot be"):
        prepare(config, torch.device("cpu"))


def test_kinds_and_weights_that_cannot_be():
    with pytest.raises(UserError, match="quantize is 'int9'.*did you mean int8"):
        quantize(make(), "int9")
    with pytest.raises(UserError, match="model.quantize is 'int4'"):
        make(quantize="int4")
    model = make()
    with torch.no_grad():
        model.blocks[1].feedforward.down.weight[3, 3] = torch.inf
    before = model.state_dict()
    with pytest.raises(UserError, match="not finite"):
        quantize(model)
    assert model.config.quantize == "none"  # and nothing was changed
    assert set(model.state_dict()) == set(before)


def test_weights_of_another_precision_are_named(model, tmp_path):
    small = quantize(make())
    whole = make()
    with pytest.raises(UserError, match="do not fit the model"):
        checkpoint.load_weights(whole, small.state_dict(), tmp_path)
