"""What a user may ask of a cache, and what to say of what cannot be."""

from __future__ import annotations

from almostgpt.config import GPTConfig, not_one_of
from almostgpt.errors import UserError

KINDS = ("auto", "full", "rolling", "int8", "none")
SINK_TOKENS = 4  # what Xiao et al. found to be enough


def past_the_positions(tokens: int, config: GPTConfig) -> str:
    """What to say of more tokens than there are positions."""
    return (
        f"{tokens} tokens, prompt and new ones together, do not fit: the model's {config.position} "
        f"positions end at {config.block_size}. Ask for fewer, or give cache=none, which computes the "
        f"last {config.block_size} anew for every token"
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
