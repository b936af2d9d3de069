"""What a user may ask of a cache, and what to say of what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from almostgpt.config_model import GPTConfig
from almostgpt.errors import UserError, not_one_of

if TYPE_CHECKING:
    from almostgpt.model import GPT

KINDS = ("auto", "full", "rolling", "int8", "none")
SINK_TOKENS = 4  # what Xiao et al. found to be enough


# Settings of a model that decide what its cache holds, and how it is read.
MATTERS = (
    *("n_layer", "n_head", "n_kv_head", "head_dim", "qk_norm", "position", "attention"),
    *("rope_base", "rope_fraction", "rope_scaling", "rope_factor", "rope_original_block_size"),
    *("rope_low_freq_factor", "rope_high_freq_factor", "attention_window", "window_pattern"),
    *("feature_map", "sparse_block", "sparse_window", "sparse_global", "sparse_random"),
)


def past_the_positions(tokens: int, model: GPT) -> str:
    """What to say of more tokens than there are positions, or than block-sparse attention reaches."""
    block_size = model.config.block_size
    return (
        f"{tokens} tokens, prompt and new ones together, do not fit: the model's {model.what_ends} at "
        f"{block_size}. Ask for fewer, or give cache=none, which computes the last {block_size} anew for "
        "every token"
    )


def check_rolls(config: GPTConfig) -> None:
    """Raises ``UserError`` where a token needs what a rolling cache would have given away."""
    if config.attention == "block_sparse":
        raise UserError(
            "cache=rolling keeps the first and the last tokens, but block_sparse attention looks back at "
            "blocks all over the text: take cache=full or none"
        )


def check_int8(config: GPTConfig) -> None:
    if config.attention == "linear":
        raise UserError(
            "cache=int8 stores keys and values in 8 bits, and linear attention has sums in place of them: "
            "take cache=auto"
        )


def check_sums(window: int | None, sink_tokens: int | None) -> None:
    """Raises ``UserError`` for options of a window where there are only sums over all tokens."""
    for name, value in (("window", window), ("sink_tokens", sink_tokens)):
        if value is not None:
            raise UserError(
                f"{name} is for keys and values; linear attention keeps sums over all tokens"
            )


def check_options(kind: str, window: int | None, sink_tokens: int | None) -> None:
    """Raises ``UserError`` for what no model could do."""
    if kind not in KINDS:
        raise UserError(f"cache is {not_one_of(kind, KINDS)}")
    for name, value in (("window", window), ("sink_tokens", sink_tokens)):
        if value is not None and kind in ("full", "none"):
            raise UserError(f"{name} is for a cache that rolls, and cache={kind} does not")


def check_whole(name: str, value: object, least: int, most: int, why: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} is {value!r}, but must be in {least} … {most}{why}")


def check_window(config: GPTConfig, window: object, sink_tokens: object) -> None:
    check_whole("window", window, 1, config.block_size, ", the model's block_size")
    check_whole("sink_tokens", sink_tokens, 0, window - 1, ": less than the window")
