"""``almostgpt <command>``, and what every command shares: how errors and Ctrl-C end."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from almostgpt import __version__
from almostgpt.config import not_one_of
from almostgpt.errors import UserError

COMMANDS = {
    "train": "train a model, or continue a run",
    "generate": "text from a trained model",
    "quantize": "a trained model in 8 bits, for generation",
    "convert": "models of Hugging Face, in and out",
    "eval": "perplexity of a trained model on a text",
    "ablate": "which part is better: the same run with each, over seeds",
    "prepare": "turn text into token shards",
    "tokenizer": "train a vocabulary, encode with it, and measure it",
    "info": "versions, devices, and which kernels would run here",
}

HELP = """usage: almostgpt COMMAND [options]      (almostgpt COMMAND --help shows the options)

{commands}

examples:
  almostgpt train                                     train the quickstart model on built-in text
  almostgpt train --data.path book.txt --training.steps 2000
  almostgpt train --out runs/quickstart --resume      go on where a run stopped
  almostgpt generate --checkpoint runs/quickstart --prompt "def "
  almostgpt eval --checkpoint runs/quickstart --perplexity book.txt

--debug shows the traceback of an error."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 2 a mistake that the message explains."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)))
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UserError(f"the command is {not_one_of(command, COMMANDS)}")
        return import_module(f"almostgpt.cli.{command}").run(rest)
    except BrokenPipeError:  # the reader of our output (head, less) is done: so are we
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        if debug:
            raise
        sys.stdout.flush()
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if debug or not (isinstance(error, MemoryError) or "allocate memory" in str(error)):
            raise
        print("error: out of memory: take a smaller model or batch size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train_main() -> int:
    """``almostgpt-train``: the same as ``almostgpt train``."""
    return main(["train", *sys.argv[1:]])


def _message(error: Exception) -> str:
    """An operating system's error (a full disk, a missing permission) as ``file: reason``."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
