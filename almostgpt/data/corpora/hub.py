"""Datasets of the Hugging Face hub, streamed: ``hf://OWNER/NAME[/CONFIG[/SPLIT]]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from almostgpt.data.corpora.base import Block, Corpus, choose_column, rows_in_blocks
from almostgpt.errors import UserError

SCHEME = "hf://"


def parse_address(address: str) -> tuple[str, str | None, str]:
    """``OWNER/NAME``, the configuration if one is named, and the split, by default ``train``.

    The hub's own spelling with ``datasets/`` before the owner is read, too.
    """
    parts = address.removeprefix(SCHEME).removeprefix("datasets/").split("/")
    if not 2 <= len(parts) <= 4 or not all(parts):
        raise UserError(f"data.path is {address!r}, not hf://OWNER/NAME[/CONFIG[/SPLIT]]")
    return "/".join(parts[:2]), *(parts[2:3] or [None]), *(parts[3:4] or ["train"])


def hub_blocks(address: str, corpus: Corpus, column: str | None) -> Iterator[Block]:
    """Rows as the hub sends them; ``UserError`` names the row at which it stopped."""
    name, config, split = parse_address(address)
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{address}: streaming from the hub needs datasets: pip install 'almostgpt[data]'"
        ) from error
    yield from rows_in_blocks(
        _rows(datasets, address, (name, config, split), corpus, column),
        address,
        f"{SCHEME}{name}",
        corpus,
        column,
        lambda: 0,  # how much there is to come is not known
    )


def _rows(
    datasets: Any,
    address: str,
    which: tuple[str, str | None, str],
    corpus: Corpus,
    column: str | None,
) -> Iterator[dict[str, Any]]:
    name, config, split = which
    number, wanted = 0, None
    try:
        for row in datasets.load_dataset(name, config, split=split, streaming=True):
            if wanted is None:
                chosen = choose_column(list(row), corpus, column)
                wanted = [chosen, *(n for n in corpus.also if n in row and n != chosen)]
            yield {key: row[key] for key in wanted if key in row}
            number += 1
    except UserError as error:
        raise UserError(f"{address}: {error}") from error
    except Exception as error:  # of the network, the hub, or any of the formats behind it
        raise UserError(
            f"{address}: row {number + 1} could not be read ({type(error).__name__}: {error}); check "
            "the address and the network (HF_TOKEN opens gated datasets)"
        ) from error
