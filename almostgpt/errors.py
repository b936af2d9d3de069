"""The one error type for mistakes that a user can make and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A problem whose message tells the user what is wrong and what to do.

    The command line prints the message alone and exits with code 2 (``--debug`` adds the
    traceback). In a library call it is an ordinary ``ValueError``.
    """


def not_one_of(name: object, known: Iterable[str]) -> str:
    """``'layernrm', which is not one of layernorm, rmsnorm; did you mean layernorm?``"""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"{name!r}, which is not one of {', '.join(known)}" + (
        f"; did you mean {near[0]}?" if near else ""
    )
