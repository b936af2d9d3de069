"""Any text: it is left as it is, byte for byte."""

from __future__ import annotations

from almostgpt.data.corpora.base import Corpus


class Plain(Corpus):
    columns = ("text", "TEXT", "content", "article", "body", "document", "email_body")
