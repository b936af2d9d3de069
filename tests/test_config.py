"""The configuration: strict YAML, coercion by type, inheritance, derived values."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from almostgpt.config import Config, GPTConfig, flatten, overlay, resolve, resolve_model
from almostgpt.config_file import PRESETS, coerce, load_config, to_yaml
from almostgpt.errors import UserError
from almostgpt.model.gpt import PARTS


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_scientific_notation_is_a_float(tmp_path):
    """PyYAML reads 1e-3 as a string; the field's annotation decides."""
    config = load_config(
        write(tmp_path, "optimizer: {lr: 1e-3, eps: 1e-8}\ntraining: {steps: 1e4}")
    )
    assert config.optimizer.lr == 0.001
    assert config.optimizer.eps == 1e-8
    assert config.training.steps == 10_000 and isinstance(config.training.steps, int)


def test_all_problems_in_one_message_with_file_key_and_nearest_name(tmp_path):
    path = write(
        tmp_path,
        "model: {n_layr: 4, n_head: four, bias: 1}\noptimiser: {lr: 1}\nn_embd: 3\ntraining: 7\n",
    )
    with pytest.raises(UserError) as error:
        load_config(path)
    message = str(error.value)
    assert message.count(str(path)) == 6
    assert "model.n_layr: unknown key; did you mean n_layer?" in message
    assert "model.n_head: expected a whole number, found 'four'" in message
    assert "model.bias: expected true or false, found 1" in message
    assert "optimiser: unknown key; did you mean optimizer?" in message
    assert "n_embd: unknown key; did you mean model.n_embd?" in message
    assert "training: a section" in message


@pytest.mark.parametrize(
    "written, expected",
    [("false", "none"), ("true", "full"), ("none", "none"), ("selective", "selective")],
)
def test_checkpointing_was_a_switch_once(tmp_path, written, expected):
    """Stored configurations of older runs hold true or false."""
    path = write(tmp_path, f"model: {{gradient_checkpointing: {written}}}")
    assert resolve(load_config(path)).model.gradient_checkpointing == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: {n_layer: 4", "not readable as YAML"),
        ("model: {n_layer: 4, n_layer: 5}", "given twice"),
        ("- a\n- b", "found list"),
        ("base: nowhere", "no configuration named 'nowhere'"),
        ("base: mine.yaml", "in a circle"),
        ("base: 3", "expected the name of a preset"),
    ],
)
def test_damaged_files(tmp_path, text, expected):
    with pytest.raises(UserError, match=expected):
        load_config(write(tmp_path, text))


def test_base_is_found_beside_the_file_and_overridden_by_it(tmp_path):
    write(tmp_path, "base: shakespeare-char-cpu\nmodel: {n_layer: 9, n_embd: 64}", "base.yaml")
    config = load_config(write(tmp_path, "base: base.yaml\nmodel: {n_layer: 2}"))
    assert (config.model.n_layer, config.model.n_embd, config.model.norm) == (2, 64, "layernorm")
    assert config.training.batch_size == 12  # from the preset at the bottom


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean quickstart?"):
        load_config("quikstart")


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_resolve_and_survive_yaml(preset, tmp_path):
    config = resolve(load_config(preset))
    assert resolve(config) == config
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_documented_presets():
    """The figures that the presets promise: nanoGPT's CPU run and the tokens of a step."""
    cpu = flatten(resolve(load_config("shakespeare-char-cpu")))
    expected = {
        "model.n_layer": 4,
        "model.n_head": 4,
        "model.n_embd": 128,
        "model.block_size": 64,
        "model.dropout": 0.0,
        "training.batch_size": 12,
        "training.steps": 2000,
        "optimizer.lr": 1e-3,
        "optimizer.betas": (0.9, 0.99),
        "schedule.warmup_steps": 100,
    }
    assert expected.items() <= cpu.items()
    for preset, tokens in (("gpt2-124m", 524_288), ("research-512", 262_144)):
        config = load_config(preset)
        training = config.training
        assert training.batch_size * training.accumulate * config.model.block_size == tokens


