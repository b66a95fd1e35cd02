"""Books: the licence off, encodings, and where real books are cut into chapters."""

import gzip
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import books
from data_prep.documents import Document
from data_prep.recipe import FileSource
from mslt.errors import MsltError

PROSE = "It was a dark night, and nobody in the village thought of sleeping before the\nwind went down at last. " * 12
JOINED = " ".join(PROSE.split())
START = "*** START OF THE PROJECT GUTENBERG EBOOK X ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK X ***"


def read(path: Path) -> list[Document]:
    source = FileSource(kind="books", path=str(path))
    return [document for part in books.list_parts(source) for document in books.read_part(source, part)]


def read_text(tmp_path: Path, content: str | bytes) -> list[Document]:
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / "book.txt").write_bytes(raw)
    documents = read(tmp_path / "book.txt")
    assert sum(document.num_bytes for document in documents) == len(raw)
    return documents


def chapters(tmp_path: Path, *headings: str, before: str = "") -> list[Document]:
    """A book with these headings, and prose under each."""
    return read_text(tmp_path, before + "".join(f"\n\n\n{heading}\n\n{PROSE}" for heading in headings))


CREDITS = "\n\nProduced by A. Volunteer and\nothers\n\n"
BODY = CREDITS + "CHAPTER I.\n\nIt was a _dark_\nnight.\n\nHe said:\nsnake_case_name.\n\n"
OLD_HEADER = "***START**THE SMALL PRINT!**START***\nlegal\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04*END*"


