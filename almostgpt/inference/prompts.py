"""What generation starts from: token ids of one length or of several, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from almostgpt.errors import UserError

if TYPE_CHECKING:
    from almostgpt.model import GPT

Prompts = Tensor | Sequence[Tensor | Sequence[int]]  # (B, T), or B texts of (T,) each


def as_texts(prompts: Prompts, model: GPT) -> list[Tensor]:
    """B texts, each (T,) int64 on the model's device with at least one token.

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
        try:
            given = list(prompts)
        except TypeError:
            raise UserError(f"prompts must be a list of texts, not {prompts!r}") from None
        if given and all(isinstance(id, int) for id in given):
            raise UserError(f"prompts must be a list of texts: give [{given!r}] for one")
        texts = [_as_tensor(text) for text in given]
    for number, text in enumerate(texts):
        which = f"prompt {number}: " if len(texts) > 1 else ""
        if text.dim() != 1 or len(text) == 0:
            raise UserError(f"{which}generation starts from at least 1 token, and here is none")
        if text.dtype != torch.int64:
            raise UserError(f"{which}ids must be torch.int64, not {text.dtype}")
    if texts:
        together = torch.cat(texts)
        lowest, highest = (int(value) for value in torch.aminmax(together))
        vocab_size = model.config.vocab_size
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"token id {wrong} is outside the vocabulary of {vocab_size} ids")
    return [text.to(model.device) for text in texts]


def _as_tensor(text: Tensor | Sequence[int]) -> Tensor:
    if isinstance(text, Tensor):
        return text
    try:
        tensor = torch.tensor(text)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a prompt must be token ids, not {text!r}: {error}") from error
    return tensor.long() if tensor.numel() == 0 else tensor
