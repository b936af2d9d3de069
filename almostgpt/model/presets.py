"""Model sizes by name, for :meth:`almostgpt.GPT.from_preset`."""

from __future__ import annotations

from almostgpt.config import GPTConfig

# GPT-2 as released (Radford et al. 2019): the embedding is not padded, so that counts and weights are
# exactly the original's.
_GPT2 = GPTConfig(
    block_size=1024,
    vocab_size=50257,
    vocab_multiple=1,
    bias=True,
    norm="layernorm",
    feedforward="gelu_tanh",
    position="learned",
)


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> dict:
    return {**vars(_GPT2), "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}


def _modern(n_layer: int, n_head: int, n_embd: int) -> dict:
    """RMSNorm, SwiGLU and RoPE (the defaults) over GPT-2's vocabulary."""
    return {
        "block_size": 1024,
        "vocab_size": 50257,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
    }


MODEL_PRESETS: dict[str, dict] = {
    "tiny": _modern(6, 5, 160),  # 9.9 M parameters
    "small": _modern(8, 5, 320),  # 26 M
    "medium": _modern(10, 10, 640),  # 81 M
    "large": _modern(24, 16, 1024),  # 354 M
    "gpt2": _gpt2(12, 12, 768),  # 124 M
    "gpt2-medium": _gpt2(24, 16, 1024),  # 355 M
    "gpt2-large": _gpt2(36, 20, 1280),  # 774 M
    "gpt2-xl": _gpt2(48, 25, 1600),  # 1558 M
}
