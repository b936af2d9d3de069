"""What cannot be read or written is refused, with every reason by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from almostgpt import GPT, GPTConfig
from almostgpt.errors import UserError
from almostgpt.hub import load_pretrained, save_pretrained
from almostgpt.hub.download import FILES

SIZES = {"block_size": 12, "vocab_size": 20, "n_layer": 2, "n_head": 2, "n_embd": 8}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_pretrained(GPT(GPTConfig(**SIZES)), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def message(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    return str(error.value)


def configured(folder: Path, **changes) -> str:
    """The error of a folder with another ``config.json``."""
    values = {**LLAMA, **changes}
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value != "missing"})
    )
    return message(GPT.from_pretrained, folder)


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "lama"}, "model_type is 'lama', which is not one of gpt2, llama"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of rope_parameters is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "one kind of rotary positions"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "high_freq_factor of"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ({"vocab_size": "missing"}, "vocab_size is missing"),
        ({"vocab_size": "20"}, "vocab_size is '20', not a whole number above 0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, neither true nor false"),
        ({"num_key_value_heads": 3}, "n_head (2) is not a multiple of model.n_kv_head (3)"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types is"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2},
            "sliding_window or use_sliding_window is not set",
        ),
        ({"model_type": "gpt2"}, "n_embd is missing"),
    ],
)
def test_what_a_config_asks_in_vain(changes, expected, folder):
    text = configured(folder, **changes)
    assert expected in text and "config.json" in text


def test_gpt2_variants_are_refused_with_every_reason(folder):
    sizes = {"n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    wrong = {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True,
        "activation_function": "silu",
    }
    text = configured(folder, model_type="gpt2", **sizes, **wrong)
    assert all(name in text for name in wrong)
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{", b"[" * 100_000])
def test_a_damaged_config_is_named(content, folder):
    (folder / "config.json").write_bytes(content)
    assert f"{folder / 'config.json'}: damaged" in message(GPT.from_pretrained, folder)
    (folder / "config.json").unlink()
    assert "config.json: cannot be read" in message(GPT.from_pretrained, folder)


# ---------------------------------------------------------------- weights


def changed(folder: Path, change) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return message(GPT.from_pretrained, folder)


def test_missing_wrong_and_unknown_tensors_are_named_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(8, 8, dtype=torch.int8)
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(8)

    text = changed(folder, change)
    assert "model.norm.weight is missing" in text
    assert "model.layers.0.mlp.up_proj.weight has the shape (3, 4), not (" in text
    assert "model.layers.1.self_attn.q_proj.weight is of I8" in text
    assert "model.layers.1.self_attn.q_proj.bias is unknown" in text


def test_of_many_problems_some_are_shown(folder):
    text = changed(
        folder, lambda tensors: tensors.update({f"x{i}": torch.ones(1) for i in range(50)})
    )
    assert "x0 is unknown" in text and "and 42 more" in text


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_that_is_cut_off(length, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    text = message(GPT.from_pretrained, folder)
    assert "model.safetensors is damaged or cut off" in text and str(folder) in text


@pytest.fixture
def shards(tmp_path) -> Path:
    save_pretrained(GPT(GPTConfig(**SIZES)), tmp_path / "shards", shard_bytes=1500)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    return tmp_path / "shards"


def test_shards_that_are_missing_or_damaged(shards):
    first, second, third, *_ = sorted(shards.glob("model-*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-4])
    third.write_bytes(b"")
    text = message(GPT.from_pretrained, shards)
    assert f"{first.name} is missing" in text
    assert all(f"{path.name} is damaged or cut off" in text for path in (second, third))


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {"a": "../model.safetensors"}}'])
def test_a_damaged_index(content, shards):
    (shards / "model.safetensors.index.json").write_text(content)
    assert "index.json: damaged" in message(GPT.from_pretrained, shards)


def test_shards_without_their_index(shards):
    (shards / "model.safetensors.index.json").unlink()
    assert "index.json is missing" in message(GPT.from_pretrained, shards)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = message(GPT.from_pretrained, folder)
    assert "it has pytorch_model.bin" in text and "save_pretrained" in text


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 10**18},
        {"hidden_size": 10**15, "num_key_value_heads": 1, "head_dim": 10**15},
        {"num_attention_heads": 2**63, "num_key_value_heads": 2**63, "head_dim": 4},
        {"head_dim": 2**70},
    ],
)
def test_sizes_that_no_tensor_has(sizes, folder):
    assert "config.json: damaged: its sizes are beyond" in configured(folder, **sizes)


def test_a_number_of_layers_that_no_file_has_is_refused_at_once(folder):
    text = configured(folder, num_hidden_layers=10**9)
    assert "config.json has 1000000000 layers, but the files only" in text


def test_a_bias_of_a_layer_too_many_is_no_mask(tmp_path):
    settings = {**SIZES, "position": "learned", "norm": "layernorm", "feedforward": "gelu"}
    save_pretrained(GPT(GPTConfig(**settings)), tmp_path / "gpt2")

    def change(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
        tensors["transformer.h.2.attn.c_attn.bias"] = torch.zeros(24)

    text = changed(tmp_path / "gpt2", change)
    assert "h.2.attn.c_attn.bias is unknown" in text and "h.0.attn.bias" not in text


def test_a_run_is_no_model_of_hugging_face_and_the_other_way(folder, tmp_path, capsys):
    from almostgpt.cli.main import main

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert "convert --to-hf" in message(load_pretrained, tmp_path / "run")
    assert main(["generate", "--checkpoint", str(folder)]) == 2
    assert f"almostgpt convert --from {folder} --to" in capsys.readouterr().err


# ---------------------------------------------------------------- hub ids


def test_a_hub_id_is_downloaded_and_only_what_is_read(folder, byte_level_folder, monkeypatch):
    import huggingface_hub

    save_pretrained(GPT(GPTConfig(**{**SIZES, "vocab_size": 320})), folder / "new")
    for file in byte_level_folder.iterdir():
        shutil.copy(file, folder / "new")
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        assert allow_patterns == FILES and not any("bin" in pattern for pattern in FILES)
        return str(folder / "new")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, tokenizer = load_pretrained("some-one/model_1.5B", revision="v2")
    assert asked == [("some-one/model_1.5B", "v2")]
    assert model.config.vocab_size == tokenizer.vocab_size == 320
    GPT.from_pretrained("gpt2-like")
    assert asked[1:] == [("gpt2-like", None)]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (
            "LocalEntryNotFoundError",
            "could not be downloaded from the Hugging Face hub (no network)",
        ),
        ("OfflineModeIsEnabled", "could not be downloaded from the Hugging Face hub (no network)"),
        ("HFValidationError", "could not be downloaded from the Hugging Face hub (no network)"),
        ("RepositoryNotFoundError", "no such model on the Hugging Face hub at the revision v9"),
        ("RevisionNotFoundError", "no such model on the Hugging Face hub at the revision v9"),
        ("GatedRepoError", "accepted the terms"),
    ],
)
def test_errors_of_the_hub_are_one_line(raised, expected, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, raised)
    error = kind.__new__(kind, "no network\nmore of it")
    error.args = ("no network\nmore of it",)

    def download(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(kind, "__str__", lambda self: "no network\nmore of it")
    text = message(GPT.from_pretrained, "some/model", revision="v9")
    assert expected in text and text.startswith("some/model: ") and "\n" not in text


@pytest.mark.parametrize("name", ["a/b/c", "./nowhere", "/nowhere", "no where", ""])
def test_names_that_are_none(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    if name:
        assert "no such folder, and no id" in message(GPT.from_pretrained, name)
    assert "no such folder, and no id" in message(GPT.from_pretrained, Path("no") / "where")


def test_options_that_cannot_be(folder):
    assert "revision is for an id" in message(GPT.from_pretrained, folder, revision="main")
    for size in (0, 13):
        assert f"block_size is {size}" in message(GPT.from_pretrained, folder, block_size=size)
    assert "no tokenizer.json" in message(load_pretrained, folder)


def test_a_tokenizer_of_more_ids_than_the_model(folder, byte_level_folder):
    shutil.copy(byte_level_folder / "tokenizer.json", folder)
    assert "the tokenizer has 320 ids, but the model only 20" in message(load_pretrained, folder)


# ---------------------------------------------------------------- out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"position": "learned"}, "llama: model.position is learned, not rope"),
        ({"norm": "layernorm"}, "model.norm is layernorm, not rmsnorm"),
        ({"feedforward": "relu2"}, "llama: model.feedforward is relu2, not swiglu"),
        ({"rope_fraction": 0.5}, "model.rope_fraction is 0.5, not 1.0"),
        ({"logit_softcap": 30.0}, "model.logit_softcap is 30.0, not 0.0"),
        ({"qk_norm": True, "qkv_bias": True}, "qwen3: model.qkv_bias is true, not false"),
        (
            {"position": "learned", "norm": "layernorm", "feedforward": "gelu", "n_kv_head": 1},
            "gpt2: model.n_kv_head is 1, not 2",
        ),
        (
            {"position": "learned", "norm": "layernorm", "feedforward": "gelu", "head_dim": 6},
            "gpt2: model.head_dim is 6, not model.n_embd / model.n_head (8 / 2)",
        ),
    ],
)
def test_parts_that_no_layout_has_are_named(settings, expected, tmp_path):
    text = message(save_pretrained, GPT(GPTConfig(**{**SIZES, **settings})), tmp_path / "out")
    assert "the model fits no layout of Hugging Face" in text
    assert expected in text
    assert not list(tmp_path.iterdir())


def test_a_quantised_model_is_not_written(tmp_path):
    from almostgpt.model.quantized import quantize

    text = message(save_pretrained, quantize(GPT(GPTConfig(**SIZES))), tmp_path / "out")
    assert "model.quantize is int8, not none" in text


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    assert "already exists" in message(save_pretrained, GPT(GPTConfig(**SIZES)), tmp_path / "mine")
    assert "already exists" in message(save_pretrained, GPT(GPTConfig(**SIZES)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    from almostgpt.hub import writing

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(GPT(GPTConfig(**SIZES)), tmp_path / "out")
    assert not list(tmp_path.iterdir())