@pytest.mark.parametrize(
    ("header", "footer"),
    [
        ("Title\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***", "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nL"),
        (
            "T\n***START OF THE PROJECT GUTENBERG EBOOK X\nAND Y***",
            "End of the Project Gutenberg EBook of X\n\n***END OF",
        ),
        (OLD_HEADER, "End of Project Gutenberg Etext X"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_licence_is_dropped_and_counted(tmp_path: Path, header: str, footer: str, line_end: str) -> None:
    text = header + BODY + "Filler.\n\n" * 100 + footer
    documents = read_text(tmp_path, text.replace("\n", line_end))
    expected = ["CHAPTER I.", "It was a dark night.", "He said: snake_case_name.", *["Filler."] * 100]
    assert [document.text.split("\n") for document in documents if not document.dropped] == [expected]
    dropped = [document.dropped for document in documents]
    assert dropped == (["licence", "", "licence"] if header else [""])


@pytest.mark.parametrize(
    "headings",
    [
        ("CHAPTER I.", "CHAPTER II.", "CHAPTER III."),
        ("Chapter 1", "Chapter 2"),
        ("Chapter 12. A Title", "Chapter 13. Another"),
        ("CHAPTER I--A STRANGE SAIL", "CHAPTER II.--THE FRIGATE."),
        ("CHAPTER I—TWO BROTHERS", "CHAPTER II—AN\nAMBUSH"),
        ("CHAPTER TWENTY-FIRST.", "CHAPTER THE LAST"),
        ("CHAPTER ONE\n\nA TITLE IN CAPITALS", "CHAPTER TWO\n\nANOTHER ONE"),
        ("Chapter I\nThe Period", "Chapter II\nThe Mail"),
        ("Book the First", "Book the Second"),
        ("BOOK SECOND. LITTLE AGGIE", "BOOK THIRD. MR. LONGDON"),
        ("ACT I\n\nSCENE I. London. The palace.", "SCENE II. A street.", "ACT II. PROLOGUE."),
        ("STAVE ONE.", "STAVE TWO."),
        ("LETTER 4", "LETTER V."),
        ("PREFACE", "INTRODUCTION.", "LECTURE I", "APPENDIX A", "INDEX"),
        ("I", "II", "III"),
        ("I. OLD MOODIE", "II. BLITHEDALE"),
        ("1.  Mount Munch", "2.  The Hawk"),
        ("THE GOLDEN BIRD", "HANS IN LUCK"),
        ("BOOK I\n\nCHAPTER I", "CHAPTER II", "BOOK II\n\nCHAPTER I"),
    ],
)
def test_headings_of_real_books_cut_chapters_and_are_left_out(tmp_path: Path, headings: tuple[str, ...]) -> None:
    found = chapters(tmp_path, *headings)
    assert [document.text for document in found] == [JOINED] * len(headings)


@pytest.mark.parametrize(
    "line",
    [
        "Part I of the letter was lost on the way,\nand nobody missed it.",
        "I am lost",
        "“CHAPTER!” he cried.",
        "1864",
        "Act well your part.",
        "Book of Hours, 53",
        "KING HENRY.",
    ],
)
def test_other_short_lines_cut_nothing(tmp_path: Path, line: str) -> None:
    found = chapters(tmp_path, "CHAPTER I", f"CHAPTER II\n\n{PROSE}\n\n{line}")
    assert len(found) == 2


def test_table_of_contents_is_no_chapter(tmp_path: Path) -> None:
    titles = [f"The {name} Story" for name in ("First", "Golden", "Long", "Lost", "Last")]
    contents = "CONTENTS\n\n" + "\n\n".join(f"CHAPTER {n}. {title}      {9 * n}" for n, title in enumerate(titles, 1))
    documents = chapters(tmp_path, *(f"CHAPTER {n}\n\n{t}" for n, t in enumerate(titles, 1)), before=contents)
    assert [document.text for document in documents] == [JOINED] * 5


def test_titles_listed_in_the_contents_cut_chapters(tmp_path: Path) -> None:
    contents = "Stories\n\nCONTENTS\n\n  Donkey Skin    1\n  The Goblin Pony    20\n  Prunella\n"
    _front, *found = chapters(tmp_path, "Donkey Skin", "The Goblin\nPony", "Prunella", before=contents)
    assert [document.text for document in found] == [JOINED] * 3


def test_front_matter_is_a_document_of_its_own(tmp_path: Path) -> None:
    text = "A TALE\n\nby Somebody\n\n\n" + f"CHAPTER I\n\n{PROSE}\n\nCHAPTER II\n\n{PROSE}"
    front, *rest = read_text(tmp_path, text)
    assert front.text == "A TALE\nby Somebody"
    assert len(rest) == 2


def test_book_without_chapters_is_one_document(tmp_path: Path) -> None:
    (document,) = read_text(tmp_path, f"{PROSE}\n\n{PROSE}")
    assert document.text == f"{JOINED}\n{JOINED}"


def test_stanza_is_a_paragraph(tmp_path: Path) -> None:
    (document,) = read_text(tmp_path, "  Tiger, tiger,\n    burning bright\n\n  In the forests\n    of the night,\n")
    assert document.text == "Tiger, tiger, burning bright\nIn the forests of the night,"


def test_page_numbers_pictures_and_index_are_left_out(tmp_path: Path) -> None:
    text = "[Pg 12]He went{13} on.\n\n[Illustration: The\n\nHouse]\n\nAchilles, 3, 19\nAjax, 7-9\n\nThe end."
    (document,) = read_text(tmp_path, text)
    assert document.text == "He went on.\nThe end."


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("“Café”".encode(), "“Café”"),
        ("\ufeff“Café”".encode(), "“Café”"),
        ("It is a “café”, he said.".encode("cp1252"), "It is a “café”, he said."),
        (b"Character set encoding: ISO-8859-1\n\n" + "é".encode("latin-1") * 9, "é" * 9),
        (b"Character set encoding: UTF-8\n\nA caf\xe9 in town", None),
        ("A “good” line, ".encode() + b"and a bad \xff one", None),
        (b"\xff\xd8\xff\xe0\x10JFIF", None),
        (b"NUL\0", None),
    ],
)
def test_encodings(tmp_path: Path, raw: bytes, text: str | None) -> None:
    (document,) = read_text(tmp_path, raw)
    assert document.dropped == ("" if text else "damaged")
    assert document.text.endswith(text or "")


def test_empty_book_is_counted(tmp_path: Path) -> None:
    assert [document.dropped for document in read_text(tmp_path, "")] == ["empty"]
    assert [document.dropped for document in read_text(tmp_path, "\n \n")] == ["empty"]


def test_oversized_book_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "MAX_BOOK_BYTES", 100)
    assert read_text(tmp_path, "a" * 101) == [Document("", 101, "oversized")]
    assert not read_text(tmp_path, "a" * 100)[0].dropped


