"""A rank's sign of life. One that waits for a rank which hangs, or which the network has cut off, would wait long and
say nothing; this names where it stood, and ends it."""

import threading
import time
from collections.abc import Callable


class Pulse:
    """Told by `at` what the rank begins; when that takes over `limit_s`, a thread calls `still` with it, once."""

    def __init__(self, limit_s: float, still: Callable[[str], object]) -> None:
        self.doing = "starting"
        self._since = time.monotonic()
        self._limit_s = limit_s
        self._still = still
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self._thread.start()

    def at(self, doing: str) -> None:
        self.doing, self._since = doing, time.monotonic()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit_s / 4, 5.0)):
            if time.monotonic() - self._since > self._limit_s:
                self._still(f"{self.doing}: nothing has moved for {self._limit_s:.0f} s")
                return
