"""Command lines from dataclasses, by tyro: ``--section.key value`` for every setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from almostgpt.config import Config
from almostgpt.config_file import coerce

# A whole configuration as options without a prefix, its booleans with a value like every other setting.
Settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]

T = TypeVar("T")
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}

_registry = ConstructorRegistry()


@_registry.primitive_rule
def _boolean(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """``--training.compile true``: settings take a value like every other, not a flag."""
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda words: _parse_boolean(words[0]),
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: ["true" if value else "false"],
    )


@_registry.primitive_rule
def _whole_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Reads ``1e4`` and ``10_000`` as the YAML loader does."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: coerce(words[0], int),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _parse_boolean(word: str) -> bool:
    if word.lower() not in _BOOLEANS:
        raise ValueError(f"expected true or false, found {word!r}")
    return _BOOLEANS[word.lower()]


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
