"""Emails of Enron: what somebody wrote, without headers, quoted replies and forwarded mails.

The Kaggle csv (column ``message``: whole mails), the maildir of CMU (``maildir/allen-p/inbox/1.``), and
AESLC: the column ``email_body``, or ``.subject`` files, in which subject lines follow the mail.
"""

from __future__ import annotations

import email
import email.policy
import re
from email.errors import MessageError
from typing import Any

from almostgpt.data.corpora.base import Corpus

# Where a mail that is answered or forwarded begins. Lotus Notes and Outlook, as Enron used them.
_OLDER = re.compile(
    r"^[ \t>]*(?:-{3,} ?(?:Original Message|Original Appointment) ?-{3,}"
    r"|-{5,} ?Forwarded by [^\n]*"
    r"|_{5,}[^\n]*\n[ \t]*From: "
    r"|From:[^\n]+\n(?:[ \t>]*(?:Sent|Date|To|Cc|Subject):[^\n]*\n){2,}"
    r"|On (?=[^\n]*\d)[^\n]{5,120}(?:\n[^\n]{0,80})? wrote:[ \t]*$"
    r"|[^\n]{2,80}\n[ \t]*\d\d/\d\d/(?:\d\d|\d{4}) \d\d:\d\d(?::\d\d)? [AP]M[^\n]*\n[ \t]*To:)",
    re.MULTILINE | re.IGNORECASE,
)
_QUOTED = re.compile(r"^[ \t]*>[^\n]*\n?", re.MULTILINE)
_HEADER = re.compile(r"\A[!-9;-~]+:")  # RFC 5322: printable ASCII but the colon


class Enron(Corpus):
    columns = ("message", "email_body")
    hub = "Yale-LILY/aeslc"
    # In a maildir the files are numbers, with or without a dot or an underscore behind them.
    formats = {"*.subject": "text", "[0-9]*[._]": "text", "[0-9]": "text", "[0-9]*[0-9]": "text"}

    def clean(self, text: str) -> str:
        """The own words in a mail's body."""
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
        if older := _OLDER.search(text):
            text = text[: older.start()]
        lines = _QUOTED.sub("", text).split("\n")
        return "\n".join(map(str.rstrip, lines)).strip()

    def from_row(self, row: dict[str, Any], column: str) -> str:
        text = row[column]
        return (
            self._from_mail(text.encode("utf-8", "surrogateescape"))
            if (column == "message")
            else self.clean(text)
        )

    def from_file(self, name: str, content: bytes) -> str:
        if ".subject" in name:
            return self.clean(content.decode("utf-8").split("\n@subject\n", 1)[0])
        return self._from_mail(content)

    def _from_mail(self, content: bytes) -> str:
        """The body of an RFC 822 mail, decoded as its headers say."""
        if not _HEADER.match(content[:200].decode("latin-1")):
            return self.clean(_decoded(content))
        try:
            mail = email.message_from_bytes(content, policy=email.policy.compat32)
            parts = [part for part in mail.walk() if part.get_content_type() == "text/plain"]
            bodies = [part.get_payload(decode=True) or b"" for part in parts]
        except (MessageError, ValueError, LookupError, AssertionError):  # headers of some spam
            bodies = [content.partition(b"\n\n")[2]]
        return self.clean("\n".join(_decoded(body) for body in bodies if isinstance(body, bytes)))


def _decoded(body: bytes) -> str:
    """UTF-8, or else what mails of those years were: Windows' Latin-1, in which any byte is text."""
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("cp1252", "replace")
