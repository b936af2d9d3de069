"""Command lines from dataclasses, by tyro: ``--section.key value`` for every setting."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from almostgpt.config import Config
from almostgpt.config_file import coerce
from almostgpt.errors import UserError
from almostgpt.kernels.dispatch import CARDS

# A whole configuration as options without a prefix, its booleans with a value like every other setting.
Settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]

T = TypeVar("T")
_registry = ConstructorRegistry()
_NAMES = {
    bool: "{true,false}",
    int: "INT",
    float: "FLOAT",
    str: "TEXT",
    dict[str, float]: "NAME=NUMBER,…",
}
_BOOLEANS = {"true": True, "false": False}


@_registry.primitive_rule
def _as_in_a_file(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Reads a value as the YAML loader does: ``true``, ``1e4`` for a whole number, ``null``."""
    members = typing.get_args(info.type) or (info.type,)
    optional = type(None) in members
    kinds = [kind for kind in members if kind is not type(None)]
    if len(kinds) != 1 or kinds[0] not in _NAMES:
        return None
    kind = kinds[0]

    def from_words(words: list[str]) -> Any:
        word = words[0]
        if optional and word.lower() in ("null", "none"):
            return None
        return coerce(_BOOLEANS.get(word.lower(), word) if kind is bool else word, kind)

    def to_words(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [",".join(f"{name}={number}" for name, number in value.items())]
        return ["null" if value is None else str(value).lower() if kind is bool else str(value)]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_NAMES[kind] + ("|null" if optional else ""),
        instance_from_str=from_words,
        is_instance=lambda value: (
            (optional and value is None)
            or isinstance(value, (typing.get_origin(kind) or kind, int))
        ),
        str_from_instance=to_words,
    )


def capability(text: str) -> tuple[int, ...]:
    """``9.0`` as (9, 0); one of a card that is known."""
    known = {f"{major}.{minor}": (major, minor) for major, minor in CARDS}
    if text not in known:
        raise UserError(f"--capability must be one of {', '.join(known)}, not {text!r}")
    return known[text]


def parse(
    kind: Callable[..., T],
    arguments: list[str],
    *,
    prog: str,
    description: str,
    default: Any = None,
) -> T:
    """``arguments`` as a ``kind`` (a dataclass); ``default`` supplies what they leave out.

    A mistake ends the process with code 2 after a message that names the nearest option.
    """
    return tyro.cli(
        kind,
        args=arguments,
        prog=prog,
        description=description,
        registry=_registry,
        **({} if default is None else {"default": default}),
    )
