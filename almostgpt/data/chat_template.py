"""Chat templates: how a conversation is written as one text, the way the model was taught it.

A template is a Jinja program that comes with a tokenizer. It is foreign code, so it runs in Jinja's
sandbox, which lets it neither change what it is given nor reach into Python; what it may call is
what transformers offers it (``transformers/utils/chat_template_utils.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from almostgpt.errors import UserError

Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system", "content": text}


class ChatTemplate:
    """A compiled template.

    Args:
        source: the Jinja program.
        names: what it may also refer to: ``bos_token``, ``eos_token`` and the like, as texts.

    Raises:
        UserError: no Jinja program, or jinja2 is not installed.
    """

    def __init__(self, source: str, names: Mapping[str, str]):
        try:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UserError("a chat template needs jinja2: pip install jinja2") from error
        self.source, self._names = source, dict(names)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_generation(), loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # beside TemplateError those of Python, which Jinja compiles to
            raise UserError(f"the chat template is damaged: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by default up to where the model's turn begins.

        Raises:
            UserError: the template refuses the messages, or fails.
        """
        values = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(
                **self._names, **values, messages=[dict(message) for message in messages]
            )
        except Exception as error:  # a program of others: it can fail in any way
            raise UserError(
                f"the chat template cannot write this conversation: {error or type(error).__name__}"
            ) from error


def _generation() -> type:
    """The ``{% generation %}`` block around what the assistant says: here its content alone.

    transformers notes which tokens are in it, for training.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