def test_resolve_fills_what_is_derived():
    model = GPTConfig(n_embd=384, n_head=6, n_kv_head=None, bias=True)
    config = resolve(dataclasses.replace(Config(), model=model))
    assert config.model.n_kv_head == 6 and config.model.head_dim == 64
    assert config.model.mlp_hidden == 1024  # 4 · 384 · 2/3, a multiple of 32
    assert config.model.qkv_bias is True
    assert config.schedule.decay_steps == config.training.steps
    assert config.schedule.min_lr == config.optimizer.lr / 10
    gelu = resolve(overlay(config, {"model.feedforward": "gelu", "model.mlp_hidden": None}))
    assert gelu.model.mlp_hidden == 4 * 384


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.n_layer", 0),
        ("model.n_head", 5),
        ("model.n_kv_head", 4),
        ("model.dropout", 1.0),
        ("model.head_dim", 33),
        ("training.steps", 0),
        ("training.precision", "fp8"),
        ("checkpoint.keep", 1),
        ("optimizer.betas", (0.9, 1.0)),
        ("optimizer.lr", float("nan")),
        ("data.val_fraction", 1.0),
        ("data.documents", "pack"),
        ("data.sampling", "shufled"),
        ("data.mixture", {}),
        ("data.mixture", {"one": 1.0, "two": 0.0}),
        ("data.mixture", {"one": float("inf")}),
        ("schedule.name", "cosin"),
        ("schedule.decay_fraction", 0.0),
        ("schedule.decay_fraction", 1.1),
        ("optimizer.name", "moun"),
        ("optimizer.momentum", 1.0),
        ("model.gradient_checkpointing", True),
        ("model.gradient_checkpointing", "some"),
        ("model.mlp_ratio", float("inf")),
        ("model.mlp_ratio", 1e30),
        ("model.mlp_ratio", 1e308),  # times the width it is infinite
        ("model.block_size", 2**31),
        ("seed", 2**64),
    ],
)
def test_impossible_values_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        resolve(overlay(Config(), {key: value}))


def test_a_misspelt_part_is_named_with_everything_else_and_its_settings_are_not_blamed():
    wrong = {"model.attention": "sliding", "model.attention_window": 5, "model.dropout": 1.5}
    with pytest.raises(UserError, match="did you mean sliding_window") as error:
        resolve(overlay(Config(), {**wrong, "training.steps": 0}), PARTS)
    assert "model.dropout" in str(error.value) and "training.steps" in str(error.value)
    assert "attention_window is" not in str(error.value)


def test_a_hidden_width_is_never_zero():
    small = GPTConfig(n_embd=8, mlp_ratio=0.01, vocab_size=3)
    for kind in ("gelu", "swiglu", "moe"):
        assert resolve_model(dataclasses.replace(small, feedforward=kind)).mlp_hidden >= 1


@pytest.mark.parametrize(
    "written", ["{wiki: 0.7, ../a=b: 3e-1}", '"wiki=0.7, ../a=b=3e-1"', "wiki=0.7,../a=b=3e-1"]
)
def test_a_mixture_is_a_mapping_or_a_word(tmp_path, written):
    config = load_config(write(tmp_path, f"data:\n  mixture: {written}\n"))
    assert config.data.mixture == {"wiki": 0.7, "../a=b": 0.3}
    assert load_config(write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    "written", ["wiki", "=1", "[wiki, 1]", "{wiki: much}", "wiki=1=", "'a=1,a=2'"]
)
def test_what_is_no_mixture_is_refused(tmp_path, written):
    with pytest.raises(UserError, match=r"mine.yaml: data\.mixture: (expected|'a' is given twice)"):
        load_config(write(tmp_path, f"data:\n  mixture: {written}\n"))


def test_a_path_beside_a_mixture_is_refused():
    with pytest.raises(UserError, match=r"data\.path does nothing beside data\.mixture"):
        resolve(overlay(Config(), {"data.path": "a", "data.mixture": {"b": 1.0}}))


def test_vocabulary_padding():
    assert GPTConfig(vocab_size=50257, vocab_multiple=64).padded_vocab_size == 50304
    assert GPTConfig(vocab_size=50304, vocab_multiple=64).padded_vocab_size == 50304
    assert GPTConfig(vocab_size=50257, vocab_multiple=1).padded_vocab_size == 50257


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53))
def test_coerce_reads_numbers_from_their_text(number):
    assert coerce(repr(number), float) == number
    assert coerce(number, float) == number
    if isinstance(number, int):
        assert coerce(str(number), int) == number


@pytest.mark.parametrize(
    "value, kind",
    [
        (True, int),
        ("yes", bool),
        (1.5, int),
        ([1.0], tuple[float, float]),
        (None, int),
        ([], str),
        ("nan", float),
        ("inf", float),
    ],
)
def test_coerce_refuses(value, kind):
    with pytest.raises(ValueError, match="expected"):
        coerce(value, kind)
