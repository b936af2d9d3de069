"""Pages of the web whose text others have taken out already: OpenWebText, FineWeb-Edu."""

from __future__ import annotations

from almostgpt.data.corpora.base import Corpus


class WebText(Corpus):
    """Line ends as ``\\n``, nothing before the first and after the last of the text."""

    def clean(self, text: str) -> str:
        return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip()


class OpenWebText(WebText):
    hub = "Skylion007/openwebtext"


class FineWebEdu(WebText):
    hub = "HuggingFaceFW/fineweb-edu/sample-10BT"
