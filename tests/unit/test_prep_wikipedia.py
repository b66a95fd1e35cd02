"""Wikipedia: what is left of wikitext, that dumps read the same however they are cut, and what damage is counted as."""

import bz2
import gzip
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import wikipedia
from data_prep.documents import Document
from data_prep.recipe import FileSource
from data_prep.text import one_a_line
from data_prep.wikiextractor import clean_line
from data_prep.wikitext import MAX_TOKENS, MAX_TOKENS_BY_LENGTH, strip
from mslt.errors import MsltError


def source_of(path: Path, max_files: int | None = None) -> FileSource:
    return FileSource(kind="wikipedia", path=str(path), max_files=max_files)


def read_all(path: Path) -> list[Document]:
    source = source_of(path)
    return [document for part in wikipedia.list_parts(source) for document in wikipedia.read_part(source, part)]


# Wikitext


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("One\nline.\n\nTwo.", "One line.\nTwo."),
        ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
        ("''Eagle'''s stage", "Eagle's stage"),
        ("a [[link]], [[the target|its text]], [[Berlin]]ers, [[:Category:X|C]]", "a link, its text, Berliners, C"),
        ("[[File:A.jpg|thumb|A [[caption]] {{with}} [[more]].]]Text.", "Text."),
        ("[[Datei:Bild.png|mini|Text]][[Category:A]][[Kategorie:B]][[de:Haus]][[zh-min-nan:X]]Text.", "Text."),
        ("A<!-- [[x]] {{ --> B<ref>{{cite|a}}</ref> C<ref name='x' /> D<REF name=\"a\">{{</REF>.", "A B C D."),
        ("{{Infobox\n| a = {{b|[[c|d]]}}\n| e = {|\n| f\n|}\n}}\nText.", "Text."),
        ("Before.\n{| class='x'\n! a\n|-\n| b\n{|\n| nested\n|}\n|}\nAfter.", "Before.\nAfter."),
        ("<table><tr><td>x</td></tr></table>Text.", "Text."),
        ("x <math>{{a_{b}}}</math> y<gallery>\nA.jpg|b\n</gallery><timeline>q</timeline><score>r</score>", "x y"),
        ("<syntaxhighlight lang='c'>{{ [[ </syntaxhighlight><pre>x</pre>T", "T"),
        ("literal <nowiki>[[x]] ''y'' &lt; <ref></nowiki>", "literal [[x]] ''y'' < <ref>"),
        ("AT&amp;T &ndash; 5&nbsp;km &amp;lt; &#91;sic&#93;", "AT&T – 5 km &lt; [sic]"),
        ("[http://a.org Its title] and [http://a.org] or http://a.org", "Its title and or"),
        ("H<sub>2</sub>O <span style='a'>b</span><br />c <code>d</code>", "H2O b c d"),
        ("One<p>Two</p><blockquote>Three</blockquote>", "One\nTwo\nThree"),
        ("In:\n* one\n** ''two''\n# three\n; term : why\n: in\nEnd", "In:\none\ntwo\nthree\nterm : why\nin\nEnd"),
        ("__NOTOC__\n----\nText.", "Text."),
        ("A.\n== ''Early'' life ==\nB.\n=== Empty ===\n{{x}}\n== Next ==\nC.", "A.\nEarly life\nB.\nNext\nC."),
        ("A.\n== See also ==\n* x\n=== Sub ===\ny\n==B==\nC.\n== References ==\n{{reflist}}\n* d", "A.\nB\nC."),
        ("A.\n== Notes and references==\n* x\n== Einzelnachweise ==\ny", "A."),
        ("X ({{IPA-en|x}}; {{audio|y}}; born 1901) and ( , ) or [ ], so {{y}}.", "X (born 1901) and or, so."),
        ("sounds {{x}}, {{y}}, {{z}}.", "sounds,."),
        ("{{Unclosed infobox\n| a = b\n| c = d\nText.", "Text."),
        ("Text [[unclosed link and\n\nmore }} ]] text.", "Text unclosed link and\nmore text."),
        ("[[File:A.jpg|thumb|never closed\nText.", "Text."),
        ("{| unclosed\n| a\n! b\nText.", "Text."),
        ("Text<ref>never closed. More <b>text.", "Textnever closed. More text."),
        ("Text<!-- never closed", "Text"),
        ("{{{parameter|default}}}{{x|{{{y}}}}}{{{{{1}}}}}Text.", "Text."),
        ("&#" + "9" * 5000 + ";Text&#0;", "\ufffdText\ufffd"),
        ("&#&#12345678;" + "9" * 5000, "&#\ufffd" + "9" * 5000),
        ("{{as of|2007|" + "0" * 5000 + "5}}.", "As of May 2007."),
        ("{{nowrap|" * 90 + "deep" + "}}" * 90 + "{{a|" * 500 + "x" + "}}" * 500 + ".", "deep."),
        ("[[:de:Haus]] [[#Section]] [[Java (island)|]] [[:File:A.jpg]]", "de:Haus Section Java File:A.jpg"),
        ("", ""),
        ("{{x}}\n*\n.\n", ""),
    ],
)  # fmt: skip
def test_strip(wikitext: str, text: str) -> None:
    assert strip(wikitext) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{lang|fr|le ''mot''}}", "le mot"),
        ("{{Lang-ru|Москва}}", "Москва"),
        ("{{transl|ru|Moskva}}", "Moskva"),
        ("{{nowrap|5 {{small|km}}}}", "5 km"),
        ("{{nowrap|1=a = b}}", "a = b"),
        ("{{convert|5|km}}", "5 km"),
        ("{{convert|5|km|mi|abbr=on}}", "5 km"),
        ("{{convert|5|to|10|km|mi}}", "5 to 10 km"),
        ("{{convert|60|-|80|kg}}", "60–80 kg"),
        ("{{Convert|6|ft|2|in|m}}", "6 ft 2 in"),
        ("{{frac|1|2}} {{frac|3|1|2}}", "1/2 3 1/2"),
        ("{{circa|1900}} {{c.}}", "c. 1900 c."),
        ("{{As of|2007|5}}, {{as of|2007|lc=y}}, {{as of|2001|alt=then}}", "As of May 2007, as of 2007, then"),
        ("1{{ndash}}2{{snd}}3{{nbsp}}4", "1–2 – 3 4"),
        ("{{chem|H|2|O}}", "H2O"),
        ("{{val|5|u=km}}", "5 km"),
        ("{{nihongo|Tokyo|東京|Tōkyō}}", "Tokyo (東京, Tōkyō)"),
        ("{{USS|Enterprise|CV-6}}", "USS Enterprise"),
        ("He said:{{quote|Go.|A man}}Then", "He said:\nGo.\nThen"),
        ("{{unknown|text}}{{coord|1|N|2|E}}", ""),
    ],
)
def test_templates_that_belong_in_a_sentence(template: str, text: str) -> None:
    assert strip(template) == text


