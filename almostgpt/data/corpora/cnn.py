"""News of CNN and the Daily Mail: the column ``article``, without place, agency and time stamps."""

from __future__ import annotations

import re

from almostgpt.data.corpora.base import Corpus

# "(CNN)Share, …", "Tokyo (CNN)Police …", "LONDON, England (Reuters) -- A …"
_DATELINE = re.compile(
    r"\A(?:[A-Z][^()\n]{0,60} )?\([A-Z][^()\n]{1,40}\)(?:\s*(?:--|[-\u2013\u2014])\s*|(?=[^\s.,;:]))"
)
# "By . Daily Mail Reporter . PUBLISHED: . 12:34 EST, 3 May 2013 . | . UPDATED: . 13:05 EST, … . "
_BYLINE = re.compile(r"\A(?:By \. )[^.\n]{1,80} \. (?:and [^.\n]{1,80} \. )?")
_STAMPS = re.compile(
    r"\A(?:\| \. )?(?:PUBLISHED|UPDATED|Last updated)[^\n]{0,12}? \. [^.\n|]{4,60} \. "
)


class CNN(Corpus):
    columns = ("article",)
    hub = "abisee/cnn_dailymail/3.0.0"

    def clean(self, text: str) -> str:
        text = _BYLINE.sub("", text.strip())
        while (rest := _STAMPS.sub("", text)) != text:
            text = rest
        return _DATELINE.sub("", text).removesuffix("E-mail to a friend .").strip()
