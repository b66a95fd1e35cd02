"""English that comes with every Python: the language reference of pydoc, and the standard library's docstrings.

About 2 MB, for a first run without a download. Source files are parsed, never imported.
"""

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_prep.documents import Document, Part, list_files, walk_files
from data_prep.recipe import FileSource
from data_prep.text import LINE_END, make_document, one_a_line
from mslt.errors import MsltError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TOPICS = "pydoc_data/topics.py"
UNDERLINE = re.compile(r"^\s*([=\-~^*\"'`#+_.])\1{2,}\s*$")
CODE_LINE = re.compile(r"^\s*(>>>|\.\.\. |\.\.\.$|\.\. |\$ |[|+]--|Traceback \()|::=|^\s*(from \S+ )?import \S+$")
LITERAL = re.compile(r"``?([^`]+)``?|:[a-z:]{1,50}:`~?([^`]+)`")
BULLET = re.compile(r"^\s*([*\-+]|\d+[.)])\s+")
CODE_CHARACTERS = re.compile(r"[=(){}\[\]<>_@|\\/:;+*#%$&~^\d]")
# Share of code characters at which a paragraph is taken for code, a table or a signature, and words below which
# a paragraph is no prose; read by eye over 3.11's library.
MAX_CODE_SHARE = 0.08
MIN_WORDS = 4


def list_parts(source: FileSource) -> list[Part]:
    """A part for each Python file of a standard library folder, without tests and installed packages."""
    root = Path(source.path).expanduser() if source.path else Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise MsltError(f"{root}: no such folder; leave `path` out to read this Python's own library")
    files = [
        path
        for path in walk_files(root)
        if path.suffix == ".py" and not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise MsltError(f"{root}: no .py file; leave `path` out to read this Python's own library")
    return list_files(root, files[: source.max_files])


def read_part(source: FileSource, part: Part) -> Iterator[Document]:
    """One document for each topic of the language reference, and one for the docstrings of each source file."""
    assert part.path is not None
    if part.path.as_posix().endswith(TOPICS):
        for _, text in sorted(read_topics(part.path).items()):
            yield clean_document([text])
    else:
        yield clean_document(list(docstrings(part.path)))


def clean_document(texts: list[str]) -> Document:
    num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return make_document("\n".join(map(clean_docstring, texts)), num_bytes, LINE_END)


def read_topics(path: Path) -> dict[str, str]:
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return topics
    raise MsltError(f"{path}: holds no dict of topics; leave `path` out to read this Python's own library")


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise MsltError(f"{path}: not Python of this version ({error}); take it out of the source") from error


def clean_docstring(text: str) -> str:
    """Prose paragraphs, one a line: without doctests, section underlines, grammar and code."""
    blocks: list[list[str]] = [[]]
    for line in inspect.cleandoc(text).split("\n"):
        if UNDERLINE.match(line) or CODE_LINE.search(line):
            blocks.append([])
            continue
        if not line.strip() or BULLET.match(line):
            blocks.append([])
        blocks[-1].append(BULLET.sub("", line))
    joined = (LITERAL.sub(r"\1\2", " ".join(block)).replace("::", ":") for block in blocks)
    return one_a_line(filter(is_prose, joined))


def is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    return len(words) >= MIN_WORDS and len(CODE_CHARACTERS.findall(paragraph)) <= MAX_CODE_SHARE * len(paragraph)
