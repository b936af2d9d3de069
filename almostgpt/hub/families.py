"""The model types that are read and written, and which of them a model of ours fits."""

from __future__ import annotations

from almostgpt.config import GPTConfig, not_one_of
from almostgpt.errors import UserError
from almostgpt.hub.gpt2 import GPT2
from almostgpt.hub.layout import Family, Given, differences, refused
from almostgpt.hub.llama import Llama, Mistral, Qwen2, Qwen3

# By model_type. Where a model fits several, the first is written.
FAMILIES: dict[str, Family] = {
    family.name: family for family in (GPT2(), Llama(), Mistral(), Qwen2(), Qwen3())
}


def family_of(values: dict, source: str) -> Family:
    """The family of a ``config.json``; ``UserError`` where there is none here."""
    model_type = values.get("model_type")
    if model_type not in list(FAMILIES):  # a list: it may be unhashable
        raise UserError(f"{source}: model_type is {not_one_of(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def given_settings(family: Family, given: Given) -> dict:
    """The GPTConfig fields of a ``config.json``, with what every family has; see ``Family.settings``."""
    given.refuse(
        "quantization_config",
        bool(given.values.get("quantization_config")),
        "quantised weights are not read; take the model in bf16, fp16 or fp32",
    )
    return {
        "vocab_size": given.whole("vocab_size", needed=True),
        "vocab_multiple": 1,
        **family.settings(given),
    }


def fitting_family(model: GPTConfig) -> Family:
    """The first family that a model fits; ``UserError`` names the parts that none of them has."""
    everywhere = differences(model, {"logit_softcap": [0.0], "quantize": ["none"]})
    misfits = {family: family.misfits(model) for family in FAMILIES.values()}
    if not everywhere:
        for family, found in misfits.items():
            if not found:
                return family
    fewest = min(map(len, misfits.values()))
    lines = everywhere + [
        f"{family.name}: {problem}"
        for family, found in misfits.items()
        if len(found) == fewest
        for problem in found
    ]
    raise refused("the model fits no layout of Hugging Face; the nearest", lines)
