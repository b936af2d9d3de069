"""What a model type of transformers is: a Family says how it maps to our settings and parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from almostgpt.config import GPTConfig
from almostgpt.errors import UserError


class Source(NamedTuple):
    """Where a parameter of ours lies in the files of a family.

    Attributes:
        names: of the tensors of which it is made, laid one below the other.
        rows: how many each of them gives.
        transposed: they are stored as (in_features, out_features), the other way round.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool = False


class Family(ABC):
    """One value of ``model_type`` in a ``config.json``."""

    name: ClassVar[str]  # model_type
    architecture: ClassVar[str]  # the class of transformers that has a language model's head
    prefix: ClassVar[str]  # of tensors of the model without that head; files of it alone lack it
    left_out: ClassVar[str]  # pattern of tensors that are no parameters, in files of old versions

    @abstractmethod
    def settings(self, given: Given) -> dict[str, Any]:
        """GPTConfig fields of a ``config.json``; what our model cannot be goes to ``given.problems``."""

    @abstractmethod
    def misfits(self, model: GPTConfig) -> list[str]:
        """What of a model this family cannot be, each as ``model.key is …, not …``."""

    @abstractmethod
    def completed(self, model: GPTConfig) -> GPTConfig:
        """The model with all the biases that the family has; those it lacks are written as zeros."""

    @abstractmethod
    def config(self, model: GPTConfig) -> dict[str, Any]:
        """The ``config.json`` of a completed model, without what every family has in it."""

    @abstractmethod
    def sources(self, model: GPTConfig) -> Iterator[tuple[str, Source]]:
        """Every parameter of a completed model, and where it lies."""


class Given:
    """The values of a ``config.json``, read with their types checked; mistakes are collected.

    Attributes:
        problems: what is missing, wrong or cannot be, each as ``key is …``.
    """

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.problems: list[str] = []

    def whole(self, key: str, default: int | None = None, *, needed: bool = False) -> int | None:
        """A whole number above 0."""
        value = self.values.get(key)
        if value is None:
            if needed:
                self.problems.append(f"{key} is missing")
            return 1 if needed else default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{key} is {value!r}, not a whole number above 0")
            return 1
        return value

    def number(self, key: str, default: float, values: dict[str, Any] | None = None) -> float:
        """A finite number above 0, of ``values`` or of the whole."""
        value = (self.values if values is None else values).get(key)
        value = default if value is None else value
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right or not 0 < value < math.inf:
            self.problems.append(f"{key} is {value!r}, not a number above 0")
            return 1.0
        return float(value)

    def switch(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.problems.append(f"{key} is {value!r}, neither true nor false")
            return default
        return value

    def choice(self, key: str, default: str, known: dict[str, str]) -> str:
        """Ours of ``known``, which has theirs as keys."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in known:
            self.problems.append(f"{key} is {value!r}; there are {', '.join(known)}")
            return next(iter(known.values()))
        return known[value]

    def refuse(self, key: str, wrong: bool, why: str) -> None:
        """A problem, where ``wrong``."""
        if wrong:
            self.problems.append(f"{key} is {self.values.get(key)!r}: {why}")


def differences(model: GPTConfig, wanted: dict[str, Sequence[Any]]) -> list[str]:
    """Settings that are none of the values they would have to be, as ``model.key is …, not …``."""
    return [
        f"model.{key} is {_shown(getattr(model, key))}, not {' or '.join(map(_shown, values))}"
        for key, values in wanted.items()
        if getattr(model, key) not in values
    ]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def refused(what: str, problems: Sequence[str]) -> UserError:
    return UserError(f"{what}:\n" + "\n".join(f"  {problem}" for problem in problems))
