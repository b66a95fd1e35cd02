"""The same work on many pieces, over all cores."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from mslt.errors import MsltError

# Called with the stage's name, bytes done and bytes in all.
Progress = Callable[[str, int, int], None]


class Task(NamedTuple):
    arguments: tuple[Any, ...]
    size_bytes: int
    is_done: bool  # already, by a run before


def run_tasks(
    stage: str, function: Callable[..., None], tasks: list[Task], num_workers: int, progress: Progress
) -> None:
    """Call `function` with the arguments of every task that is not done, in any order. Its first error ends it all."""
    total_bytes = sum(task.size_bytes for task in tasks)
    done_bytes = sum(task.size_bytes for task in tasks if task.is_done)
    waiting = [task for task in tasks if not task.is_done]
    progress(stage, done_bytes, total_bytes)
    if min(num_workers, len(waiting)) < 2:
        for task in waiting:
            function(*task.arguments)
            done_bytes += task.size_bytes
            progress(stage, done_bytes, total_bytes)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(waiting)), mp_context=context, initializer=start_worker)
    try:
        futures = {pool.submit(function, *task.arguments): task for task in waiting}
        for future in as_completed(futures):
            future.result()
            done_bytes += futures[future].size_bytes
            progress(stage, done_bytes, total_bytes)
    except BrokenProcessPool:
        raise MsltError(
            f"{stage}: a worker process was killed, most likely for want of memory; run again with fewer --workers: "
            "what is done is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """One thread of tokenizing a process, and an end when the parent ends, however it ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
