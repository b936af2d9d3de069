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

    echoes = True  # whether an answer is read as going on where its prompt ends

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
        if self.history:
            return self._go_on(self.history + self.tokenizer.encode(prompt))
        ids, shown = first_tokens(self.tokenizer, prompt, self.seed)
        return self._go_on(ids, self.tokenizer.decode(ids) if shown else "")

    def _go_on(self, history: list[int], shown: str = "") -> Iterator[str]:
        """The answer to all tokens so far, new ones included; ``shown`` is text that comes before it."""
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
        return self._answer(self._turn, steps, shown)

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


class Chat(Conversation):
    """The same in messages: each turn is written by the tokenizer's chat template.

    What the template writes for a turn mostly goes on where the turn before it ended, and then only the
    new part is fed. Where it does not (some take the thoughts out of earlier answers), and where an
    answer was cut off by a stop string, the conversation is fed anew.

    The arguments are those of :class:`Conversation`; an answer ends at one of ``stop_ids``, among which
    should be the tokenizer's.
    """

    echoes = False

    def __init__(self, model: GPT, tokenizer: Tokenizer, *args, **options):
        super().__init__(model, tokenizer, *args, **options)
        self._forget()

    def clear(self) -> None:
        super().clear()
        self._forget()

    def _forget(self) -> None:
        self.messages: list[dict[str, str]] = []  # of the turns that are over, and the last prompt
        self._written = ""  # what the template made of them
        self._read = 0  # tokens of the history that are of it; those after them are the last answer
        self._said = ""  # the text of that answer

    def say(self, prompt: str) -> Iterator[str]:
        turn = {"role": "user", "content": prompt}
        # After SentencePiece an answer begins with the space before its first word, which templates
        # write themselves.
        for said in dict.fromkeys((self._said, self._said.removeprefix(" "))):
            answered = [{"role": "assistant", "content": said}] if self.messages else []
            messages = [*self.messages, *answered, turn]
            written = self.tokenizer.render(messages)
            ids = self._extended(written)
            if ids is not None:
                break
        else:  # it is not what the cache holds
            ids = self.tokenizer.encode_rendered(written)
            if self._cache is not None:
                self._cache.reset()
        answer = self._go_on(ids)  # an error until here: nothing was said
        self.messages, self._written, self._read, self._said = messages, written, len(ids), ""
        return answer

    def _extended(self, written: str) -> list[int] | None:
        """The history and what ``written`` has beyond it; None where it does not begin with it.

        The answer stays the tokens that were drawn, though its text could be cut into others.
        """
        drawn = self.history[self._read :]
        end = drawn[-1] if drawn and drawn[-1] in self._stop_ids else None
        spoken = self.tokenizer.decode_bytes(drawn if end is None else drawn[:-1])
        so_far = self._written + spoken.decode("utf-8", errors="replace")
        if not self.history or not written.startswith(so_far):
            return None
        new = self.tokenizer.encode_rendered(written[len(so_far) :])
        if end is None:
            return self.history + new
        # The token that ended the answer is the first that the template writes after it.
        return self.history + new[1:] if new[:1] == [end] else None

    def _answer(self, turn: int, steps: Iterator[Drawn], first: str) -> Iterator[str]:
        for text in super()._answer(turn, steps, first):
            if turn == self._turn:
                self._said += text
            yield text
