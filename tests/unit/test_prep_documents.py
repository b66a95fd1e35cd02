"""Sources to documents: what each reader keeps, and what it refuses."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import python_docs, text
from data_prep.documents import MAX_DOCUMENT_BYTES, PART_BYTES, Document
from data_prep.recipe import FileSource
from data_prep.sentences import split_paragraph, split_sentences
from mslt.errors import MsltError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(reader: Any, source: FileSource) -> list[Document]:
    return [document for part in reader.list_parts(source) for document in reader.read_part(source, part)]


def read_text(path: Path) -> list[Document]:
    return read(text, FileSource(kind="text", path=str(path)))


def test_text_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "\ufeffOne\r\ntwo.\r\n\r\n\r\nThree.")
    write(tmp_path / "a/c.md", "Deep.")
    write(tmp_path / "a/d.rst", "Old\rMac.\r\rEnds.")
    write(tmp_path / "a/picture.png", b"\x89PNG\0")
    write(tmp_path / ".git/notes.txt", "hidden")
    assert read_text(tmp_path) == [
        Document("a/c.md", "Deep.", 5),
        Document("a/d.rst", "Old Mac.\nEnds.", 15),
        Document("b.txt", "One two.\nThree.", 24),
    ]
    first = FileSource(kind="text", path=str(tmp_path), max_files=1)
    assert [document.key for document in read(text, first)] == ["a/c.md"]
    assert [document.key for document in read_text(tmp_path / "b.txt")] == ["b.txt"]


@pytest.mark.parametrize("content", [b"text\0more", b"caf\xe9 \xff"])
def test_damaged_file_is_counted_and_the_rest_read(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.txt", content)
    write(tmp_path / "b.txt", "Whole.")
    assert read_text(tmp_path) == [Document("a.txt", "", len(content), "damaged"), Document("b.txt", "Whole.", 6)]


def test_damage_takes_the_piece_of_a_long_file_it_is_in(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"A good paragraph.\n\n" * 1000 + b"\xff\n\n" + b"A good paragraph.\n\n" * 1000)
    assert [document.dropped for document in read_text(tmp_path)] == ["", "", "damaged", "", ""]


def test_empty_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "\n \n\t\n")
    assert read_text(tmp_path) == [Document("a.txt", "", 0, "empty"), Document("b.txt", "", 5, "empty")]


def test_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "only.pdf", "x")
    with pytest.raises(MsltError, match=r"read are \.txt, \.md, \.rst"):
        read_text(tmp_path)
    with pytest.raises(MsltError, match="no such file or folder"):
        read_text(tmp_path / "nowhere")


def test_long_file_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"Paragraph {number} of a long book." for number in range(2000)]
    path = write(tmp_path / "book.txt", "\n\n".join(lines))
    documents = read_text(path)
    assert [document.key for document in documents] == [f"book.txt#part {n + 1}" for n in range(len(documents))]
    assert len(documents) == path.stat().st_size // text.LONG_BYTES + 1
    assert "\n".join(document.text for document in documents).split("\n") == lines
    assert sum(document.num_bytes for document in documents) == path.stat().st_size


def test_oversized_paragraph_is_skipped_in_little_memory(tmp_path: Path) -> None:
    size = 3 * MAX_DOCUMENT_BYTES
    path = write(tmp_path / "a.txt", b"First.\n\n" + b" " * 9000 + b"\n\n" + b"x" * size + b"\n\nLast.")
    tracemalloc.start()
    documents = read_text(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(d.text, d.dropped) for d in documents] == [("First.", ""), ("", "oversized"), ("Last.", "")]
    assert sum(document.num_bytes for document in documents) == path.stat().st_size
    assert peak < 2 * MAX_DOCUMENT_BYTES


PART_SIZES = [2**13, 3 * 2**13, 2**24]
assert PART_BYTES % text.LONG_BYTES == 0
PARAGRAPHS = st.sampled_from(
    [b"x\n", b"word \n" * 900, b"\n", b" \t\r\n", b"\n\n", b"y" * 9000, b"\xff", b" " * 70_000]
)


@settings(derandomize=True, deadline=None)
@given(st.lists(PARAGRAPHS, max_size=12).map(b"".join))
def test_documents_are_the_same_however_the_file_is_cut(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp() / "cut.txt", raw)
    found = []
    for size in PART_SIZES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "PART_BYTES", size)
            found.append(read_text(path))
    assert found[0] == found[1] == found[2]
    assert sum(document.num_bytes for document in found[0]) == len(raw)
    assert len({document.key for document in found[0]}) == len(found[0]) > 0
    words = b" ".join(raw.split()).decode("utf-8", "replace").split()
    assert [w for d in found[0] for w in d.text.split()] == words or any(d.dropped == "damaged" for d in found[0])


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    documents = read_text(write(tmp_path_factory.getbasetemp() / "any.txt", raw))
    assert sum(document.num_bytes for document in documents) == len(raw)


def test_docstrings_become_prose(tmp_path: Path) -> None:
    source = '''"""Module about things.

    A title here
    ============

    It does things with ``spam``, and
    it does them well.

    >>> do(1)
    2
    """
raise SystemExit("never imported")

def f():
    """Return f(x, y=1)[0] = {a: b} for c."""

async def g():
    "Say something nice to everybody."
'''
    path = write(tmp_path / "things.py", source)
    (document,) = read(python_docs, FileSource(kind="python_docs", path=str(path.parent)))
    assert document.key == "things.py"
    assert document.text == "It does things with spam, and it does them well.\nSay something nice to everybody."
    assert len(document.text) < document.num_bytes < len(source)


def test_topics_are_documents_and_tests_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "test/test_x.py", "")
    write(tmp_path / "site-packages/x.py", "")
    write(tmp_path / "pydoc_data/topics.py", "topics = {'b': 'Beta is the second letter.', 'a': ''}\n")
    assert read(python_docs, FileSource(kind="python_docs", path=str(tmp_path))) == [
        Document("pydoc_data/topics.py#a", "", 0, "empty"),
        Document("pydoc_data/topics.py#b", "Beta is the second letter.", 26),
    ]


def test_no_python_is_named(tmp_path: Path) -> None:
    source = FileSource(kind="python_docs", path=str(tmp_path))
    with pytest.raises(MsltError, match=r"no \.py file; leave `path` out"):
        python_docs.list_parts(source)
    write(tmp_path / "old.py", "print 'two'")
    with pytest.raises(MsltError, match=r"old\.py: not Python of this version"):
        read(python_docs, source)


def test_sentences() -> None:
    assert split_sentences('"Did he?" she asked. Mrs. Bennet left at 5 p.m. on Monday.\n* * *\nThe end') == [
        '"Did he?" she asked.',
        "Mrs. Bennet left at 5 p.m. on Monday.",
        "The end",
    ]


def test_long_quotation_is_split_and_loses_nothing() -> None:
    quotation = "“" + "I have not much to say. " * 20 + "He asked, “Why?” Then he left.” She wept."
    assert len(split_sentences(quotation)) > 20
    assert "".join(split_paragraph(quotation)) == quotation
