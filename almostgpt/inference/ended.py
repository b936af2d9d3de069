"""Which sequences have drawn a stop id, known to the host without waiting for a GPU."""

from __future__ import annotations

import torch

from almostgpt.inference.decoder import Drawn


class Ended:
    """Watches what B sequences draw for stop ids; without any, nothing ever ends."""

    def __init__(self, stop_ids: tuple[int, ...], B: int, device: torch.device):
        self._stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        self._ended = torch.zeros(B, dtype=torch.bool, device=device)
        on_gpu = device.type == "cuda"
        self._copy = torch.zeros((), dtype=torch.bool, pin_memory=on_gpu) if on_gpu else None
        self._copied: torch.cuda.Event | None = None

    def masked(self, drawn: Drawn) -> Drawn:
        """What was drawn, with −1 for sequences that had ended before."""
        if not len(self._stop_ids):
            return drawn
        ids = drawn.ids.masked_fill(self._ended, -1)
        # Compared one by one: torch.isin sorts where there are many, and waits for the GPU then.
        self._ended = self._ended | (ids[:, None] == self._stop_ids).any(1)
        return Drawn(ids, drawn.logprobs)

    def all(self) -> bool:
        """Whether every sequence has ended. On a GPU it may say so some steps late: nothing waits."""
        if not len(self._stop_ids):
            return False
        if self._copy is None:
            return bool(self._ended.all())
        if self._copied is not None and not self._copied.query():
            return False  # the last look is still under way
        known = self._copied is not None and bool(self._copy)
        self._copy.copy_(self._ended.all(), non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        return known
