"""What a rank says: rank 0 to the terminal and to its log, the others to their logs, and all tell the terminal why
they end."""

import faulthandler
import logging
import sys
from pathlib import Path
from typing import TextIO

LOG = logging.getLogger("mslt")


class _Terminal(logging.StreamHandler[TextIO]):
    """Whatever sys.stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _File(logging.StreamHandler[TextIO]):
    """A rank's log."""


_terminal = _Terminal()
_terminal.setLevel(logging.INFO)  # what is below is for the log: tracebacks, and what a progress bar shows
LOG.addHandler(_terminal)
LOG.setLevel(logging.DEBUG)
LOG.propagate = False


def open_log(folder: Path, rank: int) -> None:
    """From now on all goes to `folder`/rank-00003.log, too, with its time: Python's warnings, and where a crash of the
    interpreter stood."""
    folder.mkdir(exist_ok=True)
    stream = (folder / f"rank-{rank:05d}.log").open("a", buffering=1)
    file = _File(stream)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if rank > 0:
        _terminal.setLevel(logging.ERROR)
    for logger in (LOG, logging.getLogger("py.warnings")):
        logger.addHandler(file)
    logging.getLogger("py.warnings").addHandler(_terminal)
    logging.captureWarnings(True)
    faulthandler.enable(stream)


def stacks_to_log() -> None:
    """What every thread of this process is at."""
    for handler in LOG.handlers:
        if isinstance(handler, _File):
            faulthandler.dump_traceback(handler.stream)
