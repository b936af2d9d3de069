"""What generation starts from: token ids of one length or of several, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from almostgpt.errors import UserError

Prompts = Tensor | Sequence[Tensor | Sequence[int]]  # (B, T), or B texts of (T,) each


def as_texts(prompts: Prompts, vocab_size: int, device: torch.device) -> list[Tensor]:
    """B texts, each (T,) int64 on ``device`` with at least one token.

    Raises:
        UserError: no token to start from, or ids that are no integers or out of the vocabulary.
    """
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2:
            raise UserError(
                "generation starts from ids of the shape (batch, at least 1 token), or from a list of "
                f"texts, not {tuple(prompts.shape)}"
            )
        texts = list(prompts.unbind(0))
    else:
        texts = [_as_tensor(text) for text in prompts]
    for number, text in enumerate(texts):
        which = f"prompt {number}: " if len(texts) > 1 else ""
        if text.dim() != 1 or len(text) == 0:
            raise UserError(f"{which}generation starts from at least 1 token, and here is none")
        if text.dtype != torch.int64:
            raise UserError(f"{which}ids must be torch.int64, not {text.dtype}")
    if texts:
        together = torch.cat(texts)
        lowest, highest = (int(value) for value in torch.aminmax(together))
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"token id {wrong} is outside the vocabulary of {vocab_size} ids")
    return [text.to(device) for text in texts]


def _as_tensor(text: Tensor | Sequence[int]) -> Tensor:
    if isinstance(text, Tensor):
        return text
    try:
        tensor = torch.tensor(text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a prompt must be token ids, not {text!r}: {error}") from error
    return tensor.long() if tensor.numel() == 0 else tensor
