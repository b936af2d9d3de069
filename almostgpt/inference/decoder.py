"""One step of decoding: feed what was drawn last, draw what follows; on a GPU as one CUDA graph.

Everything that changes from step to step (the last tokens, the positions, the lengths of the cache,
what was seen) lies in tensors that stay where they are, and nothing of a step asks the device for a
value. So a step can be captured once and replayed: a launch for the CPU, whatever the model's depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.sampling import Sampling
from almostgpt.model.evaluating import evaluating

if TYPE_CHECKING:
    from almostgpt.model import GPT

Step = Callable[[], None]


class Drawn(NamedTuple):
    """The next token of every sequence.

    Attributes:
        ids: (B,) int64; −1 for a sequence that has ended.
        logprobs: (B,) float32, the log-probability that the model itself gives each token, before
            penalty, temperature and filters; None unless asked for.
    """

    ids: Tensor
    logprobs: Tensor | None


class Decoder:
    """Draws tokens for B sequences, step after step.

    Args:
        model: in whatever mode; it is evaluated.
        cache: keys and values of B sequences; None: every step computes the last ``block_size``
            tokens anew.
        sampling: how tokens are drawn.
        seed: of all draws.
        sequences: B numbers. A draw depends on the seed, the number of its sequence, its position
            and its logits: not on what else is in the batch.
        logprobs: whether they are computed.
        vocab_size: draw ids below this alone, where the model has more than its tokenizer.
        capture: takes a step and returns what repeats it; None: every step is called anew.
    """

    def __init__(
        self,
        model: GPT,
        cache: KVCache | None,
        sampling: Sampling,
        *,
        seed: int,
        sequences: Sequence[int],
        logprobs: bool = False,
        vocab_size: int | None = None,
        capture: Callable[[Step], Step] | None = None,
    ):
        self.model, self.cache = model, cache
        self.sampling, self.logprobs = sampling, logprobs
        self.vocab_size = vocab_size or model.config.vocab_size
        self._capture = capture if cache is not None else None
        self._replay: Step | None = None
        B, device = len(sequences), model.device
        self.ids = torch.zeros(B, dtype=torch.int64, device=device)
        self.positions = torch.zeros(B, dtype=torch.int64, device=device)
        self.sequences = torch.tensor(sequences, dtype=torch.int64, device=device)
        as_int64 = seed - 2**64 if seed >= 2**63 else seed
        self.seeds = torch.full((B,), as_int64, dtype=torch.int64, device=device)
        self.drawn_logprobs = torch.zeros(B, device=device) if logprobs else None
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(B, self.vocab_size, dtype=torch.bool, device=device)
        self._texts: list[Tensor] = []  # without a cache: of each sequence the last tokens
        self._steps = 0

    def begin(self, texts: Sequence[Tensor], cached: int = 0) -> Drawn:
        """Feeds the texts and draws the first new token of each.

        Args:
            texts: B of them, each (T,) int64 on the model's device with T ≥ 1.
            cached: how many tokens of each the cache holds: these are not fed again.
        """
        self._note(texts)
        with evaluating(self.model):
            if self.cache is None:
                self._texts = [text[-self.model.config.block_size :] for text in texts]
                self._draw(self._feed(self._texts))
            else:
                self._draw(self._feed([text[cached:] for text in texts]))
        return self._drawn()

    def step(self) -> Drawn:
        """Feeds the tokens drawn last and draws the ones that follow them."""
        with evaluating(self.model):
            if self.cache is None:
                size = self.model.config.block_size
                self._texts = [
                    torch.cat([text, new])[-size:]
                    for text, new in zip(self._texts, self.ids.split(1), strict=True)
                ]
                self._draw(self._feed(self._texts))
            elif self._capture is None or self._steps == 0:
                # A first time as it is: libraries start up, and take memory.
                self._step()
            else:
                self._repeat()
        self._steps += 1
        return self._drawn()

    def _repeat(self) -> None:
        try:
            if self._replay is None:
                # Python runs, and counts on the host; the device does nothing yet.
                self._replay = self._capture(self._step)
            else:
                self.cache.repeat(1)
            self._replay()
        except UserError:  # no room: nothing has changed
            raise
        except BaseException:
            self.cache.spoil()  # whether the device has counted is not known
            raise

    # ------------------------------------------------------------ what a step consists of

    def _step(self) -> None:
        logits, _ = self.model(self.ids[:, None], cache=self.cache)
        self._draw(logits[:, -1])

    def _draw(self, logits: Tensor) -> None:
        ids, logprobs = kernels.sample(
            logits[:, : self.vocab_size],
            self.positions,
            self.seeds,
            self.sequences,
            seen=self.seen,
            logprobs=self.logprobs,
            **vars(self.sampling),
        )
        self.ids.copy_(ids)
        if logprobs is not None:
            self.drawn_logprobs.copy_(logprobs)
        self.positions.add_(1)

    def _feed(self, texts: list[Tensor]) -> Tensor:
        """The logits after texts, which follow what the cache holds if there is one: (B, vocab_size)."""
        ids, lengths = padded(texts)
        ragged = None if min(lengths) == max(lengths) else lengths
        logits, _ = self.model(ids, cache=self.cache, new_lengths=ragged)
        return logits[:, -1]

    # ------------------------------------------------------------ around it

    def _note(self, texts: Sequence[Tensor]) -> None:
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        with torch.inference_mode():
            self.positions.copy_(lengths)
            if self.seen is not None:
                for row, text in zip(self.seen, texts, strict=True):
                    row.zero_()
                    row[text[text < self.vocab_size]] = True

    def _drawn(self) -> Drawn:
        """Copies, made out of inference mode: ordinary tensors, which the next step leaves alone."""
        logprobs = None if self.drawn_logprobs is None else self.drawn_logprobs.clone()
        return Drawn(self.ids.clone(), logprobs)


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Texts (T,) side by side, padded on the right: (B, longest T) int64, and their lengths."""
    lengths = [len(text) for text in texts]
    if min(lengths) == max(lengths):
        return torch.stack(list(texts)), lengths
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True), lengths


def feed(model: GPT, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """The logits after ids: (B, T) → (B, vocab_size); the tokens are appended to the cache."""
    with evaluating(model):
        logits = model(ids, cache=cache)[0][:, -1]
    return logits.clone()


def cuda_graph(device: torch.device, step: Step) -> Step:
    """Records what a step launches on a GPU, without running it; the result runs all of it at once.

    Its memory is the graph's own and stays with it. Other threads may use the GPU meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    recording = torch.cuda.graph(
        graph, stream=_side_stream(device), capture_error_mode="thread_local"
    )
    with torch.cuda.device(device), recording:
        step()
    return graph.replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """What graphs of a GPU are recorded on: one for all of them, since cuBLAS keeps memory for each.

    torch's own default is one for the process, on whichever GPU was the current one first.
    """
    return torch.cuda.Stream(device)
