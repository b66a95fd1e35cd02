"""The errors a user sees."""


class MsltError(Exception):
    """A user's mistake: the message names the thing, its value and the remedy, and needs no traceback."""

    exit_status = 2


class Left(MsltError):
    """A run was told to leave; the same command goes on from its last checkpoint."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again
