"""Tiny models of transformers, randomly initialised, whose logits differ enough to be told apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # attention far from uniform
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {**SLIDING, "use_sliding_window": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def make(family: str, **changes) -> nn.Module:
    """``family``: of FAMILIES, or how transformers' classes begin (``"Gemma2"``)."""
    prefix, options = FAMILIES.get(family, (family, {}))
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **options, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


def ids(B: int, T: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (B, T), generator=generator)


def padded(T: int, *, left=(0, 0, 0), right=(0, 0, 0)) -> Tensor:
    """(B, T) ones, with zeros where a row is padded."""
    mask = torch.ones(len(left), T, dtype=torch.long)
    for row, (first, last) in enumerate(zip(left, right, strict=True)):
        mask[row, :first] = 0
        mask[row, T - last :] = 0
    return mask


def with_attention(model: nn.Module, name: str, run: Callable):
    model.set_attn_implementation(name)
    return run(model)


def logits_and_gradients(model: nn.Module, tokens: Tensor, real: Tensor | None = None, **inputs):
    """Logits (n, vocab_size) of the real tokens, and name → gradient of a loss on them."""
    model.zero_grad()
    logits = model(tokens, **inputs).logits
    logits = logits.flatten(0, 1) if real is None else logits[real.bool()]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
