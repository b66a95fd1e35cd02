"""Sources to documents: what each reader keeps, and what it refuses."""

import bz2
import gzip
import os
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
        Document("Deep.", 5),
        Document("Old Mac.\nEnds.", 15),
        Document("One two.\nThree.", 24),
    ]
    first = FileSource(kind="text", path=str(tmp_path), max_files=1)
    assert [document.text for document in read(text, first)] == ["Deep."]
    assert [document.text for document in read_text(tmp_path / "b.txt")] == ["One two.\nThree."]


@pytest.mark.parametrize("content", [b"text\0more", b"caf\xe9 \xff"])
def test_damaged_file_is_counted_and_the_rest_read(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.txt", content)
    write(tmp_path / "b.txt", "Whole.")
    assert read_text(tmp_path) == [Document("", len(content), "damaged"), Document("Whole.", 6)]


def test_damage_takes_the_piece_of_a_long_file_it_is_in(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"A good paragraph.\n\n" * 1000 + b"\xff\n\n" + b"A good paragraph.\n\n" * 1000)
    assert [document.dropped for document in read_text(tmp_path)] == ["", "", "damaged", "", ""]


def test_empty_files_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "\n \n\t\n")
    assert read_text(tmp_path) == [Document("", 0, "empty"), Document("", 5, "empty")]


def test_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "only.pdf", "x")
    with pytest.raises(MsltError, match=r"read are \.txt, \.md, \.rst"):
        read_text(tmp_path)
    with pytest.raises(MsltError, match="no such file or folder"):
        read_text(tmp_path / "nowhere")


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/deep/c.txt", "Linked.")
    write(tmp_path / "root/b.txt", "Plain.")
    (tmp_path / "root/a").mkdir()
    (tmp_path / "root/a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere/self").symlink_to("self")
    (tmp_path / "root/z").symlink_to(tmp_path / "elsewhere/deep")
    parts = text.list_parts(FileSource(kind="text", path=str(tmp_path / "root")))
    assert [part.name for part in parts] == ["b.txt", "z/c.txt"]  # each folder once, by the way seen first


def test_order_is_that_of_relative_paths(tmp_path: Path) -> None:
    names = ["a-b/x.txt", "a.txt", "a/x.txt", "a/z/y.txt", "b.txt"]
    for name in reversed(names):
        write(tmp_path / name, "x")
    parts = text.list_parts(FileSource(kind="text", path=str(tmp_path)))
    assert [part.name for part in parts] == names


@pytest.mark.parametrize("kind", [text, python_docs])
def test_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "locked/b.txt", "x")

    def scan(path: str, scan: Any = os.scandir) -> Any:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", scan)  # root, who runs the tests in a container, can read all
    with pytest.raises(MsltError, match=r"locked: cannot be read \(Permission denied\)"):
        kind.list_parts(FileSource(kind="python_docs", path=str(tmp_path)))


def test_files_passed_over_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.txt", "x")
    write(tmp_path / ".hidden", "x")
    read_text(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "b/wiki_00.gz", "x")
    read_text(tmp_path)
    assert capsys.readouterr().err == (
        f"{tmp_path}: 2 files passed over (b/wiki_00.gz, gone.txt); read are .txt, .md, .rst\n"
    )
    write(tmp_path / "c.pdf", "x")
    write(tmp_path / "d.xml.7z", "x")
    read_text(tmp_path)
    assert "4 files passed over (b/wiki_00.gz, c.pdf, d.xml.7z, …); read are" in capsys.readouterr().err
    read_text(tmp_path / "a.txt")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "pack"), [("a.txt.gz", gzip.compress), ("a.BZ2", bz2.compress)])
def test_packed_files_are_opened_and_damaged_ones_named(tmp_path: Path, name: str, pack: Any) -> None:
    packed = pack("".join(f"Line {n}.\n" for n in range(10_000)).encode())
    with text.open_file(write(tmp_path / name, packed)) as file:
        assert [line.raw for line in text.read_lines(file, 0)][:2] == [b"Line 0.\n", b"Line 1.\n"]
    for raw in (packed[:-100], b"not packed", packed[:1000] + b"\xff" * 99 + packed[1099:]):
        path = write(tmp_path / name, raw)
        with (
            pytest.raises(MsltError, match=rf"{name}: damaged or cut short.*fetch it again"),
            text.open_file(path) as f,
        ):
            f.read()
    with (
        pytest.raises(MsltError, match=rf"no{name}: cannot be read \(No such file"),
        text.open_file(tmp_path / f"no{name}"),
    ):
        pass


@pytest.mark.parametrize("kind", ["text", "lines", "wikipedia", "books", "python_docs"])
def test_column_of_a_kind_that_has_none_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"column is for json and parquet; leave it out with {kind}"):
        FileSource(kind=kind, path="x", column="text")  # type: ignore[arg-type]


def test_long_file_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"Paragraph {number} of a long book." for number in range(2000)]
    path = write(tmp_path / "book.txt", "\n\n".join(lines))
    documents = read_text(path)
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
    assert found[0]
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
    assert document.text == "It does things with spam, and it does them well.\nSay something nice to everybody."
    assert len(document.text) < document.num_bytes < len(source)


def test_topics_are_documents_and_tests_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "test/test_x.py", "")
    write(tmp_path / "site-packages/x.py", "")
    write(tmp_path / "pydoc_data/topics.py", "topics = {'b': 'Beta is the second letter.', 'a': ''}\n")
    assert read(python_docs, FileSource(kind="python_docs", path=str(tmp_path))) == [
        Document("", 0, "empty"),
        Document("Beta is the second letter.", 26),
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
