"""Configuration files: strict YAML in, YAML out.

A file names only what differs from the defaults, or from the file that its ``base:`` names (a built-in
preset or a path). Values are coerced by the annotated type of the field (so ``1e-3`` is a float, which
plain YAML reads as a text); whatever does not fit is reported with its file, its key and the nearest
known name, all problems in one message.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from almostgpt.config import FORMER_SWITCHES, Config, overlay
from almostgpt.errors import UserError

PRESETS = Path(__file__).parent / "configs"


def load_config(name_or_file: str | Path) -> Config:
    """The defaults, overlaid with a preset (by name) or a YAML file and the files it is based on."""
    return overlay(Config(), read_settings(name_or_file))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that :func:`load_config` reads back to an equal one."""
    tree = dataclasses.asdict(config)
    tree["optimizer"]["betas"] = list(tree["optimizer"]["betas"])
    return yaml.safe_dump(tree, sort_keys=False)


def find_config(name_or_file: str | Path, relative_to: Path | None = None) -> Path:
    """The YAML file that a preset's name or a path means."""
    given = Path(name_or_file)
    candidates = [given, *([relative_to / given] if relative_to else [])]
    for candidate in candidates:
        if candidate.suffix in {".yaml", ".yml"} and candidate.is_file():
            return candidate
    preset = PRESETS / f"{given}.yaml"
    if len(given.parts) == 1 and preset.is_file():
        return preset
    raise UserError(
        f"no configuration named {str(name_or_file)!r}: neither a .yaml file nor a preset. Presets: "
        + ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        + _near_hint(str(name_or_file), [p.stem for p in PRESETS.glob("*.yaml")])
    )


def read_settings(name_or_file: str | Path, *, presets: bool = True) -> dict[str, Any]:
    """The settings that a file and its chain of bases give, as ``{"model.n_layer": 4}``, coerced.

    Args:
        presets: whether those of built-in presets among them count, or the user's own files alone.
    """
    problems: list[str] = []
    settings: dict[str, Any] = {}
    for file, tree in reversed(list(_base_chain(name_or_file))):
        if presets or file.resolve().parent != PRESETS.resolve():
            settings |= _read_tree(tree, file, problems)
    if problems:
        raise UserError("\n".join(problems))
    return settings


def _base_chain(name_or_file: str | Path) -> Iterator[tuple[Path, dict]]:
    """Yields the file, then its base, then the base's base."""
    seen: list[Path] = []
    file: Path | None = find_config(name_or_file)
    while file is not None:
        if file.resolve() in seen:
            raise UserError(f"{file}: base: the files are based on each other in a circle")
        seen.append(file.resolve())
        try:
            tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{file}: not readable as YAML: {error}") from error
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise UserError(
                f"{file}: expected 'section: {{key: value}}', found {type(tree).__name__}"
            )
        base = tree.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise UserError(
                f"{file}: base: expected the name of a preset or a file, found {base!r}"
            )
        yield file, tree
        file = None if base is None else find_config(base, relative_to=file.parent)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a setting given twice is a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read_tree(tree: dict, file: Path, problems: list[str]) -> dict[str, Any]:
    """One file's settings, coerced; what does not fit is added to ``problems``."""
    settings: dict[str, Any] = {}
    top = typing.get_type_hints(Config)
    for key, value in tree.items():
        if key not in top:
            known = [*top, *(f"{s}.{n}" for s in top for n in _section_hints(top[s]))]
            problems.append(f"{file}: {key}: unknown key{_near_hint(str(key), known)}")
        elif not dataclasses.is_dataclass(top[key]):
            _coerce_into(settings, key, value, top[key], file, problems)
        elif not isinstance(value, dict):
            problems.append(f"{file}: {key}: a section, so it needs 'key: value' lines below it")
        else:
            hints = _section_hints(top[key])
            for name, leaf in value.items():
                if name in hints:
                    _coerce_into(settings, f"{key}.{name}", leaf, hints[name], file, problems)
                else:
                    hint = _near_hint(str(name), hints)
                    problems.append(f"{file}: {key}.{name}: unknown key{hint}")
    return settings


def _section_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def _near_hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if not near:  # a key written without its section, or with another one
        near = [k for k in known if k.rpartition(".")[2] == name][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _coerce_into(
    out: dict, key: str, value: Any, kind: Any, file: Path, problems: list[str]
) -> None:
    if key in FORMER_SWITCHES and isinstance(value, bool):
        value = FORMER_SWITCHES[key][value]
    try:
        out[key] = coerce(value, kind)
    except ValueError as error:
        problems.append(f"{file}: {key}: {error}")


def coerce(value: Any, kind: Any) -> Any:
    """``value`` as the annotated type ``kind``; ``ValueError`` says what was expected.

    >>> coerce("1e-3", float)
    0.001
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return coerce(value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise ValueError(f"expected a list of {len(args)} values, found {value!r}")
        return tuple(coerce(v, a) for v, a in zip(value, args, strict=True))
    if origin is dict:
        if isinstance(value, str):
            value = _pairs(value)
        if not isinstance(value, dict):
            raise ValueError(f"expected 'name: value' pairs or name=value,…, found {value!r}")
        return {coerce(k, args[0]): coerce(v, args[1]) for k, v in value.items()}
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if kind is float and math.isfinite(number):
            return float(number)
        if kind is int and math.isfinite(number) and number == int(number):
            return int(number)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise ValueError(f"expected {names[kind]}, found {value!r}")


def _pairs(text: str) -> dict[str, str]:
    """``a=1,b=2`` as a command line has it; a name may hold ``=`` but no comma."""
    pairs = {}
    for pair in text.split(","):
        name, equals, value = pair.strip().rpartition("=")
        if not equals or not name:
            raise ValueError(f"expected name=value,name=value, found {text!r}")
        if name in pairs:
            raise ValueError(f"{name!r} is given twice in {text!r}")
        pairs[name] = value
    return pairs


def _number(value: Any) -> int | float:
    """As exact as it is written: a whole number beyond 2⁵³ keeps its digits. NaN for no number."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return math.nan
