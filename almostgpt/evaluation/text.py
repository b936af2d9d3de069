"""What a model is scored on: the tokens of a text file, of a shard, or of a prepared folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from almostgpt.data.corpora import read_text
from almostgpt.data.dataset import is_prepared, open_dataset
from almostgpt.data.shards import open_shard
from almostgpt.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from almostgpt.data.tokenizer import Tokenizer, load_tokenizer
from almostgpt.errors import UserError
from almostgpt.files import expand


def read_tokens(path: str | Path, tokenizer: Tokenizer, *, progress: bool = True) -> np.ndarray:
    """The tokens of what ``path`` names: (n,), uint16 or uint32; those of shards are mapped.

    A ``.bin`` file is a token shard, a folder a prepared one, of which the validation split is taken
    (with several shards a copy in memory); any other file is UTF-8 text, which ``tokenizer`` encodes.

    Raises ``UserError`` that names what is missing, damaged, no text, or made with another tokenizer.
    Bare public shards do not say which made them: there it is the caller who knows.
    """
    path = expand(path)
    if path.is_dir():
        return _validation_split(path, tokenizer, progress)
    if not path.exists():
        raise UserError(
            f"{path}: no such file; give a text file, a .bin shard or a prepared folder"
        )
    if path.suffix == ".bin":
        if (path.parent / TOKENIZER_FILE).is_file():
            _check_same(path, load_tokenizer(path.parent), tokenizer)
        return open_shard(path)
    text = read_text(path)
    try:
        begin = np.array(tokenizer.begin, tokenizer.dtype)
        return np.concatenate([begin, tokenizer.encode_array(text)])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _validation_split(folder: Path, tokenizer: Tokenizer, progress: bool) -> np.ndarray:
    if not is_prepared(folder):
        raise UserError(
            f"{folder}: a folder, but not a prepared one; give a text file, a .bin shard, or a "
            "folder that almostgpt prepare made"
        )
    dataset = open_dataset(folder, tokenizer.name, progress=progress)
    _check_same(folder, dataset.tokenizer, tokenizer)
    if not dataset.val:
        raise UserError(f"{folder}: its validation split is empty; name one of its .bin shards")
    # Shards are cut from one run of tokens, wherever they are full.
    return np.asarray(dataset.val[0]) if len(dataset.val) == 1 else np.concatenate(dataset.val)


def _check_same(path: Path, theirs: Tokenizer, models: Tokenizer) -> None:
    """Ids of another vocabulary would be scored as if they meant something."""
    if theirs.same_as(models):
        return
    other = "another char" if theirs.name == models.name else f"the {theirs.name}"
    raise UserError(
        f"{path}: made with {other} tokenizer, but the model with the {models.name} one "
        f"({models.vocab_size} ids); give the text itself"
    )
