"""Models of transformers, randomly initialised, against ours: both ways, by their logits and tokens."""

import dataclasses
import json

import pytest
import torch

from almostgpt import GPT, GPTConfig
from almostgpt.hub import save_pretrained

transformers = pytest.importorskip("transformers", reason="needs the extra `test`")

SMALL = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 42,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 21,
}
GPT2 = {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 21}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 9,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied, odd feed-forward, gelu": (
        "GPT2",
        {**GPT2, "tie_word_embeddings": False, "n_inner": 37, "activation_function": "gelu"},
    ),
    "gpt2 relu2": ("GPT2", {**GPT2, "activation_function": "relu2", "layer_norm_epsilon": 1e-3}),
    "llama": ("Llama", SMALL),
    "llama tied, MHA": ("Llama", {**SMALL, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama MQA, head_dim 10": ("Llama", {**SMALL, "head_dim": 10, "num_key_value_heads": 1}),
    "llama biases": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("Llama", {**SMALL, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama linear rope": ("Llama", {**SMALL, "rope_parameters": LINEAR}),
    "mistral full": ("Mistral", {**SMALL, "sliding_window": None}),
    "mistral window": ("Mistral", {**SMALL, "sliding_window": 5, "head_dim": 8}),
    "mistral odd width": ("Mistral", {**SMALL, "hidden_size": 27, "head_dim": 6}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2 tied": ("Qwen2", {**SMALL, "tie_word_embeddings": True, "rms_norm_eps": 1e-4}),
    "qwen2 last layers local": (
        "Qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2 alternating": (
        "Qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 4, "layer_types": ALTERNATING},
    ),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 14}),
    "qwen3 tied, windows, linear rope": (
        "Qwen3",
        {
            **SMALL,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ALTERNATING,
            "rope_parameters": LINEAR,
        },
    ),
}


def their_model(family: str, settings: dict):
    """Random weights, also where training starts from ones and zeros."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **settings, bos_token_id=None, eos_token_id=None
    )
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model


def assert_same_logits(theirs, ours: GPT) -> None:
    ids = torch.randint(37, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours(ids, all_logits=True)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=CASES)
def test_logits_and_greedy_tokens_equal_both_ways(family, settings, tmp_path):
    theirs = their_model(family, settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert not ours.training and ours.dtype == torch.float32
    assert_same_logits(theirs, ours)

    prompt = torch.tensor([[5, 7, 30, 2]])
    tokens = theirs.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert ours.generate(prompt, 16, temperature=0).tolist() == tokens.tolist()

    save_pretrained(ours, tmp_path / "ours")
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert opened.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        ids = torch.arange(21)[None]
        assert torch.equal(
            opened.eval()(ids).logits, theirs(ids).logits
        )  # the same weights, to a bit

    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# ---------------------------------------------------------------- models of ours

OURS = {
    "block_size": 21,
    "vocab_size": 37,  # the embedding has 64 rows
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 24,
    "norm_eps": 1e-5,
}
PLAIN = {"norm": "layernorm", "feedforward": "gelu_tanh", "position": "learned"}
WINDOW = {"attention": "sliding_window", "attention_window": 5}
EXPORTS = {
    "gpt2": (PLAIN | {"bias": True}, "gpt2"),
    "nanoGPT without biases": (PLAIN | {"feedforward": "gelu"}, "gpt2"),
    "the default": ({}, "llama"),
    "GQA untied": ({"n_kv_head": 2, "tie_weights": False}, "llama"),
    "biases everywhere": ({"bias": True}, "llama"),
    "biases but of QKV": ({"bias": True, "qkv_bias": False}, "llama"),
    "ntk": ({"rope_scaling": "ntk", "rope_factor": 3.0}, "llama"),
    "llama3": ({"rope_scaling": "llama3", "rope_factor": 3.0, "head_dim": 16}, "llama"),
    "a width that heads do not divide": ({"n_embd": 26, "head_dim": 6}, "mistral"),
    "windows in all layers": (WINDOW, "mistral"),
    "biases of QKV": ({"qkv_bias": True}, "qwen2"),
    "windows in some layers": (WINDOW | {"window_pattern": "LLG"}, "qwen2"),
    "windows and biases": (WINDOW | {"qkv_bias": True}, "qwen2"),
    "QK-norm": ({"qk_norm": True, "n_kv_head": 1}, "qwen3"),
    "QK-norm and windows": (WINDOW | {"qk_norm": True, "window_pattern": "GL"}, "qwen3"),
}


def our_model(**settings) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**OURS, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model


@pytest.mark.parametrize(("settings", "family"), EXPORTS.values(), ids=EXPORTS)
def test_models_of_ours_open_in_transformers(settings, family, tmp_path):
    ours = our_model(**settings)
    assert save_pretrained(ours, tmp_path / "out") == family
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert theirs.config.model_type == family
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_logits(theirs.eval(), ours)
    assert_same_logits(theirs, GPT.from_pretrained(tmp_path / "out"))


def test_precision_and_shards(tmp_path):
    """bfloat16 stays bfloat16 on the disk; as float32 it has the same values."""
    ours = our_model(tie_weights=False).to(torch.bfloat16)
    save_pretrained(ours, tmp_path / "out", shard_bytes=10_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 14_000 for name in shards)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.lm_head.weight, ours.head.weight[:37])
    again = GPT.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32
    assert torch.equal(again.head.weight, ours.head.weight[:37].float())
    half = GPT.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(half.head.weight, ours.head.weight[:37])


def test_shards_of_transformers(tmp_path):
    theirs = their_model("Llama", SMALL)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(theirs, GPT.from_pretrained(tmp_path))


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3, None])
def test_rope_by_the_keys_of_transformers_4(scaling, tmp_path):
    """``rope_theta`` and ``rope_scaling`` at the top, as in the files that are on the hub."""
    parameters = scaling or {"rope_type": "default", "rope_theta": 1000.0}
    theirs = their_model("Llama", {**SMALL, "rope_parameters": parameters})
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_theta"] = parameters["rope_theta"]
    config["rope_scaling"] = scaling and {k: v for k, v in scaling.items() if k != "rope_theta"}
    if scaling is LINEAR:  # older still
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(theirs, GPT.from_pretrained(tmp_path))


def test_a_model_without_its_head_as_gpt2_is_on_the_hub(tmp_path):
    """No prefix, masks among the tensors, keys of ``config.json`` that are not there."""
    from safetensors.torch import save_file

    theirs = their_model("GPT2", GPT2)
    tensors = {k: v.clone() for k, v in theirs.transformer.state_dict().items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 21, 21) for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2}))
    assert_same_logits(theirs, GPT.from_pretrained(tmp_path))


@pytest.mark.parametrize("stored", ["both, equal", "both, different", "the head alone"])
@pytest.mark.parametrize("family", ["GPT2", "Qwen2"])
def test_a_tied_head_is_what_the_files_have(family, stored, tmp_path):
    """Whatever ``tie_word_embeddings`` says: so has transformers."""
    from safetensors.torch import load_file, save_file

    settings = {**(GPT2 if family == "GPT2" else SMALL), "tie_word_embeddings": True}
    their_model(family, settings).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith(("wte.weight", "tokens.weight")))
    tensors["lm_head.weight"] = tensors[embedding].clone()
    if stored == "both, different":
        tensors["lm_head.weight"] += 0.1
    elif stored == "the head alone":
        del tensors[embedding]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.tie_weights == (stored != "both, different")
    assert_same_logits(theirs, ours)


@pytest.mark.parametrize("family", ["GPT2", "Mistral"])
def test_a_shorter_block(family, tmp_path):
    """For texts of up to 5 tokens, of which a window of 5 is the whole."""
    settings = GPT2 if family == "GPT2" else {**SMALL, "sliding_window": 5}
    theirs = their_model(family, settings)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, block_size=5)
    assert ours.config.block_size == 5 and ours.config.attention == "full"
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids, all_logits=True)[0] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_window_of_the_whole_block_is_none(tmp_path):
    their_model("Mistral", {**SMALL, "sliding_window": 21}).save_pretrained(tmp_path)
    config = GPT.from_pretrained(tmp_path).config
    assert config.attention == "full"
    full = GPTConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    assert full.attention_window is None
