"""Processes that end with those they work for, however these end."""

import ctypes
import os
import select
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # of prctl(2)
LOOK_S = 2.0
LAUNCHED = "MSLT_LAUNCHED"  # set for workers, which end with the head of their group: DeepSpeed's launcher

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not to be loaded between fork and exec


def end_with(parent: int) -> None:
    """Have the system kill this process when its parent, or the thread of that which started it, is gone; at once where
    it is gone already. Linux alone: elsewhere it lives on."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def leave_with_the_listener() -> None:
    """From now on, send this process SIGTERM when the other end of its stdout or stderr is closed: a host of several is
    started by ssh, which ends like that."""

    def look() -> None:
        poll = select.poll()
        for descriptor in (1, 2):
            poll.register(descriptor, 0)
        while not any(event & select.POLLERR for _, event in poll.poll(0)):
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="listener", daemon=True).start()
