"""Choosing a device, and the random state that belongs to it."""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from almostgpt.config import not_one_of
from almostgpt.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first of cuda, mps, cpu that is there; anything else must be."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"device is {name!r}, which is not one of auto, cpu, cuda, cuda:N, mps"
        ) from None
    if device.type == "cpu":
        return device
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) < count:
            return torch.device("cuda", device.index or 0)
        raise UserError(f"device is {name!r}, but torch sees {count} CUDA devices here")
    if device.type == "mps" and torch.backends.mps.is_available():
        return device
    raise UserError(
        f"device is {name!r}, which this torch cannot use here; auto picks what is there"
    )


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights: ``auto`` is bf16 on a GPU that computes in it, and fp32 elsewhere."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    if name not in PRECISIONS:
        raise UserError(f"precision is {not_one_of(name, ['auto', *PRECISIONS])}")
    return PRECISIONS[name]


def random_state(device: torch.device) -> dict[str, str]:
    """torch's generators as text, for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()
    }


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Puts back what :func:`random_state` gave."""

    def tensor(name: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(states[name])), dtype=torch.uint8)

    torch.set_rng_state(tensor("cpu"))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(tensor("cuda"), device)
