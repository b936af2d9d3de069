"""A text that a person and a model write in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from almostgpt.data.tokenizer import Tokenizer
from almostgpt.inference.cache import KVCache
from almostgpt.inference.decoder import Drawn
from almostgpt.inference.generate import stream
from almostgpt.inference.sampling import Sampling, seed_or_new
from almostgpt.inference.text import Assembler, check_stop, first_tokens

if TYPE_CHECKING:
    from almostgpt.model import GPT


class Conversation:
    """Each prompt continues all that was said so far, and the answer continues the prompt.

    The cache stays from turn to turn, so that each feeds only what is new.

    Args:
        model, tokenizer: as ``almostgpt.load`` gives them.
        max_new_tokens: of an answer.
        sampling: how tokens are drawn; it may be replaced between turns.
        seed: None draws one, and another after every ``clear`` until one is set.
        stop, stop_ids: as of :class:`almostgpt.inference.text.TextStream`.
        cache, window, sink_tokens: as of :func:`almostgpt.inference.generate.stream`, but no ``KVCache``.

    Attributes:
        history: the tokens so far.
        answer: how many of them the last answer has.
        seed: of the draws; it may be set between turns.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        cache: str = "auto",
        window: int | None = None,
        sink_tokens: int | None = None,
    ):
        check_stop(stop)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self._max_new_tokens = max_new_tokens
        self._stop, self._stop_ids = tuple(stop), tuple(stop_ids)
        self._seed, self._keeps_seed = seed_or_new(seed), seed is not None
        self._turn = 0
        self.history: list[int] = []
        self.answer = 0
        self._cache = KVCache.for_model(model, 1, cache, None, window, sink_tokens)

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed, self._keeps_seed = seed_or_new(seed), True

    def clear(self) -> None:
        """Forgets all that was said."""
        self._turn += 1
        self.history = []
        if not self._keeps_seed:
            self._seed = seed_or_new(None)
        if self._cache is not None:
            self._cache.reset()

    def say(self, prompt: str) -> Iterator[str]:
        """Continues the text by the prompt and yields the answer as it becomes certain.

        An answer that nobody reads to its end stays in the history up to there; with the next turn,
        or ``clear``, it is over.

        Raises:
            UserError: at once, and nothing was said: text that the tokenizer cannot express, or no
                room for prompt and answer.
        """
        new = self.tokenizer.encode(prompt)
        shown = False
        if not new and not self.history:
            new, shown = first_tokens(self.tokenizer, prompt, self.seed)
        history = self.history + new
        steps = stream(
            self.model,
            [history],
            self._max_new_tokens,
            seed=self.seed,
            stop_ids=self._stop_ids,
            cache="none" if self._cache is None else self._cache,
            vocab_size=self.tokenizer.vocab_size,
            **vars(self.sampling),
        )
        self.history, self.answer = history, 0
        self._turn += 1
        return self._answer(self._turn, steps, self.tokenizer.decode(new) if shown else "")

    def _answer(self, turn: int, steps: Iterator[Drawn], first: str) -> Iterator[str]:
        assembler = Assembler(self.tokenizer, self._stop)
        if text := assembler.push_text(first):
            yield text
        try:
            while turn == self._turn and assembler.stopped_by is None:
                drawn = next(steps, None)
                if drawn is None:
                    break
                id = int(drawn.ids)
                self.history.append(id)
                self.answer += 1
                if id in self._stop_ids:
                    break
                if text := assembler.push(id):
                    yield text
        except (Exception, KeyboardInterrupt):
            # In the middle of a forward pass: the cache may be half written. Not where nobody reads on.
            if self._cache is not None:
                self._cache.reset()  # the next turn feeds the history anew
            raise
        if text := assembler.end():
            yield text
