"""The one error a user sees."""


class MsltError(Exception):
    """A user's mistake: the message names the thing, its value and the remedy, and needs no traceback."""

    exit_status = 2


class Left(MsltError):
    """A run that was told to leave has saved, and goes on with the same command."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again
