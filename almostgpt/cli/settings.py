"""The settings that a command line means: a preset or file, what a run begins with, and what is said.

Every command that takes the settings of a training run puts them together here, in two steps around
its own parsing::

    begin = Beginning.of(arguments)                        # before: where the defaults come from
    given = parse(..., default=...(settings=begin.defaults))
    config = begin.complete(given.settings)                # after: checked, and everything filled in
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from almostgpt.config import Config, overlay, resolve
from almostgpt.config_file import read_settings
from almostgpt.errors import UserError
from almostgpt.files import expand
from almostgpt.model.gpt import PARTS
from almostgpt.training.initial import (
    Initial,
    begin_with,
    defaults_from,
    read_initial,
    settings_beside,
)

DEFAULT_PRESET = "quickstart"


@dataclass(frozen=True)
class Beginning:
    """Where the settings come from that the command line does not say."""

    preset: str  # a built-in preset, or a YAML file
    defaults: Config
    initial: Initial | None  # the weights that a new run begins with

    @classmethod
    def of(cls, arguments: list[str]) -> Beginning:
        """Reads the files that ``--config`` and ``--init`` name. Raises ``UserError`` for wrong ones."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--config", default=DEFAULT_PRESET)
        early.add_argument("--init")
        preset, init = vars(early.parse_known_args(arguments)[0]).values()
        settings = read_settings(preset)
        init = settings.get("init") if init is None else init
        if init is None or init.lower() in ("null", "none"):  # as every option reads them
            return cls(preset, overlay(Config(), settings), None)
        initial = read_initial(init)
        settings = settings_beside(settings, read_settings(preset, presets=False))
        return cls(preset, overlay(defaults_from(initial, Config()), settings), initial)

    def complete(self, config: Config) -> Config:
        """The settings as the command line has left them, resolved; raises ``UserError`` for wrong ones."""
        config = absolute_paths(config)
        return checked(config if self.initial is None else begin_with(self.initial, config))


def checked(config: Config) -> Config:
    """Resolved, with parts that exist."""
    return resolve(config, PARTS)


def absolute_paths(config: Config) -> Config:
    """So that the run can be continued from another folder."""
    data = config.data
    if data.path is not None and not data.path.startswith("hf://"):
        data = dataclasses.replace(data, path=str(expand(data.path).absolute()))
    if data.mixture is not None:
        paths = {str(expand(path).absolute()): weight for path, weight in data.mixture.items()}
        if len(paths) < len(data.mixture):
            raise UserError("data.mixture names a path twice; give it one weight, the sum of both")
        data = dataclasses.replace(data, mixture=paths)
    if Path(data.tokenizer).is_dir():
        data = dataclasses.replace(data, tokenizer=str(Path(data.tokenizer).absolute()))
    init = config.init and str(expand(config.init).absolute())
    return dataclasses.replace(config, data=data, init=init)
