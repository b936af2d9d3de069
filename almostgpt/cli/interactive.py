"""``almostgpt generate --interactive``: a conversation at the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from almostgpt.errors import UserError
from almostgpt.inference.chat import Conversation
from almostgpt.inference.sampling import seed_or_new

COMMANDS = (
    "a prompt a line; `clear` forgets what was said, `seed 7` and `temp 0.5` set what they name, "
    "Ctrl-C stops an answer, `quit` ends"
)


def converse(conversation: Conversation, first: str, write: Callable[[str], None]) -> None:
    """Reads a line, answers, and keeps both as the context of the next one.

    Args:
        first: a prompt to begin with; empty: none.
        write: takes text as it is made.
    """
    print(COMMANDS, file=sys.stderr)
    with _line_editing():
        for prompt in _lines(first):
            command = prompt.strip()
            if command == "quit":
                return
            if command == "clear":
                conversation.clear()
            elif not _set(conversation, command.split()):
                _answer(conversation, prompt, write)


def _lines(first: str) -> Iterator[str]:
    """Lines from the terminal, until it has no more. Ctrl-C drops the line that is being written."""
    if first:
        yield first
    terminal = _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    while sys.stdin is not None:  # it is where it was closed
        try:
            if terminal:
                yield input("> ")  # known to readline, which redraws it
            else:
                print("> ", end="", file=sys.stderr, flush=True)
                yield input()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(`quit` ends)", file=sys.stderr)


def _set(conversation: Conversation, words: list[str]) -> bool:
    """Whether the words were a command that sets something; anything else is a prompt."""
    if len(words) != 2 or words[0] not in ("seed", "temp"):
        return False
    try:
        value = int(words[1]) if words[0] == "seed" else float(words[1])
    except ValueError:
        return False  # a prompt that begins with the word
    try:
        if words[0] == "seed":
            conversation.seed = seed_or_new(value)
        else:
            conversation.sampling = replace(conversation.sampling, temperature=value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    return True


def _answer(conversation: Conversation, prompt: str, write: Callable[[str], None]) -> None:
    said_before = bool(conversation.history)
    started = time.perf_counter()
    stopped = ""
    try:
        answer = conversation.say(prompt)
        if conversation.echoes:
            write(prompt)
        for text in answer:
            write(text)
    except UserError as error:  # a character the model has never seen, or no room
        hint = "; `clear` starts anew" if said_before else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        stopped = "stopped, "
    seconds = time.perf_counter() - started
    tokens = conversation.answer
    write("\n")
    rate = f", {tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else ""
    print(f"[{stopped}{tokens} tokens{rate}, seed {conversation.seed}]", file=sys.stderr)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history that outlives the program, where there is readline and a terminal."""
    if not _is_terminal(sys.stdin):
        yield
        return
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "almostgpt" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a read-only home: a history for this time only
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
