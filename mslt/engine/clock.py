"""Where a step's time goes: seconds by name, without stopping the device to look."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds under names; a span inside another stops the outer one's, so that no second counts twice.

    On CUDA the marks are events, read when `take` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since: float | torch.cuda.Event = 0.0
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        """Give the time since the last mark to the innermost span that was open."""
        now: float | torch.cuda.Event = time.perf_counter()
        if self._on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        if self._open:
            if isinstance(now, float):
                self._seconds[self._open[-1]] += now - self._since  # type: ignore[operator]
            else:
                self._pending.append((self._open[-1], self._since, now))  # type: ignore[arg-type]
        self._since = now

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by name."""
        if self._pending:
            torch.cuda.synchronize()
        for name, start, end in self._pending:
            self._seconds[name] += start.elapsed_time(end) / 1000
        taken = dict(self._seconds)
        self._pending.clear()
        self._seconds.clear()
        return taken