FRAGMENTS = [
    "{{",
    "}}",
    "{{{",
    "[[",
    "]]",
    "|",
    "{|",
    "|}",
    "\n",
    "'''",
    "''",
    "<ref>",
    "</ref>",
    "<ref",
    "<!--",
    "-->",
]
FRAGMENTS += [
    "<b>",
    "</b>",
    "<math>",
    "</math>",
    "<nowiki>",
    "</nowiki>",
    "&lt;",
    "&#0;",
    "http://a",
    "[http://a b",
    "]",
]
FRAGMENTS += ["=", "== A ==", "== Notes ==", "* ", ":", "(", ")", ",", ";", "File:", "convert", "word", " ", "é", "\0"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join) | st.text())
def test_strip_never_fails_and_gives_paragraphs(wikitext: str) -> None:
    text = strip(wikitext)
    assert text == one_a_line(text.split("\n"))
    assert all(re.search(r"\w", line) for line in text.split("\n") if text)


WORD = st.text("abcdefgh", min_size=1, max_size=5)
INLINE = st.recursive(
    WORD,
    lambda inner: st.one_of(
        st.builds("{0} {1}".format, inner, inner),
        st.builds("[[{0}]]".format, WORD),
        st.builds("[[{0}|{1}]]".format, WORD, inner),
        st.builds("[[File:{0}.jpg|thumb|{1}]]".format, WORD, inner),
        st.builds("{{{{x{0}|a={1}\n|{1}}}}}".format, WORD, inner),
        st.builds("{{{{nowrap|{0}}}}}".format, inner),
        st.builds("<ref name={0}>{1}</ref>".format, WORD, WORD),
        st.builds("<!-- {0} -->".format, WORD),
        st.builds("<span class='a'>{0}</span>".format, inner),
    ),
    max_leaves=12,
)
BLOCK = st.one_of(
    INLINE,
    INLINE.map("* {}".format),
    INLINE.map("== {} ==".format),
    INLINE.map("{{| class=a\n! b\n|-\n| {}\n|}}".format),
)


