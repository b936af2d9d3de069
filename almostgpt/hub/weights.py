"""Tensors of a Hugging Face folder: ``model.safetensors``, or shards and their index. No pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from almostgpt.data.huggingface import read_json
from almostgpt.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")


class StoredTensors:
    """The tensors of a folder by name, each read when it is asked for.

    Raises:
        UserError: no files, missing shards, or damaged files, all of them in one message.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {}
        problems = []
        for name in _file_names(folder):
            if not (folder / name).is_file():
                problems.append(f"{name} is missing")
                continue
            try:
                file = safe_open(folder / name, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                problems.append(f"{name} is damaged or cut off ({error})")
        if problems:
            raise UserError(
                f"{folder}: the weights are not whole: {'; '.join(problems)}; download or copy again"
            )

    def names(self) -> Sequence[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors has it, such as ``BF16``."""
        return self._files[name].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values."""
        return self.shape(one) == self.shape(other) and bool(
            (self.read(one) == self.read(other)).all()
        )


def _file_names(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        if (folder / WHOLE).is_file():
            return [WHOLE]
        raise UserError(f"{folder}: {_without_weights(folder)}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in index.values()
    ):
        raise UserError(f"{folder / INDEX}: damaged: its weight_map names no files of this folder")
    return list(dict.fromkeys(index.values()))


def _without_weights(folder: Path) -> str:
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return f"{INDEX} is missing, which says what is in {shards[0].name} and the other shards"
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    found = f"it has {pickles[0]}" if pickles else "pytorch_model.bin, say,"
    return (
        f"no {WHOLE}. Weights as a pickle ({found}) can run code when they are read, and are not; "
        "with transformers they are written anew: AutoModelForCausalLM.from_pretrained(FOLDER)"
        ".save_pretrained(NEW_FOLDER)"
    )
