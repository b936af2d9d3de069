"""The settings of a model: its sizes and parts, what is derived from them, and what cannot be.

Settings that belong to one part (a window, the number of experts) are ``None`` by default.
``resolve_model`` fills in what the chosen parts use; one that is given where no chosen part uses it
is a mistake, since it would do nothing: ``PART_OPTIONS`` says whose each is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from almostgpt.errors import UserError, not_one_of

MAX_INT = 2**31 - 1  # of every whole number: they count what must fit into a machine


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model and the part chosen for each of its swappable places."""

    block_size: int = 256  # longest sequence in tokens
    vocab_size: int | None = None  # number of token ids; null takes the tokenizer's
    vocab_multiple: int = 64  # rows of the embedding are rounded up to this (50257 -> 50304)
    n_layer: int = 6  # number of blocks
    n_head: int = 6  # number of query heads
    n_kv_head: int | None = None  # number of key/value heads (1: MQA); null is n_head (MHA)
    head_dim: int | None = None  # width of a head; null is n_embd / n_head
    n_embd: int = 384  # width of the residual stream
    mlp_ratio: float = 4.0  # hidden width of a plain feed-forward over n_embd (SwiGLU: 2/3 of it)
    mlp_hidden: int | None = (
        None  # hidden width of the feed-forward, or of an expert; null: from mlp_ratio
    )
    norm_eps: float = 1e-5  # added to the variance in norms
    dropout: float = 0.0  # after the embedding and after each sub-block
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool | None = None  # bias of the QKV projection; null follows bias
    qk_norm: bool = False  # RMSNorm on each head of queries and keys
    tie_weights: bool = True  # the output projection shares the token embedding
    logit_softcap: float = 0.0  # logits are bent to within ± this; 0: not
    gradient_checkpointing: str = "none"  # none | selective | full: less memory, more time
    quantize: str = "none"  # none | int8: matrices in 8 bits, for inference alone

    norm: str = "rmsnorm"  # layernorm | rmsnorm | scalenorm
    feedforward: str = "swiglu"  # gelu | gelu_tanh | relu2 | swiglu | moe
    position: str = "rope"  # learned | sinusoidal | rope | alibi | none
    attention: str = "full"  # full | sliding_window | linear | block_sparse

    rope_base: float = 10000.0  # rope: base of the rotary frequencies
    rope_fraction: float | None = None  # rope: share of a head that is rotated; null: all of it
    rope_scaling: str | None = (
        None  # rope: none | linear | ntk | llama3, for longer texts; null: none
    )
    rope_factor: float | None = None  # rope_scaling: how many times longer texts become; null: 1
    rope_original_block_size: int | None = (
        None  # llama3: block_size before that; null: block_size / factor
    )
    rope_low_freq_factor: float | None = (
        None  # llama3: slower than so many turns in it: scaled; null: 1
    )
    rope_high_freq_factor: float | None = (
        None  # llama3: faster than so many turns: as it was; null: 4
    )

    attention_window: int | None = (
        None  # sliding_window: keys seen, its own too; null: block_size / 4
    )
    window_pattern: str | None = (
        None  # sliding_window: L (local), G (global) by layer, repeated; null: L
    )
    feature_map: str | None = None  # linear: elu1 | softmax (over features); null: elu1
    sparse_block: int | None = (
        None  # block_sparse: tokens in a block; null: block_size / 8, at most 64
    )
    sparse_window: int | None = None  # block_sparse: last blocks seen, its own among them; null: 3
    sparse_global: int | None = None  # block_sparse: first blocks, seen by all; null: 1
    sparse_random: int | None = None  # block_sparse: blocks drawn from all between; null: 2

    expert: str | None = None  # moe: gelu | swiglu; null: swiglu
    n_experts: int | None = None  # moe: experts in a layer; null: 8
    experts_per_token: int | None = None  # moe: how many of them a token goes to; null: 2
    balance_loss: float | None = None  # moe: weight of the load-balancing loss; null: 0.01
    router_z_loss: float | None = None  # moe: weight of the router's z-loss; null: 0.001

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: ``vocab_size`` rounded up to ``vocab_multiple``."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set: give the number of token ids")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window_of(self, layer: int) -> int | None:
        """Keys that a token of this layer sees, itself among them; None: all before it."""
        if self.attention != "sliding_window":
            return None
        local = self.window_pattern[layer % len(self.window_pattern)] == "L"
        return self.attention_window if local else None