@settings(deadline=None)
@given(st.lists(BLOCK, max_size=5), WORD)
def test_no_well_formed_markup_is_left(blocks: list[str], word: str) -> None:
    text = strip("\n\n".join([*blocks, f"The last ''{word}''."]))
    assert not re.search(r"\{\{|\}\}|\[\[|\]\]|<|\||\{|\}|==|thumb", text)
    assert text.split("\n")[-1] == f"The last {word}."


N = 400_000  # characters; a page of Wikipedia has up to 2,000,000 bytes
# A pattern may be fast on words, and slow on one long run without a space.
UNITS = ["{{", "{{{", "{{a|", "[[", "[[a|", "{{[[", "{|\n", "<ref>", "<ref a", "<!--", "<b>", "<div", "<b>x", "<b a='"]
UNITS += [
    "'",
    "'''",
    "[http://a",
    "http:",
    "://",
    "a:",
    "<:",
    "a.",
    "<i>''[http://a'''",
    "= a =\n",
    "=",
    "(",
    "(,",
    ",",
]
UNITS += [
    "*",
    "\n*",
    "_",
    "__A",
    "-",
    "&",
    "&#1",
    "&a",
    "|",
    "|a",
    "style",
    "formula_1",
    "[",
    "|}",
    "<nowiki>",
    "x",
    "é",
]
REPEATED = {
    **{f"{unit!r}": unit * (N // len(unit)) for unit in UNITS},
    **{f"{unit!r}, spaced": f"{unit} " * (N // (len(unit) + 1)) for unit in UNITS},
    **{f"{unit!r} in a tag": "<b>" + unit * (N // len(unit)) + "x" for unit in UNITS},
    **{f"{unit!r} after many tags": "<b>" * 2 * MAX_TOKENS + unit * (N // len(unit)) + "x" for unit in UNITS},
}
PATHOLOGICAL = {
    "closed templates": "{{a|" * 65_000 + "}}" * 65_000,
    "kept templates": "{{nowrap|" * 35_000 + "x" + "}}" * 35_000,
    "long kept templates": "{{nowrap|" * 20_000 + "x" * 1_000_000 + "}}" * 20_000,
    "long links": "[[a|" * 20_000 + "x" * 1_000_000 + "]]" * 20_000,
    "closed links": "[[a|" * 65_000 + "x" + "]]" * 65_000,
    "crossed": "{{[[" * 50_000 + "}}]]" * 50_000,
    "unmatched": "{{" + "[[" * 100_000 + "}}" * 100_000,
    "spaces in brackets": "a (" + " " * N + "b" + ", " * N + ")",
    "spaces in a link": "<b>" * 2 * MAX_TOKENS + "[" + " " * N + "x",
    "brackets": "(" * N + ")" * N,
    "lists": "*" * N + "\n*" * N,
    "digits": "&#" + "9" * N,
    "a long number": "codice_" + "1" * N + "x",
}


@pytest.mark.parametrize("name", [*REPEATED, *PATHOLOGICAL])
def test_no_input_makes_it_slow_or_deep(name: str) -> None:
    for clean in (strip, clean_line):
        start = time.process_time()
        clean((REPEATED | PATHOLOGICAL)[name])
        assert time.process_time() - start < 4  # most take some hundredths; quadratic ones would take minutes


def test_most_markup_that_is_parsed_makes_it_not_slow() -> None:
    """The worst that mwparserfromhell is given: tags never closed, as many and in paragraphs as long as it may see."""
    length = MAX_TOKENS_BY_LENGTH // MAX_TOKENS - 10
    paragraph = "<b>" * MAX_TOKENS + ":~" * ((length - 3 * MAX_TOKENS) // 2) + "\n\n"
    start = time.process_time()
    strip(paragraph * (N // len(paragraph)))
    assert time.process_time() - start < 20


# Dumps


HEADER = '<mediawiki xml:lang="en">\n  <siteinfo>\n    <sitename>Wikipedia</sitename>\n  </siteinfo>\n'


def page(page_id: int, text: str, namespace: int = 0, more: str = "") -> str:
    return (
        f"  <page>\n    <title>T{page_id}</title>\n    <ns>{namespace}</ns>\n    <id>{page_id}</id>\n{more}"
        f"    <revision>\n      <id>1{page_id}</id>\n"
        f'      <text xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    )


def make_pages(seed: int, num_pages: int) -> list[str]:
    draw = random.Random(seed)
    words = ["one", "zwei", "três", "四", "''five''", "[[six]]", "&", "<b>x</b>", "<page>", "</page>"]
    return [page(i, " ".join(draw.choices(words, k=draw.randrange(1, 40)))) for i in range(1, num_pages + 1)]


def write_dump(path: Path, pages: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = (HEADER + "".join(pages) + "</mediawiki>\n").encode()
    packed = bz2.compress(whole) if path.suffix == ".bz2" else gzip.compress(whole) if path.suffix == ".gz" else whole
    path.write_bytes(packed)
    return path


def test_pages_become_documents_and_every_one_is_counted(tmp_path: Path) -> None:
    old = "<revision><id>5</id><text>old</text></revision>\n"
    path = write_dump(
        tmp_path / "wiki.xml",
        [
            page(1, "Größe & ''more''."),
            page(2, "See [[there]].", more='<redirect title="there" />'),
            page(3, "#REDIRECT [[there]]"),
            page(4, "Talk.", namespace=1),
            page(5, ""),
            page(6, "{{only a template}}"),
            page(7, "New.", more=old),
            "<page><ns>0</ns><id>8</id><revision><text deleted='deleted' /></revision></page>",
        ],
    )
    assert read_all(path) == [
        Document("Größe & more.", 19),
        Document("", 14, "redirect"),
        Document("", 19, "redirect"),
        Document("", 5, "other_namespace"),
        Document("", 0, "empty"),
        Document("", 19, "empty"),
        Document("New.", 4),
        Document("", 0, "empty"),
    ]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;">]>'


@pytest.mark.parametrize(
    "block",
    [
        b"<page><id>7</id><revision><text>caf\xe9</text></revision></page>",
        b"<page><id>7</id><revision><text>a\0b</text></revision></page>",
        b"<page><id>7</id><revision><text>&b;</text></revision></page>",
        b"<page><id>7</id>" + BOMB.encode() + b"<text>&b;</text></page>",
        b"<page><id>7</id><revision><text>x</revision></page>",
        b"<page><id>7</id><revision><text>never closed",
    ],
)
@pytest.mark.parametrize("following", ["", page(9, "Whole.").strip()])
def test_damaged_page_is_counted_and_the_next_is_read(tmp_path: Path, block: bytes, following: str) -> None:
    path = tmp_path / "x.xml"
    path.write_bytes(BOMB.encode() + b"<mediawiki>" + block + f"{following}</mediawiki>".encode())
    assert read_all(path) == [Document("", len(block), "damaged"), Document("Whole.", 6)][: 2 if following else 1]


@pytest.mark.parametrize("closed", [True, False])
def test_oversized_page_is_dropped_without_being_held(
    tmp_path: Path, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wikipedia, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(wikipedia, "CHUNK_BYTES", 200)
    huge = page(1, "x" * 50_000).strip()
    huge = huge if closed else huge.removesuffix("</page>")
    path = write_dump(tmp_path / "x.xml", [huge, page(2, "Small.").strip()])
    assert read_all(path) == [Document("", len(huge), "oversized"), Document("Small.", 6)]
    chunks = wikipedia.read_chunks(path, 0, path.stat().st_size)
    assert [sum(map(len, block.pieces)) < 1000 for block in wikipedia.split_pages(chunks)] == [True, True]


def test_dump_gives_the_same_pages_however_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dump(tmp_path / "x.xml", make_pages(1, 40))
    whole = read_all(path)
    assert len(whole) == 40
    assert all(document.text for document in whole)
    for size in [64, 101, 1000, 1001, 1002, 1003, 5000]:
        monkeypatch.setattr(wikipedia, "PART_BYTES", size)
        assert len(wikipedia.list_parts(source_of(path))) == -(-path.stat().st_size // size)
        assert read_all(path) == whole


CONTENT = b"<mediawiki junk</page> <page>aa</page>  <page>never closed <page>b</page><page></page>\n</mediawiki>\n "


def read_in_parts(content: bytes, cuts: list[int], reads: list[int]) -> tuple[list[wikipedia.Block], bool]:
    """The pages of all parts, which end at `cuts`, and whether all were whole. Bytes come in pieces up to `reads`."""

    def chunks(start: int, end: int) -> Iterator[wikipedia.Chunk]:
        bounds = sorted({start, end, len(content), *(position for position in reads if position > start)})
        for first, last in pairwise(bounds):
            yield wikipedia.Chunk(first < end, content[first:last])

    def blocks(start: int, end: int) -> Iterator[wikipedia.Block]:
        ends.append((yield from wikipedia.split_pages(chunks(start, end))))

    ends: list[bool] = []
    bounds = sorted({0, len(content), *cuts})
    return [block for start, end in pairwise(bounds) for block in blocks(start, end)], all(ends)


POSITIONS = st.lists(st.integers(0, len(CONTENT)))


@given(POSITIONS, POSITIONS)
def test_every_page_belongs_to_one_part(cuts: list[int], reads: list[int]) -> None:
    blocks, is_whole = read_in_parts(CONTENT, cuts, reads)
    pages = [
        (b"<page>aa</page>", ""),
        (b"<page>never closed ", "damaged"),
        (b"<page>b</page>", ""),
        (b"<page></page>", ""),
    ]
    assert [(b"".join(block.pieces), block.num_bytes, block.problem) for block in blocks] == [
        (raw, len(raw), problem) for raw, problem in pages
    ]
    assert is_whole


@given(st.integers(len(b"<mediawiki"), len(CONTENT)), POSITIONS, POSITIONS)
def test_dump_that_is_cut_short_is_not_taken_for_whole(size: int, cuts: list[int], reads: list[int]) -> None:
    """Wherever it is cut short, and however its parts are cut."""
    content = CONTENT[:size]
    _, is_whole = read_in_parts(content, [min(cut, size) for cut in cuts], [min(read, size) for read in reads])
    assert is_whole == (b"</mediawiki>" in content)


@pytest.mark.parametrize("part_bytes", [50, 500, 2**20])
@pytest.mark.parametrize("suffix", [".xml", ".xml.gz", ".xml.bz2"])
def test_dump_that_is_cut_short_is_refused(
    tmp_path: Path, suffix: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-page, between pages, after the last; a .bz2 where a stream ends."""
    monkeypatch.setattr(wikipedia, "PART_BYTES", part_bytes)
    monkeypatch.setattr(wikipedia, "PACKED_PART_BYTES", part_bytes)
    content = (HEADER + "".join(make_pages(5, 12)) + "</mediawiki>\n").encode()
    ends = [match.end() for match in re.finditer(rb"</page>\n", content)]
    path = tmp_path / f"x{suffix}"
    for size in [len(HEADER), ends[4] - 50, ends[4], ends[-1], len(content)]:
        if suffix == ".xml.bz2":
            write_streams(path, content[:size], [end for end in [len(HEADER), *ends[::2], ends[-1]] if end < size])
        else:
            path.write_bytes(gzip.compress(content[:size]) if suffix == ".xml.gz" else content[:size])
        if size == len(content):
            assert len(read_all(path)) == 12
        else:
            with pytest.raises(MsltError, match=rf"x{suffix}: it is cut short: no </mediawiki> .*; download it again"):
                read_all(path)


def test_dump_that_is_cut_short_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikipedia, "PART_BYTES", 1000)
    path = tmp_path / "x.xml"
    path.write_text(HEADER + "".join(make_pages(5, 12)))
    with pytest.raises(MsltError, match="cut short"):
        wikipedia.list_parts(source_of(path))


@pytest.mark.parametrize("suffix", [".xml", ".xml.gz", ".xml.bz2"])
def test_large_dump_for_one_core_is_said(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dump(tmp_path / f"x{suffix}", make_pages(6, 10))
    wikipedia.list_parts(source_of(path))
    monkeypatch.setattr(wikipedia, "PART_BYTES", 1000)
    assert not capsys.readouterr().err
    monkeypatch.setattr(wikipedia, "ONE_CORE_BYTES", 100)
    wikipedia.list_parts(source_of(path))
    said = capsys.readouterr().err
    assert said.count("\n") == (suffix != ".xml")
    assert suffix == ".xml" or re.search(rf"warning: .*/x{suffix}: .* one core.*multistream", said)


def write_streams(path: Path, content: bytes, cuts: list[int]) -> Path:
    """A .bz2 with a stream for each piece; some of them empty."""
    bounds = sorted([0, len(content), *cuts])
    pieces = [content[first:last] for first, last in pairwise(bounds)]
    path.write_bytes(b"".join(bz2.compress(piece) for piece in pieces))
    return path


@pytest.mark.parametrize("aligned", [True, False])
def test_multistream_dump_gives_what_one_stream_gives(
    tmp_path: Path, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_dump(tmp_path / "one/x.xml.bz2", make_pages(2, 60))
    assert len(wikipedia.list_parts(source_of(one))) == 1
    content = bz2.decompress(one.read_bytes())
    starts = [match.start() for match in re.finditer(rb" *<page>\n", content)]
    cuts = starts[::5] if aligned else [*range(0, len(content), 97), 0, 97]
    many = write_streams(tmp_path / "x.xml.bz2", content, cuts)
    for size in [1, 500, 2000]:
        monkeypatch.setattr(wikipedia, "PACKED_PART_BYTES", size)
        parts = wikipedia.list_parts(source_of(many))
        assert len(parts) > 2
        assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
        assert read_all(many) == read_all(one)


def test_streams_are_found_wherever_reads_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_streams(tmp_path / "x.bz2", b"some text " * 50, [100, 100, 200, 300, 301, 499])
    starts = [match.start() for match in wikipedia.BZ2_STREAM.finditer(path.read_bytes())]
    assert len(starts) == 6  # and an empty one
    for size in range(1, 60):
        monkeypatch.setattr(wikipedia, "CHUNK_BYTES", size)
        assert wikipedia.stream_starts(path) == starts


def test_gz_and_many_small_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = make_pages(3, 20)
    plain, packed = write_dump(tmp_path / "x.xml", pages), write_dump(tmp_path / "y.xml.gz", pages)
    whole = read_all(plain)
    for size in [1, 7, 8, 100]:
        monkeypatch.setattr(wikipedia, "CHUNK_BYTES", size)
        assert read_all(packed) == whole
        assert read_all(plain) == whole


def test_damaged_archive_is_named_with_the_place(tmp_path: Path) -> None:
    noise = "".join(random.Random(4).choices("abcdefghijklmnop", k=300_000))  # more than one chunk once packed
    content = (HEADER + page(1, "First.") + page(2, noise)).encode()
    first = bz2.compress(content[:500])
    second = bz2.compress(content[500:])
    path = tmp_path / "x.xml.bz2"
    for tail, said in [
        (second[:-100], rf"ends at byte {len(first + second) - 100:,}, within the bz2 stream at byte {len(first):,}"),
        (second[:5000] + b"\0" * 20 + second[5020:], rf"the bz2 stream at byte {len(first):,} is damaged"),
        (b"garbage", rf"the bz2 stream at byte {len(first):,} is damaged"),
    ]:
        path.write_bytes(first + tail)
        with pytest.raises(MsltError, match=rf"x\.xml\.bz2: .*{said}; download it again .*md5"):
            read_all(path)
    packed = gzip.compress(content)
    for damaged in [packed[:-100], packed[:5000] + b"\xff" * 20 + packed[5020:]]:
        path = tmp_path / "x.xml.gz"
        path.write_bytes(damaged)
        with pytest.raises(MsltError, match=r"x\.xml\.gz: damaged or cut short .*; fetch it again"):
            read_all(path)


@pytest.mark.parametrize("name", ["x.xml", "x.xml.gz", "x.xml.bz2"])
def test_what_is_no_dump_is_named(tmp_path: Path, name: str) -> None:
    packed = gzip.compress(b"<feed>") if name.endswith("gz") else b"<feed>"
    (tmp_path / name).write_bytes(bz2.compress(packed) if name.endswith("bz2") else packed)
    with pytest.raises(MsltError, match=f"{name}: not a MediaWiki dump"):
        wikipedia.list_parts(source_of(tmp_path))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(MsltError, match=f"{name}: "):
        wikipedia.list_parts(source_of(tmp_path))


def test_dump_without_pages_gives_none(tmp_path: Path) -> None:
    assert read_all(write_dump(tmp_path / "x.xml.bz2", [])) == []


def test_folder_of_both_kinds(tmp_path: Path) -> None:
    write_dump(tmp_path / "enwiki-multistream1.xml-p1p5.bz2", [page(1, "One.")])
    write_dump(tmp_path / "enwiki.xml.gz", [page(2, "Two.")])
    (tmp_path / "enwiki-multistream-index.txt.bz2").write_bytes(bz2.compress(b"600:1:T1\n"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/wiki_00").write_text(
        '<doc id="3" url="" title="T">\nT\n\nThree and some more words after it.\n</doc>\n'
    )
    assert [document.text for document in read_all(tmp_path)] == ["One.", "Two.", "Three and some more words after it."]
    assert len(wikipedia.list_parts(source_of(tmp_path, max_files=2))) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MsltError, match=r"no file to read.*\.xml\.bz2.*wiki_00"):
        wikipedia.list_parts(source_of(empty))


# WikiExtractor's output


EXTRACTED = """<doc id="1" url="?curid=1" title="Empty">
Empty


</doc>
<doc id="2" url="?curid=2" title="A & B <">
A & B <

A and B () are letters &amp; more <ref name="x">. They (; , old) are old.
Early life.
! colspan="13" style="background:#DCDCDC" | Goalkeepers
[[Category:Letters]]
File:A.jpg|thumb|A caption of three letters.
Both were born in [[Berlin|the capital]] in 1901 (, ) or later.
References

</doc>
<doc id="3" url="?curid=3" title="Cut">
Cut

The file ends here, in half a wo"""


@pytest.mark.parametrize("name", ["AA/wiki_00", "AA/wiki_00.bz2"])
def test_extracted_pages(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(bz2.compress(EXTRACTED.encode()) if name.endswith("bz2") else EXTRACTED.encode())
    bodies = [body.split("</doc>")[0] for body in re.split(r"<doc .*\n", EXTRACTED)[1:]]
    text = "A and B are letters & more. They (old) are old.\nBoth were born in the capital in 1901 or later."
    assert read_all(tmp_path) == [
        Document("", len(bodies[0]), "empty"),
        Document(text, len(bodies[1])),
        Document("", len(bodies[2]), "damaged"),
    ]


def test_extracted_json_lines(tmp_path: Path) -> None:
    def line(**fields: object) -> bytes:
        return json.dumps(fields).encode() + b"\n"

    damaged = [b"{no json}\n", line(id="4"), line(id="5", text=3), b"[" * 100_000 + b"\n", b'{"text": "caf\xe9"}\n']
    first = line(id="1", url="", title="T", text="T\n\nSome more words with an é.\nEarly life.\n")
    lines = [
        b"\xef\xbb\xbf\n",
        first,
        line(id="2", title="T", text="T\n"),
        line(text="Three words without an id, or seven"),
        *damaged,
        line(id="6", text="a\0b"),
        line(id="7", text="half a pair \ud800"),
        b'{"id": "8", "text": "Cut off',
    ]
    (tmp_path / "wiki_00").write_bytes(b"".join(lines))
    read = read_all(tmp_path)
    assert read[0] == Document("Some more words with an é.", len(first))
    assert [document.dropped for document in read] == ["", "empty", "", *["damaged"] * 8]
    assert read[2].text == "Three words without an id, or seven"
    assert [document.num_bytes for document in read[3:8]] == [len(raw) for raw in damaged]


def test_extracted_page_too_large_or_damaged_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.text.MAX_DOCUMENT_BYTES", 500)
    bodies = [
        b"T\n" + b"x" * 5000 + b"\n",  # a line too long
        b"T\n" + b"some more words\n" * 100,  # too many lines
        b'T\n<doc in a line> of words, and more words <doc id="9" still\n',
        b"T\ncaf\xe9 in Latin-1 and some words\n",
        b"T\na NUL \0 byte in some words\n",
    ]
    pages = [b'<doc id="%d" url="" title="T">\n%b</doc>\n' % item for item in enumerate(bodies)]
    (tmp_path / "wiki_00").write_bytes(b"".join(pages))
    (tmp_path / "wiki_01").write_bytes(b'{"text": "' + b"x" * 2000 + b'"}\n{"text": "Short, but with some words"}\n')
    read = read_all(tmp_path)
    assert [document.dropped for document in read] == [
        *["oversized", "oversized", "", "damaged", "damaged"],
        *["oversized", ""],
    ]
    assert [document.num_bytes for document in read[:6]] == [*map(len, bodies), 2013]


def test_wikitext_is_not_wikiextractor_output(tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text("<mediawiki>\n<page>")
    with pytest.raises(MsltError, match=r"wiki_00: text outside of a <doc .*\.xml\.bz2"):
        read_all(tmp_path)
    (tmp_path / "wiki_00").write_text("")
    assert read_all(tmp_path) == [Document("", 0, "empty")]
    (tmp_path / "wiki_00.bz2").write_bytes(bz2.compress(EXTRACTED.encode())[:-20])
    with pytest.raises(MsltError, match=r"wiki_00\.bz2: damaged or cut short"):
        read_all(tmp_path)


# Real text


@pytest.fixture
def real_data() -> Path:
    if "MSLT_TEST_DATA" not in os.environ:
        pytest.skip("MSLT_TEST_DATA names no folder with wikipedia/dump and wikipedia/extracted")
    return Path(os.environ["MSLT_TEST_DATA"])


MARKUP_LEFT = re.compile(r"\{\{|\}\}|\[\[|\]\]|</?(ref|b|i|div|span|small)\b|''|\(\s*[,;]|\(\)|\|thumb|style=|__[A-Z]")


def test_real_dump(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [dump] = (real_data / "wikipedia/dump").glob("*.bz2")
    read = read_all(dump)
    kept = [document for document in read if not document.dropped]
    assert Counter(document.dropped for document in read) == {"": 106, "redirect": 99, "other_namespace": 1}
    assert 0.4 < sum(len(d.text.encode()) for d in kept) / sum(d.num_bytes for d in kept) < 0.6
    assert not [line for document in kept for line in document.text.split("\n") if MARKUP_LEFT.search(line)]
    content = bz2.decompress(dump.read_bytes())
    monkeypatch.setattr(wikipedia, "PACKED_PART_BYTES", 200_000)
    many = write_streams(tmp_path / dump.name, content, list(range(0, len(content), 100_001)))
    assert len(wikipedia.list_parts(source_of(many))) > 5
    assert read_all(many) == read


def test_real_extract(real_data: Path) -> None:
    read = read_all(sorted((real_data / "wikipedia/extracted").iterdir())[0])
    kept = [document for document in read if not document.dropped]
    assert 0 < len(kept) < len(read)
    assert {document.dropped for document in read} == {"", "empty"}
    assert not [line for document in kept for line in document.text.split("\n") if MARKUP_LEFT.search(line)]
