"""The folder of a model: one on this machine, or from the Hugging Face hub by its id."""

from __future__ import annotations

import re
from pathlib import Path

from almostgpt.data.huggingface import SPECIAL_TOKENS, TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON
from almostgpt.errors import UserError
from almostgpt.files import expand

# What is read; nothing else is downloaded. Of several forms of the weights, the safetensors in the
# layout of transformers: "model…" keeps out copies such as Mistral's consolidated.safetensors.
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    TEMPLATE,
    "vocab.json",
    "merges.txt",
]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def folder_of(id_or_folder: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; of a hub id the folder of the cache that it was downloaded to.

    Raises ``UserError`` where there is neither, or no network.
    """
    folder = expand(id_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{folder}: a revision is for an id of the hub, and this is a folder")
        if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: a run or checkpoint of AlmostGPT, not a model of Hugging Face: it is used "
                "as it is, and written for transformers with `almostgpt convert --to-hf`"
            )
        return folder
    name = str(id_or_folder)
    if isinstance(id_or_folder, Path) or not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder, and no id of the Hugging Face hub (OWNER/NAME)")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at the revision {revision}" if revision else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FILES)
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: its owner lets in only those who have accepted the terms; do so on "
            f"https://huggingface.co/{name} and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"{name}: no such folder here, and no such model on the Hugging Face hub{at} (or a private "
            "one: log in with `hf auth login`)"
        ) from error
    except (OSError, ValueError) as error:  # HFValidationError is a ValueError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{name}: no such folder here, and it could not be downloaded from the Hugging Face hub "
            f"({reason}); give a folder, or try again with a network"
        ) from error
