"""Why a run stopped: each rank that fails says so in the run directory, and whoever started them finds who was first.

A rank that loses its peers fails, too, a moment later. What it says is the last thing to look at.
"""

import errno
import faulthandler
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mslt.errors import MsltError
from mslt.files import write_json
from mslt.logs import LOG, stacks_to_log
from mslt.pulse import Pulse

LAST_WORDS_S = 30
STUCK = 3  # exit status of a rank that stood still

# What gloo, NCCL and torch's store say when another rank is gone or does not come.
_OF_A_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|timed? ?out|TCPStore|recvValue|peer", re.IGNORECASE
)
_STAYS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Kind = Literal["mistake", "error", "peer"]  # what starting again does not mend; what it may; another rank's


def kind_of(error: BaseException) -> Kind:
    """Of an error that ends a rank."""
    if isinstance(error, MsltError) or (isinstance(error, OSError) and error.errno in _STAYS):
        return "mistake"
    return "peer" if _OF_A_PEER.search(str(error)) else "error"


def in_words(error: BaseException) -> str:
    """The name of an error only where its text was not written for a user."""
    return str(error) if isinstance(error, (MsltError, OSError)) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Failure:
    """`doing` is what the rank was at; `at_s` is seconds since 1970."""

    rank: int
    host: str
    at_s: float
    doing: str
    why: str
    kind: Kind

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, {self.doing}: {self.why}"


def note_failure(folder: Path, rank: int, doing: str, why: str, kind: Kind) -> None:
    """Say why this rank ends, where there is a run already and it can be written."""
    with suppress(OSError):
        if folder.is_dir():
            failure = Failure(rank, socket.gethostname(), time.time(), doing, why, kind)
            write_json(_file(folder, rank), asdict(failure))


def forget_failures(folder: Path, ranks: range) -> None:
    """Of the last start, before the next; every host those of its ranks."""
    for rank in ranks:
        _file(folder, rank).unlink(missing_ok=True)


def first_failure(folder: Path, num_workers: int) -> Failure | None:
    """The earliest, of those that are no peer's if there are any."""
    failures = []
    for rank in range(num_workers):
        with suppress(OSError, ValueError):  # not there, or another host's that is not yet seen whole
            failures.append(Failure(**json.loads(_file(folder, rank).read_text())))
    return min(failures, key=lambda failure: (failure.kind == "peer", failure.at_s), default=None)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.failed.json"


@contextmanager
def noting_failures(folder: Path, rank: int, limit_s: float) -> Iterator[Pulse]:
    """What is raised inside is noted with what the rank was at, which it tells the pulse; where the pulse stands still
    for `limit_s`, the process ends."""

    def stuck(why: str) -> None:
        faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True)  # where the log or the disk is what hangs
        why = f"timed out: {why}: another rank hangs or is cut off, or this one hangs (its stacks stand in its log)"
        try:
            note_failure(folder, rank, pulse.doing, why, "peer")
            LOG.error(f"mslt: rank {rank}: {why}")
            stacks_to_log()
        finally:
            os._exit(STUCK)

    pulse = Pulse(limit_s, stuck)
    try:
        yield pulse
    except Exception as error:
        note_failure(folder, rank, pulse.doing, in_words(error), kind_of(error))
        raise
    finally:
        pulse.close()
