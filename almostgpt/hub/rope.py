"""Rotary positions in a ``config.json``: the keys of transformers 5, and those before it."""

from __future__ import annotations

from typing import Any

from almostgpt.config import GPTConfig
from almostgpt.hub.layout import Given


def rope_settings(given: Given, block_size: int) -> dict[str, Any]:
    """``rope_parameters``, or ``rope_theta`` and ``rope_scaling``, as GPTConfig fields."""
    key = "rope_scaling" if given.values.get("rope_scaling") else "rope_parameters"
    values = given.values.get(key) or {}
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        given.refuse(key, True, "our model has one kind of rotary positions for all layers")
        return {}
    theta = given.number("rope_theta", given.number("rope_theta", 10000.0), values)
    share = values.get("partial_rotary_factor", given.values.get("partial_rotary_factor"))
    if share not in (None, 1):
        given.problems.append(
            f"partial_rotary_factor is {share!r}: models of this type rotate whole heads"
        )
    kind = values.get("rope_type", values.get("type", "default"))
    settings: dict[str, Any] = {"rope_base": theta}
    if kind == "default":
        return settings
    if kind not in ("linear", "llama3"):
        given.problems.append(
            f"rope_type of {key} is {kind!r}; there are default, linear and llama3"
        )
        return settings
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}[
        kind
    ]
    given.problems += [f"{name} of {key} is missing" for name in needed if values.get(name) is None]
    settings |= {"rope_scaling": kind, "rope_factor": given.number("factor", 1.0, values)}
    if kind == "llama3":
        name = "original_max_position_embeddings"
        outside = given.whole(name, block_size)
        inside = values.get(name)
        settings |= {
            "rope_low_freq_factor": given.number("low_freq_factor", 1.0, values),
            "rope_high_freq_factor": given.number("high_freq_factor", 4.0, values),
            "rope_original_block_size": (
                outside
                if name in given.values or inside is None
                else int(given.number(name, 1, values))
            ),
        }
    return settings


def rope_config(model: GPTConfig) -> dict[str, Any]:
    """The same back, by both spellings, so that transformers of any version reads one of them.

    NTK scaling is a larger base (``almostgpt/model/position.py``), and is written as that.
    """
    base, scaling = model.rope_base, None
    if model.rope_scaling == "ntk" and model.head_dim > 2:
        base *= model.rope_factor ** (model.head_dim / (model.head_dim - 2))
    elif model.rope_scaling == "linear":
        scaling = {"rope_type": "linear", "factor": model.rope_factor}
    elif model.rope_scaling == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_block_size,
        }
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": base}
    return {"rope_theta": base, "rope_scaling": scaling, "rope_parameters": parameters}
