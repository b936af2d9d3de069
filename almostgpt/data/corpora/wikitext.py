"""WikiText: lines of Wikipedia's good articles, gathered into articles again.

The files of WikiText-2 and -103 (``wiki.train.raw``, ``wiki.train.tokens``) and the rows of the hub hold a
line each; an article begins with its title, `` = Title = ``, between blank lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from almostgpt.data.corpora.base import Corpus

_TITLE = re.compile(r"= [^=\s](?:[^\n]*[^=\s])? =")  # sections have two or more on each side
_JOINED = re.compile(r" @([-,.])@(?: |$)", re.MULTILINE)  # "0 @.@ 7" is 0.7


class WikiText(Corpus):
    hub = "Salesforce/wikitext/wikitext-103-raw-v1"
    formats = {"*.raw": "lines", "*.tokens": "lines", "*.txt": "lines"}
    unit = "article"

    def gather(self, texts: Iterator[str]) -> Iterator[str]:
        lines: list[str] = []
        for line in map(str.strip, texts):
            if lines and not lines[-1] and _TITLE.fullmatch(line):
                yield "\n".join(lines)
                lines = []
            if line or lines:
                lines.append(line)
        if lines:
            yield "\n".join(lines)

    def clean(self, text: str) -> str:
        return _JOINED.sub(r"\1", text).strip()
