"""Wikipedia: JSON lines of wikiextractor, or the columns id, url, title, text of the hub.

A document is the title, a blank line and the article; some versions of wikiextractor write the title
into the text and some do not, and both give the same document.
"""

from __future__ import annotations

import re
from typing import Any

from almostgpt.data.corpora.base import Corpus

# What is left of "(; {{lang-grc|…}})" once the templates are gone.
_EMPTY = re.compile(r"[ \u00a0]?\((?:[\s;,']|\"\")*\)")
_LEADING = re.compile(r"\((?:\s*[;,])+\s*")
_TAGS = re.compile(r"</?(?:onlyinclude|includeonly|noinclude|nowiki|br|ref|section)\b[^<>\n]*>")
_BLANK = re.compile(r"\n{3,}")


class Wikipedia(Corpus):
    also = ("title",)
    hub = "wikimedia/wikipedia/20231101.en"
    formats = {"wiki_[0-9]*": "jsonl", "*.json": "jsonl"}

    def clean(self, text: str) -> str:
        text = _TAGS.sub("", text.replace("\r\n", "\n"))
        text = _LEADING.sub("(", _EMPTY.sub("", text))
        text = "\n".join(map(str.rstrip, text.split("\n")))
        return _BLANK.sub("\n\n", text).strip()

    def from_row(self, row: dict[str, Any], column: str) -> str:
        title, text = row.get("title"), self.clean(row[column])
        title = title.strip() if isinstance(title, str) else ""
        if not text or not title or text.split("\n", 1)[0].strip() == title:
            return text
        return f"{title}\n\n{text}"
