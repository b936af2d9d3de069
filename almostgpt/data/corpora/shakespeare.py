"""Tiny Shakespeare (1.1 MB): downloaded once into the cache, and checked every time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

from almostgpt.data.corpora.base import Block, BuiltIn
from almostgpt.errors import UserError
from almostgpt.files import replacing

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BYTES = 1_115_394


class TinyShakespeare(BuiltIn):
    def blocks(self, cache: Path) -> Iterator[Block]:
        file = cache / "tinyshakespeare.txt"
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != SHA256:
            content = _download()
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing(file) as out:
                    out.write(content)
            except OSError as error:
                raise UserError(
                    f"{file}: the download cannot be kept: {error.strerror or error}; make room, "
                    "or set ALMOSTGPT_CACHE to another folder"
                ) from error
        yield Block(str(file), file.name, content, size=len(content))


def _download() -> bytes:
    elsewhere = "or name a text of your own with --data.path"
    try:
        with urlopen(URL, timeout=30) as response:
            content = response.read(BYTES + 1)
    except OSError as error:  # URLError, timeouts and broken connections are all OSErrors
        raise UserError(
            f"data.corpus=shakespeare: {URL} could not be downloaded ({error}); connect to the "
            f"network, {elsewhere}"
        ) from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(
            f"data.corpus=shakespeare: what {URL} sent is not the expected text (its SHA-256 "
            f"differs); try again, {elsewhere}"
        )
    return content
