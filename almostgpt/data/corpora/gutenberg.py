"""Project Gutenberg: a book between its header and its licence.

The plain text files (``11-0.txt``), and the column TEXT of sedthh/gutenberg_english or text of
manu/project_gutenberg: marked as of 2004 (``*** START OF THIS PROJECT GUTENBERG EBOOK … ***``) or as of
the years before (``*END*THE SMALL PRINT! … *END*``). Lines stay broken as in print.
"""

from __future__ import annotations

import re

from almostgpt.data.corpora.base import Corpus

# A long title runs on to a second line, and may hold a star.
_START = re.compile(
    r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK[^\n]*(?:\n[^\n]+){0,3}?\*\*\*[ \t]*$"
    r"|^\*END[ *]*THE SMALL PRINT![^\n]*\*END\*[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(
    r"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK"
    r"|^(?:\*\*\* ?)?End of (?:the |this )?Project Gutenberg(?:['’]s)? ",
    re.MULTILINE | re.IGNORECASE,
)
# Who typed the book: the first paragraph, where it says so.
_CREDIT = re.compile(
    r"\A(?:E-?text prepared|Produced|Transcribed|Prepared) by [^\n]*(?:\n[^\n]+)*\n\n"
)


class Gutenberg(Corpus):
    columns = ("TEXT", "text")
    hub = "sedthh/gutenberg_english"

    def clean(self, text: str) -> str:
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        if start := _START.search(text):
            text = text[start.end() :]
        if end := _END.search(text):
            text = text[: end.start()]
        text = _CREDIT.sub("", text.strip("\n") + "\n\n", count=1)
        return text.strip()
