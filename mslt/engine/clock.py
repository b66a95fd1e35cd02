"""Where a step's time goes: seconds by name, without stopping the device to look."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds under names. On CUDA the spans are events, read when `take` is called."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._pending.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

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