def test_packed_books_are_read_and_damaged_ones_named(tmp_path: Path) -> None:
    text = f"CHAPTER I\n\n{PROSE}\n\nCHAPTER II\n\n{PROSE}"
    packed = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(packed)
    (tmp_path / "b.epub.txt").write_text(text)
    found = read(tmp_path)
    assert [document.text for document in found] == [JOINED] * 4
    assert sum(document.num_bytes for document in found) == 2 * len(text)
    for broken in (packed[:-20], b"no gzip", packed[:12] + b"\xff\xff" + packed[14:]):
        (tmp_path / "a.txt.gz").write_bytes(broken)
        with pytest.raises(MsltError, match=r"a\.txt\.gz: damaged or cut short.*fetch it again"):
            read(tmp_path)


HOSTILE = {
    "pictures": "[Illustration " * 56_000,
    "notes": "[Transcriber's Note " * 40_000,
    "electronic version": "<<THIS ELECTRONIC VERSION " * 30_000,
    "italics": "_a " * 130_000,
    "credits": "Produced " * 44_000,
    "small print": "*SMALL PRINT! FOR " + "*" * 400_000 + "x\n" + "a\n" * 250_000,
    "start": "*** START OF THE PROJECT GUTENBERG ** " * 10_000,
    "gap before a page": "a" + " " * 400_000 + "x1",
    "dots before a page": "a 1\n" + "." * 400_000 + "x1",
    "pages": "1, " * 130_000 + "a1",
    "contents with a gap": "CONTENTS\na" + " " * 400_000 + "q",
    "contents with pages": "CONTENTS\n" + "1, " * 130_000 + "a1",
    "chapter": "CHAPTER" + " " * 400_000 + "x",
    "numeral": "I" * 400_000,
    "chapters": "CHAPTER I\n\n" * 12_000,
    "blank lines": " \n" * 200_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_grows_no_faster_than_the_book(name: str) -> None:
    lines = HOSTILE[name].splitlines(keepends=True)
    start = time.process_time()
    pieces = list(books.cut_book(lines))
    assert time.process_time() - start < 5  # the slowest takes 0.4 s; with the square of the length, 20 s or more
    assert pieces[-1].end == len(lines)


LINES = st.sampled_from(
    [
        "CHAPTER I",
        "CHAPTER II.",
        "I.",
        "II",
        "CONTENTS",
        "",
        "",
        "",
        PROSE,
        "A TITLE",
        "Index, 12",
        START,
        END,
        "[Illustration",
        "x",
    ]
)


@settings(derandomize=True, deadline=None)
@given(st.lists(LINES, max_size=30), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["utf-8", "utf-8-sig"]))
def test_every_byte_is_counted_and_every_word_is_where_it_was(lines: list[str], line_end: str, encoding: str) -> None:
    text = line_end.join(lines)
    pieces = list(books.cut_book(text.replace(line_end, "\n").splitlines(keepends=True)))
    assert all(a.end == b.start for a, b in pairwise(pieces))
    words = iter(text.split())
    assert all(word in words for piece in pieces for word in (piece.text or "").split())
    assert (pieces[0].start if pieces else 0) == 0


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    read_text(tmp_path_factory.getbasetemp(), raw)


@pytest.mark.skipif("MSLT_TEST_DATA" not in os.environ, reason="MSLT_TEST_DATA names no folder with books")
def test_real_books() -> None:
    source = FileSource(kind="books", path=str(Path(os.environ["MSLT_TEST_DATA"]) / "books"))
    parts = books.list_parts(source)
    expected = {"austen-mansfield-park": 48, "dickens-a-tale-of-two-cities": 45, "london-the-call-of-the-wild": 7}
    for part in parts[::12] + [part for part in parts if part.name.removesuffix(".txt") in expected]:
        found = list(books.read_part(source, part))
        assert sum(document.num_bytes for document in found) == part.size_bytes
        kept = [document for document in found if not document.dropped]
        assert 0.7 * part.size_bytes < sum(len(document.text.encode()) for document in kept) < part.size_bytes
        # Beside the chapters, there is the front.
        assert len(kept) == expected.get(part.name.removesuffix(".txt"), len(kept) - 1) + 1
        assert not any("PROJECT GUTENBERG EBOOK" in document.text.upper() for document in kept)
