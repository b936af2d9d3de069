"""The one error type for mistakes that a user can make and mend."""


class UserError(ValueError):
    """A problem whose message tells the user what is wrong and what to do.

    The command line prints the message alone and exits with code 2 (``--debug`` adds the
    traceback). In a library call it is an ordinary ``ValueError``.
    """
