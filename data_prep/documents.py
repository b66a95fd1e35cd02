"""From a recipe's source to its files, and from a file to its documents."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep import books, python_docs, text, wikipedia
from data_prep.recipe import Source


class Kind(NamedTuple):
    find: Callable[[Path], list[Path]]
    read: Callable[[Path], Iterator[tuple[str, str]]]


KINDS = {
    "text": Kind(text.find_files, text.read_documents),
    "wikipedia": Kind(wikipedia.find_files, wikipedia.read_documents),
    "books": Kind(books.find_files, books.read_documents),
    "python_docs": Kind(python_docs.find_files, python_docs.read_documents),
}


class SourceFiles(NamedTuple):
    source: Source
    files: list[Path]
    names: list[str]  # relative to the source, so that moving it changes nothing
    sizes_bytes: list[int]


def list_files(source: Source) -> SourceFiles:
    """The files of a source in the order they are read; MsltError if there are none."""
    root = Path(source.path).expanduser() if source.path else python_docs.stdlib()
    files = KINDS[source.kind].find(root)[: source.limit]
    names = [path.name if path == root else path.relative_to(root).as_posix() for path in files]
    return SourceFiles(source, files, names, [path.stat().st_size for path in files])


def read_documents(source: Source, path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(key, text) of each document of a file, in order. The key is the file's name, with the page's or topic's where
    it holds more than one. Text is one paragraph a line, and empty where nothing was left of the document."""
    for part, document in KINDS[source.kind].read(path):
        yield f"{name}#{part}" if part else name, document
