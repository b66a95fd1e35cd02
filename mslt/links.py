"""How fast hosts reduce gradients: all-reduces of growing size, from which the next one's time is foretold."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

FIRST_BYTES, GROWTH, REPEATS = 2**16, 4, 2
TIMEOUT_S = 30.0  # of one all-reduce; the first is small


@dataclass(frozen=True)
class Timed:
    """The last and largest all-reduce of `size` processes."""

    size: int
    num_bytes: int
    seconds: float

    @property
    def gbps(self) -> float:
        """Gigabits a second that each sends, in a ring."""
        return 2 * (self.size - 1) / self.size * 8 * self.num_bytes / self.seconds / 1e9


def time_all_reduces(
    store: Store, name: str, rank: int, size: int, backend: str, largest_bytes: int, budget_s: float
) -> Timed:
    """To be called by all `size` processes, with a `name` not used before. They stop at `largest_bytes`, or where the
    next all-reduce would not fit into what is left of `budget_s`. RuntimeError where they do not reach each other."""
    with _group(store, name, rank, size, backend):
        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        _timed(FIRST_BYTES, device)  # connects
        num_bytes, deadline = FIRST_BYTES, time.monotonic() + budget_s
        while True:
            seconds = min(_timed(num_bytes, device) for _ in range(REPEATS))
            following = min(num_bytes * GROWTH, largest_bytes)
            foretold_s = REPEATS * seconds * following / num_bytes
            goes_on = following > num_bytes and time.monotonic() + foretold_s < deadline
            decided = torch.tensor([int(goes_on)], device=device)
            dist.broadcast(decided, 0)
            if not int(decided):
                return Timed(size, num_bytes, seconds)
            num_bytes = following


@contextmanager
def _group(store: Store, name: str, rank: int, size: int, backend: str) -> Iterator[None]:
    """All processes as torch's default group, while it lasts. Waiting for NCCL ends with an error, not the process."""
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    dist.init_process_group(
        backend,
        store=PrefixStore(name, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _timed(num_bytes: int, device: torch.device) -> float:
    payload = torch.zeros(num_bytes // 4, device=device)
    started = time.perf_counter()
    dist.all_reduce(payload)
    float(payload[0])  # of NCCL, the end is waited for
    return time.perf_counter() - started
