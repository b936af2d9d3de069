"""What is compared: every combination of the varied settings, each as the settings of a run."""

from __future__ import annotations

import itertools
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from almostgpt.config import Config, flatten, overlay
from almostgpt.config_file import coerce
from almostgpt.config_model import PART_OPTIONS, unused_options, without_unused
from almostgpt.errors import UserError, not_one_of
from almostgpt.training.ablation.matching import match_parameters, parameters

MATCHES = ("parameters", "none")
MOST_SEEDS = 100

# Variants must see the same tokens and be measured alike, so these are the same for all.
_SHARED_MODEL = {"block_size", "vocab_size", "vocab_multiple", "quantize"}
_VARIED_TRAINING = {"precision", "matmul", "compile"}


@dataclass(frozen=True)
class Variant:
    """One combination."""

    name: str  # such as "norm=rmsnorm feedforward=gelu"
    settings: Mapping[str, Any]  # what of the varied settings it has: {"model.norm": "rmsnorm"}
    config: Config  # of its run, resolved; config.seed is that of the first
    parameters: int

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return re.sub(r"[^\w=.+-]+", ",", self.name)


def parse_varied(given: Sequence[str]) -> dict[str, list[Any]]:
    """``["model.norm=rmsnorm,layernorm"]`` as ``{"model.norm": ["rmsnorm", "layernorm"]}``, by type.

    Raises:
        UserError: all that is wrong with them, in one message.
    """
    kinds = _kinds()
    varied: dict[str, list[Any]] = {}
    problems = []
    for words in given:
        key, equals, values = words.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not values:
            problems.append(f"{words!r}: say KEY=VALUE,VALUE, such as model.norm=rmsnorm,layernorm")
        elif key not in kinds:
            problems.append(f"{words!r}: the setting is {not_one_of(key, kinds)}")
        elif key in varied:
            problems.append(f"{words!r}: {key} is varied twice: give all its values in one --vary")
        elif reason := _cannot_vary(key):
            problems.append(f"{words!r}: {reason}")
        else:
            varied[key] = list(_values(values.split(","), kinds[key], words, problems))
    if problems:
        raise UserError("--vary:\n" + "\n".join(f"  {problem}" for problem in problems))
    return varied


def _kinds() -> dict[str, Any]:
    """The annotated type of every setting."""
    found = {}
    for section, kind in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(kind) if section in _sections() else {}
        found |= {f"{section}.{name}": hint for name, hint in hints.items()} or {section: kind}
    return found


def _sections() -> set[str]:
    return {key.partition(".")[0] for key in flatten(Config()) if "." in key}


def _cannot_vary(key: str) -> str | None:
    section, _, name = key.rpartition(".")
    if key == "seed":
        return "--seeds says how many"
    if key == "optimizer.betas":
        return "it is a pair, and pairs cannot be varied"
    shared = {"model": name in _SHARED_MODEL, "training": name not in _VARIED_TRAINING}
    if shared.get(section, section not in ("optimizer", "schedule")):
        return (
            f"{key} is the same for all variants: they train on the same tokens and are measured "
            "alike. Give it once, without --vary"
        )
    return None


def _values(words: list[str], kind: Any, given: str, problems: list[str]) -> Iterator[Any]:
    names = {"true": True, "false": False} if kind is bool else {"null": None, "none": None}
    names = names if kind is bool or type(None) in typing.get_args(kind) else {}
    seen = []
    for word in map(str.strip, words):
        try:
            value = coerce(names.get(word.lower(), word), kind)
        except ValueError as error:
            problems.append(f"{given!r}: {error}")
            continue
        if value in seen:
            problems.append(f"{given!r}: {word} is given twice")
        seen.append(value)
        yield value


def make_variants(
    settings: Config,
    varied: Mapping[str, Sequence[Any]],
    complete: Callable[[Config], Config],
    match: str = "parameters",
) -> list[Variant]:
    """All combinations, the first values first; equal ones are one.

    Args:
        settings: what all have in common, not resolved, so that what follows from a part does so for
            each of them. What belongs to a part that a variant does not have is left out of it.
        varied: see :func:`parse_varied`.
        complete: resolves and checks settings, and sets ``model.vocab_size``.
        match: ``"parameters"``: the hidden width of each is adapted to the parameters of the first.

    Raises:
        UserError: all combinations that cannot be, or options that none of them uses, in one message.
    """
    if match not in MATCHES:
        raise UserError(f"--match is {not_one_of(match, MATCHES)}")
    if match != "none" and (fixed := {"model.mlp_hidden", "model.mlp_ratio"} & set(varied)):
        raise UserError(
            f"--vary {min(fixed)}: --match parameters would set the width anew; add --match none"
        )
    problems = [
        f"model.{name} is given, but no variant has a part that uses it"
        for name in _used_by_none(settings, varied)
    ]
    found: dict[Config, Variant] = {}
    for values in itertools.product(*varied.values()):
        asked = dict(zip(varied, values, strict=True))
        config = overlay(settings, asked)
        config = overlay(config, {"model": without_unused(config.model)})
        kept = {key: value for key, value in asked.items() if flatten(config)[key] == value}
        name = _name(kept, varied)
        try:
            config = complete(config)
            count = parameters(config.model)
            if match == "parameters" and found:
                target = next(iter(found.values())).parameters
                config = overlay(config, {"model": match_parameters(config.model, target)})
                count = parameters(config.model)
        except UserError as error:
            problems.append(f"{name}: {error}".replace("\n", "\n  "))
        else:
            found.setdefault(config, Variant(name, kept, config, count))
    if problems:
        raise UserError(
            "these variants cannot be trained:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return list(found.values())


def _used_by_none(settings: Config, varied: Mapping[str, Sequence[Any]]) -> list[str]:
    """Options that belong to parts which no combination has."""
    left = set(PART_OPTIONS)
    for values in itertools.product(*varied.values()):
        config = overlay(settings, dict(zip(varied, values, strict=True)))
        left &= set(unused_options(config.model))
    return [name for name in PART_OPTIONS if name in left]


def _name(settings: Mapping[str, Any], varied: Mapping[str, Any]) -> str:
    """``norm=rmsnorm bias=true``: short names of the settings where one has it, values as in YAML."""
    owners = Counter(key.rpartition(".")[2] for key in varied)
    parts = []
    for key, value in settings.items():
        short = key.rpartition(".")[2]
        text = "null" if value is None else value
        if isinstance(value, bool):
            text = str(value).lower()
        parts.append(f"{short if owners[short] == 1 else key}={text}")
    return " ".join(parts)
