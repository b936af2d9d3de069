"""GPT-2: learned positions, LayerNorm, a GELU or ReLU² feed-forward, biases everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from almostgpt.config import GPTConfig
from almostgpt.hub.layout import Family, Given, Source, differences

# transformers' names of activations; those of one line are the same function of ours.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu2": "relu2",
}


class GPT2(Family):
    name, architecture = "gpt2", "GPT2LMHeadModel"
    prefix = "transformer."
    left_out = r"\.attn\.(masked_)?bias$"  # causal masks, stored as buffers once

    def settings(self, given: Given) -> dict[str, Any]:
        given.refuse(
            "scale_attn_weights",
            not given.switch("scale_attn_weights", True),
            "our attention divides its scores by the root of the head's width",
        )
        given.refuse(
            "scale_attn_by_inverse_layer_idx",
            given.switch("scale_attn_by_inverse_layer_idx", False),
            "our attention divides its scores alike in every layer",
        )
        given.refuse(
            "add_cross_attention",
            given.switch("add_cross_attention", False),
            "our blocks have no cross-attention",
        )
        n_embd = given.whole("n_embd", needed=True)
        return {
            "block_size": given.whole("n_positions", needed=True),
            "n_layer": given.whole("n_layer", needed=True),
            "n_head": given.whole("n_head", needed=True),
            "n_embd": n_embd,
            "mlp_hidden": given.whole("n_inner", 4 * n_embd),
            "norm_eps": given.number("layer_norm_epsilon", 1e-5),
            "bias": True,
            "tie_weights": given.switch("tie_word_embeddings", True),
            "norm": "layernorm",
            "feedforward": given.choice("activation_function", "gelu_new", ACTIVATIONS),
            "position": "learned",
        }

    def misfits(self, model: GPTConfig) -> list[str]:
        found = differences(
            model,
            {
                "position": ["learned"],
                "norm": ["layernorm"],
                "feedforward": list(dict.fromkeys(ACTIVATIONS.values())),
                "attention": ["full"],
                "qk_norm": [False],
                "n_kv_head": [model.n_head],
            },
        )
        if model.n_head * model.head_dim != model.n_embd:
            found.append(
                f"model.head_dim is {model.head_dim}, not model.n_embd / model.n_head "
                f"({model.n_embd} / {model.n_head})"
            )
        return found

    def completed(self, model: GPTConfig) -> GPTConfig:
        return dataclasses.replace(model, bias=True, qkv_bias=True)

    def config(self, model: GPTConfig) -> dict[str, Any]:
        theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
        return {
            "n_positions": model.block_size,
            "n_embd": model.n_embd,
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_inner": model.mlp_hidden,
            "activation_function": theirs[model.feedforward],
            "layer_norm_epsilon": model.norm_eps,
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": 0.0,
        }

    def sources(self, model: GPTConfig) -> Iterator[tuple[str, Source]]:
        C, hidden = model.n_embd, model.mlp_hidden

        def one(name: str, rows: int, transposed: bool = False) -> Source:
            return Source((self.prefix + name,), (rows,), transposed)

        yield "token_embedding.weight", one("wte.weight", model.vocab_size)
        yield "position.weight", one("wpe.weight", model.block_size)
        for i in range(model.n_layer):
            ours, theirs = f"blocks.{i}.", f"h.{i}."
            for norm, name in (("attention_norm", "ln_1"), ("feedforward_norm", "ln_2")):
                yield f"{ours}{norm}.weight", one(f"{theirs}{name}.weight", C)
                yield f"{ours}{norm}.bias", one(f"{theirs}{name}.bias", C)
            for linear, name, rows in (
                ("attention.qkv", "attn.c_attn", 3 * C),
                ("attention.out", "attn.c_proj", C),
                ("feedforward.up", "mlp.c_fc", hidden),
                ("feedforward.down", "mlp.c_proj", C),
            ):  # "Conv1D" there, which has its matrix transposed
                yield f"{ours}{linear}.weight", one(f"{theirs}{name}.weight", rows, True)
                yield f"{ours}{linear}.bias", one(f"{theirs}{name}.bias", rows)
        yield "norm.weight", one("ln_f.weight", C)
        yield "norm.bias", one("ln_f.bias", C)
        if not model.tie_weights:
            yield "head.weight", Source(("lm_head.weight",), (model.vocab_size,))
