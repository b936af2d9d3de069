"""Llama and its kin: RoPE, RMSNorm, SwiGLU, grouped-query attention.

They differ in where biases are, in windows of attention, and in norms of queries and keys:

    llama     no biases, or all of them; full attention
    mistral   no biases; full attention, or one window in every layer
    qwen2     biases of queries, keys and values; a window in some layers, or in none
    qwen3     no biases; RMSNorm on each head of queries and keys; windows as qwen2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from almostgpt.config import GPTConfig
from almostgpt.hub.layout import Family, Given, Source, differences
from almostgpt.hub.rope import rope_config, rope_settings

WINDOW_LETTERS = {"full_attention": "G", "sliding_attention": "L"}


class _LlamaLike(Family):
    prefix = "model."
    left_out = r"rotary_emb\.inv_freq$"  # a table, stored as a buffer once
    default_n_kv_head: int | None = None  # None: as many as n_head
    default_head_dim: int | None = None  # None: n_embd / n_head
    qk_norm = False

    def settings(self, given: Given) -> dict[str, Any]:
        given.choice("hidden_act", "silu", {"silu": "swiglu", "swish": "swiglu"})
        n_embd = given.whole("hidden_size", needed=True)
        n_head = given.whole("num_attention_heads", needed=True)
        block_size = given.whole("max_position_embeddings", needed=True)
        n_kv_head = given.whole("num_key_value_heads", self.default_n_kv_head or n_head)
        if "num_key_value_heads" in given.values and given.values["num_key_value_heads"] is None:
            n_kv_head = n_head
        return {
            "block_size": block_size,
            "n_layer": given.whole("num_hidden_layers", needed=True),
            "n_head": n_head,
            "n_kv_head": n_kv_head,
            "head_dim": given.whole("head_dim", self.default_head_dim or max(1, n_embd // n_head)),
            "n_embd": n_embd,
            "mlp_hidden": given.whole("intermediate_size", needed=True),
            "norm_eps": given.number("rms_norm_eps", 1e-6),
            "tie_weights": given.switch("tie_word_embeddings", False),
            "norm": "rmsnorm",
            "feedforward": "swiglu",
            "position": "rope",
            "qk_norm": self.qk_norm,
            **self.biases(given),
            **self.attention(given, block_size),
            **rope_settings(given, block_size),
        }

    def biases(self, given: Given) -> dict[str, Any]:
        given.refuse(
            "attention_bias",
            given.switch("attention_bias", False),
            f"a {self.name} model with it has a bias after attention and none in its feed-forward; "
            "ours has both (model.bias) or neither",
        )
        return {"bias": False, "qkv_bias": False}

    def attention(self, given: Given, block_size: int) -> dict[str, Any]:
        return {}

    def misfits(self, model: GPTConfig) -> list[str]:
        return differences(
            model,
            {
                "position": ["rope"],
                "norm": ["rmsnorm"],
                "feedforward": ["swiglu"],
                "attention": ["full", "sliding_window"],
                "rope_fraction": [1.0] if model.position == "rope" else [model.rope_fraction],
                "qk_norm": [self.qk_norm],
            },
        )

    def completed(self, model: GPTConfig) -> GPTConfig:
        return model

    def config(self, model: GPTConfig) -> dict[str, Any]:
        return {
            "max_position_embeddings": model.block_size,
            "hidden_size": model.n_embd,
            "num_hidden_layers": model.n_layer,
            "num_attention_heads": model.n_head,
            "num_key_value_heads": model.n_kv_head,
            "head_dim": model.head_dim,
            "intermediate_size": model.mlp_hidden,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "attention_dropout": 0.0,
            **rope_config(model),
        }

    def sources(self, model: GPTConfig) -> Iterator[tuple[str, Source]]:
        C, hidden, V = model.n_embd, model.mlp_hidden, model.vocab_size
        q, kv = model.n_head * model.head_dim, model.n_kv_head * model.head_dim

        def some(*parts: tuple[str, int]) -> Source:
            names, rows = zip(*parts, strict=True)
            return Source(tuple(self.prefix + name for name in names), rows)

        yield "token_embedding.weight", some(("embed_tokens.weight", V))
        for i in range(model.n_layer):
            ours, theirs = f"blocks.{i}.", f"layers.{i}."
            attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
            yield f"{ours}attention_norm.weight", some((f"{theirs}input_layernorm.weight", C))
            norm = f"{theirs}post_attention_layernorm.weight"
            yield f"{ours}feedforward_norm.weight", some((norm, C))
            for kind in ("weight", "bias"):
                if kind == "weight" or model.qkv_bias:
                    heads = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
                    parts = [(f"{attention}{name}.{kind}", rows) for name, rows in heads]
                    yield f"{ours}attention.qkv.{kind}", some(*parts)
                if kind == "weight" or model.bias:
                    yield f"{ours}attention.out.{kind}", some((f"{attention}o_proj.{kind}", C))
                    gate, up = f"{mlp}gate_proj.{kind}", f"{mlp}up_proj.{kind}"
                    yield f"{ours}feedforward.gate_up.{kind}", some((gate, hidden), (up, hidden))
                    yield f"{ours}feedforward.down.{kind}", some((f"{mlp}down_proj.{kind}", C))
            if model.qk_norm:
                for norm in ("q_norm", "k_norm"):
                    weight = f"{attention}{norm}.weight"
                    yield f"{ours}attention.{norm}.weight", some((weight, model.head_dim))
        yield "norm.weight", some(("norm.weight", C))
        if not model.tie_weights:
            yield "head.weight", Source(("lm_head.weight",), (V,))


class Llama(_LlamaLike):
    name, architecture = "llama", "LlamaForCausalLM"

    def biases(self, given: Given) -> dict[str, Any]:
        attention, mlp = given.switch("attention_bias", False), given.switch("mlp_bias", False)
        given.refuse(
            "attention_bias" if attention else "mlp_bias",
            attention != mlp,
            f"and {'mlp_bias' if attention else 'attention_bias'} is false, but our model has biases "
            "in both (model.bias) or in neither",
        )
        return {"bias": attention, "qkv_bias": attention}

    def misfits(self, model: GPTConfig) -> list[str]:
        found = super().misfits(model)
        found += differences(model, {"attention": ["full"]}) if not found else []
        if model.qkv_bias and not model.bias:
            found.append("model.qkv_bias is true, not as model.bias (false)")
        if model.n_embd % model.n_head:  # transformers refuses it, whatever head_dim is
            found.append(
                f"model.n_embd is {model.n_embd}, not a multiple of model.n_head ({model.n_head})"
            )
        return found

    def completed(self, model: GPTConfig) -> GPTConfig:
        return dataclasses.replace(model, qkv_bias=model.bias)

    def config(self, model: GPTConfig) -> dict[str, Any]:
        return {**super().config(model), "attention_bias": model.bias, "mlp_bias": model.bias}


class Mistral(_LlamaLike):
    name, architecture = "mistral", "MistralForCausalLM"
    default_n_kv_head = 8

    def biases(self, given: Given) -> dict[str, Any]:
        return {"bias": False, "qkv_bias": False}  # the class has no such settings

    def attention(self, given: Given, block_size: int) -> dict[str, Any]:
        if "sliding_window" in given.values and given.values["sliding_window"] is None:
            return {}
        return _window(given.whole("sliding_window", 4096), "L", block_size)

    def misfits(self, model: GPTConfig) -> list[str]:
        found = super().misfits(model) + differences(model, {"bias": [False], "qkv_bias": [False]})
        if model.attention == "sliding_window" and set(model.window_pattern) != {"L"}:
            found.append(f"model.window_pattern is {model.window_pattern}, not L")
        return found

    def config(self, model: GPTConfig) -> dict[str, Any]:
        window = model.attention_window if model.attention == "sliding_window" else None
        return {**super().config(model), "sliding_window": window}


class Qwen2(_LlamaLike):
    name, architecture = "qwen2", "Qwen2ForCausalLM"
    default_n_kv_head = 32

    def biases(self, given: Given) -> dict[str, Any]:
        return {"bias": False, "qkv_bias": True}

    def attention(self, given: Given, block_size: int) -> dict[str, Any]:
        layers = given.whole("num_hidden_layers", 1)
        window = None
        if given.switch("use_sliding_window", False):
            null = "sliding_window" in given.values and given.values["sliding_window"] is None
            window = None if null else given.whole("sliding_window", 4096)
        types = given.values.get("layer_types")
        if types is None:
            full = given.values.get(
                "max_window_layers", 28
            )  # the first ones; 0 is a number of them
            if not isinstance(full, int) or isinstance(full, bool):
                given.problems.append(f"max_window_layers is {full!r}, not a whole number")
                return {}
            pattern = "".join("L" if window and i >= full else "G" for i in range(layers))
        elif (
            not isinstance(types, list)
            or len(types) != layers
            or any(kind not in list(WINDOW_LETTERS) for kind in types)
        ):
            given.refuse(
                "layer_types",
                True,
                f"not {layers} (num_hidden_layers) of {', '.join(WINDOW_LETTERS)}",
            )
            return {}
        else:
            pattern = "".join(WINDOW_LETTERS[kind] for kind in types)
        given.refuse(
            "layer_types",
            window is None and "L" in pattern,
            "there are layers with a window, but sliding_window or use_sliding_window is not set",
        )
        return _window(window, pattern, block_size)

    def misfits(self, model: GPTConfig) -> list[str]:
        return super().misfits(model) + differences(model, {"bias": [False]})

    def completed(self, model: GPTConfig) -> GPTConfig:
        return dataclasses.replace(model, qkv_bias=True)

    def config(self, model: GPTConfig) -> dict[str, Any]:
        theirs = {letter: name for name, letter in WINDOW_LETTERS.items()}
        local = model.attention == "sliding_window"
        pattern = model.window_pattern if local else "G"
        letters = [pattern[i % len(pattern)] for i in range(model.n_layer)]
        return {
            **super().config(model),
            "use_sliding_window": local,
            "sliding_window": model.attention_window if local else None,
            "max_window_layers": letters.index("L") if "L" in letters else model.n_layer,
            "layer_types": [theirs[letter] for letter in letters],
        }


class Qwen3(Qwen2):
    name, architecture = "qwen3", "Qwen3ForCausalLM"
    default_head_dim = 128
    qk_norm = True

    def biases(self, given: Given) -> dict[str, Any]:
        return _LlamaLike.biases(self, given)

    def misfits(self, model: GPTConfig) -> list[str]:
        return super().misfits(model) + differences(model, {"qkv_bias": [False]})

    def completed(self, model: GPTConfig) -> GPTConfig:
        return model

    def config(self, model: GPTConfig) -> dict[str, Any]:
        return {**super().config(model), "attention_bias": False}


def _window(window: int | None, pattern: str, block_size: int) -> dict[str, Any]:
    """Settings of attention by the letters of its layers; a window that holds the block is none."""
    if window is None or window >= block_size or "L" not in pattern:
        return {}
    period = next(n for n in range(1, len(pattern) + 1) if _repeats(pattern, n))
    return {
        "attention": "sliding_window",
        "attention_window": window,
        "window_pattern": pattern[:period],
    }


def _repeats(pattern: str, period: int) -> bool:
    return all(letter == pattern[i % period] for i, letter in enumerate(pattern))
