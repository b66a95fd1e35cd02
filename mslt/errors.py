"""The one error a user sees."""


class MsltError(Exception):
    """A user's mistake: the message names the thing, its value and the remedy, and needs no traceback."""