# Whose setting each is: the place of the part, the part (or, of rope, the kind of scaling), and what it is
# where it is not given. A callable derives it from the configuration.
_SCALED = ("linear", "ntk", "llama3")
PART_OPTIONS: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "rope_fraction": ("position", ("rope",), 1.0),
    "rope_scaling": ("position", ("rope",), "none"),
    "rope_factor": ("rope_scaling", _SCALED, 1.0),
    "rope_original_block_size": (
        "rope_scaling",
        ("llama3",),
        lambda c: max(1, int(c.block_size / c.rope_factor)),
    ),
    "rope_low_freq_factor": ("rope_scaling", ("llama3",), 1.0),
    "rope_high_freq_factor": ("rope_scaling", ("llama3",), 4.0),
    "attention_window": (
        "attention",
        ("sliding_window",),
        lambda c: max(1, c.block_size // 4),
    ),
    "window_pattern": ("attention", ("sliding_window",), "L"),
    "feature_map": ("attention", ("linear",), "elu1"),
    "sparse_block": (
        "attention",
        ("block_sparse",),
        lambda c: min(64, max(1, c.block_size // 8)),
    ),
    "sparse_window": ("attention", ("block_sparse",), 3),
    "sparse_global": ("attention", ("block_sparse",), 1),
    "sparse_random": ("attention", ("block_sparse",), 2),
    "expert": ("feedforward", ("moe",), "swiglu"),
    "n_experts": ("feedforward", ("moe",), 8),
    "experts_per_token": ("feedforward", ("moe",), 2),
    "balance_loss": ("feedforward", ("moe",), 0.01),
    "router_z_loss": ("feedforward", ("moe",), 0.001),
}


def resolve_model(model: GPTConfig) -> GPTConfig:
    """Fills the derived sizes of a model. Pure; a resolved configuration resolves to itself."""
    for name, (place, parts, default) in PART_OPTIONS.items():
        if getattr(model, name) is None and getattr(model, place) in parts:
            value = default(model) if callable(default) else default
            model = dataclasses.replace(model, **{name: value})
    return dataclasses.replace(
        model,
        n_kv_head=model.n_head if model.n_kv_head is None else model.n_kv_head,
        head_dim=model.n_embd // max(model.n_head, 1) if model.head_dim is None else model.head_dim,
        mlp_hidden=_derived_hidden(model) if model.mlp_hidden is None else model.mlp_hidden,
        qkv_bias=model.bias if model.qkv_bias is None else model.qkv_bias,
    )


def _derived_hidden(model: GPTConfig) -> int:
    """The hidden width by which every kind has the same matrices for a token, as nearly as it goes."""
    hidden, kind = model.mlp_ratio * model.n_embd, model.feedforward
    if kind == "moe":  # all of a token's experts together are one plain feed-forward
        hidden, kind = hidden / model.experts_per_token, model.expert
    if kind == "swiglu":
        # Three matrices instead of two: 2/3 of the width keeps the parameters (Shazeer 2020),
        # rounded up to 32 so that every GEMM stays aligned.
        return -(-max(1, int(hidden * 2 / 3)) // 32) * 32
    return max(1, int(hidden))


# ---------------------------------------------------------------- what cannot be


def unused_options(model: GPTConfig) -> Iterator[str]:
    """Names of the settings that are given and that no chosen part uses."""
    for name, (place, parts, _) in PART_OPTIONS.items():
        if getattr(model, name) is not None and getattr(model, place) not in parts:
            yield name


def without_unused(model: GPTConfig) -> GPTConfig:
    """The model with those settings left out: what is chosen decides which of the others count."""
    for name, (place, parts, _) in PART_OPTIONS.items():
        # One after the other: rope_factor goes with the rope_scaling that went before it.
        if getattr(model, place) not in parts:
            model = dataclasses.replace(model, **{name: None})
    if model.position != "rope":
        model = dataclasses.replace(model, rope_base=GPTConfig.rope_base)
    return model


def model_problems(
    model: GPTConfig, parts: Mapping[str, Collection[str]] | None = None
) -> list[str]:
    """What is impossible about a model, each as ``model.key: reason``.

    Args:
        parts: the names that each place may have (``PARTS`` of ``almostgpt.model.gpt``); None: they are
            not looked at.
    """
    unknown = {
        place: not_one_of(getattr(model, place), names)
        for place, names in (parts or {}).items()
        if getattr(model, place) not in names
    }
    problems = [f"model.{place} is {reason}" for place, reason in unknown.items()]
    # Of a part that is misspelt nobody knows which settings are its own.
    problems += _unused(model, unknown)
    sizes = _wrong_sizes(model)
    if sizes:
        return problems + sizes
    asked, model = model, resolve_model(model)
    problems += _wrong_names(model)
    problems += _wrong_heads(asked, model)
    problems += _wrong_rope(model)
    problems += _wrong_attention(model)
    if model.feedforward == "moe" and model.experts_per_token > model.n_experts:
        problems.append(
            f"model.experts_per_token is {model.experts_per_token}, but there are "
            f"{model.n_experts} experts (model.n_experts)"
        )
    if model.position == "sinusoidal" and model.n_embd % 2:
        problems.append(
            f"model.n_embd is {model.n_embd}, but model.position=sinusoidal needs an even one"
        )
    if not 0 <= model.dropout < 1:
        problems.append(f"model.dropout is {model.dropout}, but must be in [0, 1)")
    return problems


def _unused(model: GPTConfig, unknown: Collection[str]) -> list[str]:
    problems = []
    for name in unused_options(model):
        place, parts, _ = PART_OPTIONS[name]
        if place in unknown:
            continue
        problems.append(
            f"model.{name} is {getattr(model, name)}, but is for model.{place}="
            f"{' | '.join(parts)}, and that is {getattr(model, place) or 'none'}: it would do nothing"
        )
    rotates = model.position == "rope" or "position" in unknown
    if not rotates and model.rope_base != GPTConfig.rope_base:
        problems.append(
            f"model.rope_base is {model.rope_base}, but is for model.position=rope, and that is "
            f"{model.position}: it would do nothing"
        )
    return problems


def _wrong_sizes(model: GPTConfig) -> list[str]:
    at_least = dict.fromkeys("block_size vocab_multiple n_layer n_head n_embd".split(), 1)
    at_least |= dict.fromkeys("vocab_size n_kv_head head_dim mlp_hidden".split(), 1)
    at_least |= dict.fromkeys("rope_original_block_size attention_window sparse_block".split(), 1)
    at_least |= dict.fromkeys("sparse_window n_experts experts_per_token".split(), 1)
    at_least |= dict.fromkeys("sparse_global sparse_random balance_loss router_z_loss".split(), 0)
    at_least |= {"rope_factor": 1, "logit_softcap": 0}
    problems = [
        f"model.{name} is {value}, but must be at least {least}"
        for name, least in at_least.items()
        if (value := getattr(model, name)) is not None and not least <= value < math.inf
    ]
    above_zero = (
        "mlp_ratio norm_eps rope_base rope_fraction rope_low_freq_factor rope_high_freq_factor"
    )
    problems += [
        f"model.{name} is {value}, but must be above 0 and finite"
        for name in above_zero.split()
        if (value := getattr(model, name)) is not None and not 0 < value < math.inf
    ]
    if not problems and model.mlp_hidden is None and model.mlp_ratio * model.n_embd > MAX_INT:
        problems.append(
            f"model.mlp_ratio is {model.mlp_ratio}, but times model.n_embd ({model.n_embd}) it must be "
            f"at most {MAX_INT}"
        )
    return problems


def _wrong_names(model: GPTConfig) -> list[str]:
    choices = {
        "gradient_checkpointing": ("none", "selective", "full"),
        "quantize": ("none", "int8"),
        "rope_scaling": ("none", *_SCALED),
        "feature_map": ("elu1", "softmax"),
        "expert": ("gelu", "swiglu"),
    }
    return [
        f"model.{key} is {not_one_of(value, known)}"
        for key, known in choices.items()
        if (value := getattr(model, key)) is not None and value not in known
    ]


def _wrong_heads(asked: GPTConfig, model: GPTConfig) -> list[str]:
    problems = []
    if asked.head_dim is None and model.n_embd % model.n_head:
        problems.append(
            f"model.n_embd ({model.n_embd}) is not a multiple of model.n_head ({model.n_head}); "
            "change one of them or set model.head_dim"
        )
    if model.n_head % model.n_kv_head:
        problems.append(
            f"model.n_head ({model.n_head}) is not a multiple of model.n_kv_head ({model.n_kv_head})"
        )
    return problems


def _wrong_rope(model: GPTConfig) -> list[str]:
    if model.position != "rope":
        return []
    problems = []
    if model.rope_fraction > 1:
        problems.append(f"model.rope_fraction is {model.rope_fraction}, but must be at most 1")
    elif model.rope_fraction == 1 and model.head_dim % 2:
        problems.append(
            f"model.head_dim is {model.head_dim}, but model.position=rope needs an even one"
        )
    elif (rotated := int(model.head_dim * model.rope_fraction)) % 2 or rotated == 0:
        problems.append(
            f"model.rope_fraction of {model.rope_fraction} rotates {rotated} of {model.head_dim} "
            "dimensions of a head (model.head_dim), but rope needs an even number of them"
        )
    if model.rope_scaling == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        problems.append(
            f"model.rope_low_freq_factor is {model.rope_low_freq_factor}, but must be below "
            f"model.rope_high_freq_factor ({model.rope_high_freq_factor})"
        )
    return problems


def _wrong_attention(model: GPTConfig) -> list[str]:
    problems = []
    if model.attention == "sliding_window":
        if model.attention_window > model.block_size:
            problems.append(
                f"model.attention_window is {model.attention_window}, more than model.block_size "
                f"({model.block_size}): it would do nothing; model.attention=full is the same"
            )
        if not model.window_pattern or set(model.window_pattern) - {"L", "G"}:
            problems.append(
                f"model.window_pattern is {model.window_pattern!r}, but must be a word of L (local) "
                "and G (global), such as LLLLLG"
            )
        elif "L" not in model.window_pattern:
            problems.append(
                "model.window_pattern has no L (local) layer: model.attention=full is the same"
            )
    if model.attention == "linear" and model.position == "alibi":
        problems.append(
            "model.position=alibi cannot go with model.attention=linear: a penalty that grows with "
            "the distance is no product of features; take rope, learned, sinusoidal or none"
        )
    if model.attention == "block_sparse" and model.sparse_block > model.block_size:
        problems.append(
            f"model.sparse_block is {model.sparse_block}, more than model.block_size "
            f"({model.block_size}): there would be one block; model.attention=full is the same"
        )
    return problems
