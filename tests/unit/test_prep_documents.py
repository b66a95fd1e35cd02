"""Sources to documents: what each reader keeps, and what it refuses."""

import os
from pathlib import Path

import pytest

from data_prep import books, python_docs, text, wikipedia
from data_prep.documents import list_files, read_documents
from data_prep.recipe import Source
from data_prep.sentences import split_quotation, split_sentences
from mslt.errors import MsltError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "\ufeffOne\r\ntwo.\r\n\r\n\r\nThree.")
    write(tmp_path / "a/c.md", "Deep.")
    write(tmp_path / "a/picture.png", b"\x89PNG\0")
    write(tmp_path / ".git/notes.txt", "hidden")
    listed = list_files(Source(kind="text", path=str(tmp_path)))
    assert listed.names == ["a/c.md", "b.txt"]
    documents = [
        read
        for file, name in zip(listed.files, listed.names, strict=True)
        for read in read_documents(listed.source, file, name)
    ]
    assert documents == [("a/c.md", "Deep."), ("b.txt", "One two.\nThree.")]
    assert list_files(Source(kind="text", path=str(tmp_path), limit=1)).names == ["a/c.md"]
    assert list_files(Source(kind="text", path=str(tmp_path / "b.txt"))).names == ["b.txt"]


@pytest.mark.parametrize(("content", "said"), [(b"text\0more", "NUL"), (b"caf\xe9 \xff", "not UTF-8")])
def test_binary_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = write(tmp_path / "broken.txt", content)
    with pytest.raises(MsltError, match=f"broken.txt: .*{said}"):
        list(text.read_documents(path))


def test_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "only.pdf", "x")
    with pytest.raises(MsltError, match=r"read are \.txt, \.md, \.rst"):
        text.find_files(tmp_path)
    with pytest.raises(MsltError, match="wiki_00"):
        wikipedia.find_files(tmp_path)
    with pytest.raises(MsltError, match="no such file or folder"):
        text.find_files(tmp_path / "nowhere")


def test_long_file_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"Paragraph {number} of a long book." for number in range(2000)]
    path = write(tmp_path / "book.txt", "\n\n".join(lines))
    parts = list(text.read_documents(path))
    assert [name for name, _ in parts] == [f"part {number}" for number in range(1, len(parts) + 1)]
    assert len(parts) == 6
    assert "\n".join(part for _, part in parts).split("\n") == lines


PAGES = """<doc id="1" url="?curid=1" title="Empty">
Empty


</doc>
<doc id="2" url="?curid=2" title="A & B <">
A & B <

A and B () are letters &amp; more <ref name="x">. They are old.
Early life.
! colspan="13" style="background:#DCDCDC" | Goalkeepers
Both were born in Berlin in 1901 (, ) or later.

</doc>
<doc id="3" url="?curid=3" title="Cut">
Cut

The file ends here.
"""


def test_wikipedia_pages(tmp_path: Path) -> None:
    path = write(tmp_path / "AA/wiki_00", PAGES)
    assert wikipedia.find_files(tmp_path) == [path]
    assert list(wikipedia.read_documents(path)) == [
        ("1", ""),
        ("2", "A and B are letters & more . They are old.\nBoth were born in Berlin in 1901 or later."),
        ("3", ""),
    ]


def test_wikitext_is_not_wikiextractor_output(tmp_path: Path) -> None:
    path = write(tmp_path / "wiki_00", "<mediawiki>\n<page>")
    with pytest.raises(MsltError, match=r"wiki_00.*run it over the dump"):
        list(wikipedia.read_documents(path))


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
def test_book_loses_licence_and_credits(header: str, footer: str) -> None:
    body = BODY + "Filler.\n\n" * 100
    expected = ["CHAPTER I.", "It was a dark night.", "He said: snake_case_name.", *["Filler."] * 100]
    assert books.clean_book(header + body + footer).split("\n") == expected


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
    assert [t.split("\n") for _, t in python_docs.read_documents(path)] == [
        ["It does things with spam, and it does them well.", "Say something nice to everybody."]
    ]


def test_topics_are_documents_and_tests_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "test/test_x.py", "")
    write(tmp_path / "site-packages/x.py", "")
    path = write(tmp_path / "pydoc_data/topics.py", "topics = {'b': 'Beta is the second letter.', 'a': ''}\n")
    assert python_docs.find_files(tmp_path) == [path]
    assert list(python_docs.read_documents(path)) == [("a", ""), ("b", "Beta is the second letter.")]


def test_sentences() -> None:
    assert split_sentences('"Did he?" she asked. Mrs. Bennet left at 5 p.m. on Monday.\n* * *\nThe end') == [
        '"Did he?" she asked.',
        "Mrs. Bennet left at 5 p.m. on Monday.",
        "The end",
    ]


def test_long_quotation_is_split_and_loses_nothing() -> None:
    quotation = "“" + "I have not much to say. " * 20 + "He asked, “Why?” Then he left.” She wept."
    assert len(split_sentences(quotation)) > 20
    assert "".join(split_quotation(quotation)) == quotation


@pytest.mark.skipif(
    "MSLT_TEST_DATA" not in os.environ, reason="MSLT_TEST_DATA names no folder with wikipedia and books"
)
def test_real_text() -> None:
    root = Path(os.environ["MSLT_TEST_DATA"])
    pages = [t for _, t in wikipedia.read_documents(wikipedia.find_files(root / "wikipedia/extracted")[0])]
    assert 0 < sum(map(bool, pages)) < len(pages)
    assert not any("<" in page and "</" in page for page in pages)
    for path in books.find_files(root / "books")[::10]:
        (_, book), size = next(books.read_documents(path)), path.stat().st_size
        assert 0.7 * size < len(book.encode()) < size
        assert "END OF THIS PROJECT GUTENBERG" not in book
        assert "".join(book.split("\n")) != ""
        for line in book.split("\n"):
            assert "".join(split_quotation(line)) == line
