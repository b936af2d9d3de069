"""Generation for people: prompts in, text out as it becomes certain, and where it stops."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from almostgpt.data.tokenizer import Tokenizer
from almostgpt.errors import UserError
from almostgpt.inference.generate import stream
from almostgpt.inference.sampling import check_sequences, seed_or_new

if TYPE_CHECKING:
    from almostgpt.model import GPT


class Assembler:
    """Text of one sequence, token by token.

    A character whose bytes span tokens comes out whole. What may be the beginning of a stop string
    is held back until it is known not to be one; a stop string itself never comes out, nor what
    follows it. Of several stop strings the one that is complete first counts, and of those that end
    there the longest: so it does not matter how the text is cut into tokens.

    Attributes:
        stopped_by: the stop string that was found, or None.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, id: int) -> str:
        """One more token; returns the text that is certain now."""
        return self.push_text(self._decoder.decode(self._tokenizer.decode_bytes([id])))

    def end(self) -> str:
        """No more tokens: the rest of the text, U+FFFD for a character that was not finished."""
        text = self.push_text(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text if self.stopped_by is not None else text + rest

    def push_text(self, text: str) -> str:
        """The same for text that is no token of this sequence."""
        if self.stopped_by is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, self.stopped_by = min(found, key=lambda place: (place[0], -len(place[1])))
            self._held = ""
            return text[: end - len(self.stopped_by)]
        certain = len(text) - self._may_begin_a_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def _may_begin_a_stop(self, text: str) -> int:
        """The length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


@dataclass
class Completion:
    """What followed one prompt.

    Attributes:
        prompt: as it was given.
        text: what follows it, without the stop string; where an empty prompt began with a random
            token, that first, which is none of the new ones.
        ids: the new tokens, those of the stop string or the stop id included.
        logprobs: of each of them, natural logarithms; None unless asked for.
        finish: ``"stop"`` (a stop string or id), ``"length"`` (max_new_tokens), or None: not yet.
        stopped_by: the stop string or id.
    """

    prompt: str
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    finish: str | None = None
    stopped_by: str | int | None = None


class TextStream:
    """Continues prompts; iterating yields ``(number of the prompt, new text)`` as it becomes certain.

    ::

        texts = TextStream(model, tokenizer, ["def ", "class "], 100, stop=["\\n\\n"], top_p=0.9)
        for number, text in texts:
            print(number, text)
        print(texts.completions[0].finish)

    Args:
        model, tokenizer: as ``almostgpt.load`` gives them.
        prompts: texts of any lengths. An empty one begins with the end of another text, where the
            tokenizer has a token for that; otherwise with a random token, which is shown.
        max_new_tokens: of each.
        stop: a text ends before the first of these strings, wherever tokens begin and end.
        stop_ids: a text ends with the first of these tokens, which is not shown.
        **options: of :func:`almostgpt.inference.generate.stream`.

    Raises:
        UserError: at once, as ``stream`` does; text that the tokenizer cannot express; an empty stop.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        seed: int | None = None,
        sequences: Sequence[int] | None = None,
        logprobs: bool = False,
        **options,
    ):
        check_stop(stop)
        check_texts(prompts)
        seed = seed_or_new(seed)
        sequences = check_sequences(sequences, len(prompts))
        self.completions = [Completion(prompt) for prompt in prompts]
        self._assemblers = [Assembler(tokenizer, stop) for _ in prompts]
        self._first_texts = [""] * len(prompts)
        texts = []
        for number, prompt in enumerate(prompts):
            ids, shown = first_tokens(tokenizer, prompt, seed, sequences[number])
            texts.append(torch.tensor(ids))
            if shown:
                self._first_texts[number] = tokenizer.decode(ids)
        if logprobs:
            for completion in self.completions:
                completion.logprobs = []
        self._stop_ids = frozenset(stop_ids)
        self._steps = stream(
            model,
            texts,
            max_new_tokens,
            stop_ids=stop_ids,
            seed=seed,
            sequences=sequences,
            logprobs=logprobs,
            **{"vocab_size": tokenizer.vocab_size, **options},
        )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, text in enumerate(self._first_texts):
            text = self._stopping(number, self._assemblers[number].push_text(text))
            yield from self._show(number, text)
        while not all(completion.finish for completion in self.completions):
            drawn = next(self._steps, None)
            if drawn is None:
                break
            ids = drawn.ids.tolist()  # here the host waits for the device, and nowhere else
            logprobs = None if drawn.logprobs is None else drawn.logprobs.tolist()
            for number, id in enumerate(ids):
                if self.completions[number].finish is None:
                    score = None if logprobs is None else logprobs[number]
                    yield from self._show(number, self._take(number, id, score))
        for number, completion in enumerate(self.completions):
            if completion.finish is None:
                completion.finish = "length"
                yield from self._show(number, self._assemblers[number].end())

    def run(self) -> list[Completion]:
        """All of it, when it is complete."""
        for _ in self:
            pass
        return self.completions

    def _take(self, number: int, id: int, logprob: float | None) -> str:
        """One more token of a text; returns what is certain."""
        completion, assembler = self.completions[number], self._assemblers[number]
        completion.ids.append(id)
        if logprob is not None:
            completion.logprobs.append(logprob)
        if id in self._stop_ids:
            completion.finish, completion.stopped_by = "stop", id
            return assembler.end()
        return self._stopping(number, assembler.push(id))

    def _stopping(self, number: int, text: str) -> str:
        """Notes where the text ends with it, since a stop string came after it."""
        if (stopped_by := self._assemblers[number].stopped_by) is not None:
            self.completions[number].finish = "stop"
            self.completions[number].stopped_by = stopped_by
        return text

    def _show(self, number: int, text: str) -> Iterator[tuple[int, str]]:
        if text:
            self.completions[number].text += text
            yield number, text


def first_tokens(
    tokenizer: Tokenizer, prompt: str, seed: int, sequence: int = 0
) -> tuple[list[int], bool]:
    """The tokens that a text begins with, and whether the last of them is to be shown as new text."""
    if ids := tokenizer.encode_from_start(prompt):
        return ids, False
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text], False
    # Times an odd number of 64 bits: sequence 1 of a seed is not sequence 0 of the next seed.
    generator = torch.Generator().manual_seed((seed + sequence * 0x9E3779B97F4A7C15) % 2**64)
    return torch.randint(tokenizer.vocab_size, (1,), generator=generator).tolist(), True


def check_stop(stop: Sequence[str]) -> None:
    """Raises ``UserError`` for what is no list of strings to stop at."""
    check_texts(stop, "stop")
    if not all(stop):
        raise UserError("a stop string has at least one character")


def check_texts(texts: Sequence[str], name: str = "prompts") -> None:
    """Raises ``UserError`` for what is no list of strings."""
    if isinstance(texts, str):
        raise UserError(f"{name} is a list of strings: give [{texts!r}]")
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} must be a list of strings, not {texts!r}")
