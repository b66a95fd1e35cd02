"""Text to sentences."""

import re
from collections.abc import Iterator

# sentencex against blingfire 0.1.8 on 1.1 MB of Wikipedia and novels: the same sentences but for 2 % of the
# paragraphs, where it keeps `Mrs. Bennet` and `"Did he?" she asked.` whole, at 50 MB/s against 10.
import sentencex

LANGUAGE = "en"
# sentencex keeps a quotation whole, and in novels whole letters are quoted: up to 1,910 tokens in one "sentence".
# What is longer than this, about 60 tokens, is split once more as if its quotation marks were not there.
LONG_CHARACTERS = 300
QUOTES = str.maketrans(dict.fromkeys('"“”„«»', " "))
OPENING = re.compile(r'\s(["“„«]\s*)$')


def split_sentences(text: str) -> list[str]:
    """Sentences of a text whose paragraphs stand one a line; no sentence crosses a paragraph. What holds no
    letter and no digit (`* * *`) is left out."""
    return [sentence for line in text.split("\n") if line for sentence in split_paragraph(line)]


def split_paragraph(paragraph: str) -> Iterator[str]:
    for piece in sentencex.segment(LANGUAGE, paragraph):
        for part in split_quotation(piece) if len(piece) > LONG_CHARACTERS else [piece]:
            sentence = part.strip()
            if any(map(str.isalnum, sentence)):
                yield sentence


def split_quotation(piece: str) -> Iterator[str]:
    """Sentences inside and around quotation marks; a mark that opens goes with what follows it."""
    start, opening = 0, ""
    for part in sentencex.segment(LANGUAGE, piece.translate(QUOTES)):
        original = opening + piece[start : start + len(part)]
        start += len(part)
        found = OPENING.search(original)
        opening = found[1] if found else ""
        yield original.removesuffix(opening)
    yield opening + piece[start:]
