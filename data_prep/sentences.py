"""Text to sentences."""

import re
from collections.abc import Iterator

import sentencex

LANGUAGE = "en"
# sentencex keeps whole what stands in quotation marks or parentheses, in novels whole letters. It is asked without
# them, so that a sentence is the same in a quotation and out of it: F1 of the boundaries marked by hand in books 99.2%
# and 99.6%, sentencex alone 79.7% and 76.0%; in Wikipedia 100%; at 20 MB/s. Six others are no better, and slower
# (benchmarks/records/2026-11-21-sentence-splitters-cpu.md).
ENCLOSING = "\"“”„«»'‘’`()"
ASKED = {mark + quote for mark in "?!" for quote in "\"”’'"}
SPACE = re.compile(r".*\s", re.DOTALL)
# `"Why?" Mr. Taft asked.`: one in 200 boundaries of novels; the verbs are those seen there most.
SPEAKER = re.compile(
    r"(?:I|(?!(?:He|She|They|But|And|Then|So) )[A-Z][\w’'-]*\.?(?: [A-Z][\w’'-]*\.?){0,2}) (?:said|says|asked|laughed"
    r"|demanded|exclaimed|replied|inquired|enquired|cried|repeated|answered|declared|continued|shouted|whispered"
    r"|returned|remarked)\b"
)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text whose paragraphs stand one a line; no sentence crosses a paragraph. What holds no
    letter and no digit (`* * *`) is left out."""
    sentences = (part.strip() for line in text.split("\n") if line for part in split_paragraph(line))
    return [sentence for sentence in sentences if any(map(str.isalnum, sentence))]


def split_paragraph(paragraph: str) -> Iterator[str]:
    """The paragraph in parts, a sentence each, with all its white space."""
    bare = paragraph
    for mark in ENCLOSING:
        bare = bare.replace(mark, " ")
    has_capitals = not paragraph.islower()
    start = end = 0
    for part in sentencex.segment(LANGUAGE, bare):
        gap_start, end = end + len(part.rstrip()), end + len(part)
        # `"Did he?" she asked.` goes on, as does `alas! two months`.
        if has_capitals and paragraph[end : end + 1].islower():
            continue
        if paragraph[gap_start - 1 : gap_start + 1] in ASKED and SPEAKER.match(paragraph, end):
            continue
        # A closing mark stays with the sentence before the white space, an opening one goes with the one after it;
        # where there is no white space (`Well!--he`, `example.com`) no sentence ends.
        space = SPACE.match(paragraph, gap_start, end)
        if space:
            yield paragraph[start : space.end()]
            start = space.end()
    yield paragraph[start:]
