"""A bar for long work that is counted."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counted_parts() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where that is a terminal; yields the function that is told what is being done, how much of it is,
    and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield lambda doing, done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(doing: str, done: int, total: int) -> None:
            if doing != bar.tasks[0].description:
                bar.reset(task, description=doing)
            bar.update(task, completed=done, total=total)

        yield show


@contextmanager
def counted(description: str) -> Iterator[Callable[[int, int], None]]:
    """The same for work of one kind."""
    with counted_parts() as show:
        yield lambda done, total: show(description, done, total)
