"""Probing tasks that need no parser, made from any sentences (after Conneau et al. 2018, arXiv:1805.01070, section 3):
how long a sentence is, which of some words it holds, whether two of its words changed places.

Words are what stands between spaces, with punctuation apart; of Chinese and Japanese each character. For languages
that write neither, like Thai, these are no tasks. Labels are balanced, a sentence stands in one row alone, and of each
label's rows 10 of 12 are for training, one each for dev and test, as in SentEval's own files.
"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mslt.data import keyed
from mslt.errors import MsltError

Row = tuple[str, str, str]  # split, label, text
BINS = ((5, 8), (9, 12), (13, 16), (17, 20), (21, 25), (26, 28))  # of words, ends included; the label is the number
NUM_WORDS = 100
LEAST_ROWS = 12  # of a label: one each for dev and test
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
# Vowels of Hindi, points of Hebrew and Arabic, accents apart from their letter; and the joiners within words.
_MARKS = (
    "[" + "".join(c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c)[0] == "M") + "\u200c\u200d]"
)
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|(?:[^\W{_IDEOGRAPHS}]{_MARKS}*)+|[^\w\s]")
_MARK = re.compile(_MARKS)


def words_of(sentence: str) -> list[str]:
    return _WORD.findall(sentence)


def is_of_letters(word: str) -> bool:
    return _MARK.sub("", word).isalpha()


def make_rows(task: str, sentences: Iterable[str], num_rows: int, seed: int, num_words: int = NUM_WORDS) -> list[Row]:
    """At most `num_rows`, of a task in MAKERS. MsltError where the sentences are too few."""
    shortest, longest = BINS[0][0], BINS[-1][1]
    usable = {" ".join(words): words for words in map(words_of, sentences) if shortest <= len(words) <= longest}
    texts = list(usable)
    order = np.argsort(keyed.bits(seed, f"make_{task}", np.arange(len(texts))), kind="stable")
    shuffled = [usable[texts[index]] for index in order]
    by_label = MAKERS[task](shuffled, num_rows, seed, num_words)
    each = min(num_rows // len(by_label), *(len(found) for found in by_label.values()))
    if each < LEAST_ROWS:
        scarce = min(by_label, key=lambda label: len(by_label[label]))
        raise MsltError(f"{task}: {each} sentences of label {scarce} at most, of {len(texts):,} with {shortest} to "
                        f"{longest} words; give more text, or more --rows")  # fmt: skip
    rows = [
        (_split(index, each), label, " ".join(words))
        for label, found in by_label.items()
        for index, words in enumerate(found[:each])
    ]
    order = np.argsort(keyed.bits(seed, f"make_order_{task}", np.arange(len(rows))), kind="stable")
    return sorted((rows[index] for index in order), key=lambda row: ("tr", "va", "te").index(row[0]))


def _split(index: int, count: int) -> str:
    heldout = max(count // 12, 1)
    return "te" if index < heldout else "va" if index < 2 * heldout else "tr"


Sentences = Sequence[list[str]]
ByLabel = dict[str, list[list[str]]]


def sentence_length(sentences: Sentences, num_rows: int, seed: int, num_words: int) -> ByLabel:
    """Six bins of lengths."""
    found: ByLabel = {str(label): [] for label in range(len(BINS))}
    for words in sentences:
        found[str(next(label for label, (_, most) in enumerate(BINS) if len(words) <= most))].append(words)
    return found


def word_content(sentences: Sentences, num_rows: int, seed: int, num_words: int) -> ByLabel:
    """Words of middling frequency: the rarest that twice as many sentences hold as rows are wanted of each, but for
    those that seldom stand alone. A sentence holds exactly one of them."""
    each = max(num_rows // num_words, LEAST_ROWS)
    held = [{word.lower() for word in words if is_of_letters(word)} for words in sentences]
    counts = Counter(word for words in held for word in words)
    enough = (word for word, count in counts.items() if count >= 2 * each)
    chosen = set(sorted(enough, key=lambda word: (counts[word], word))[:num_words])
    held = [words & chosen for words in held]
    while chosen:
        alone = Counter(word for words in held if len(words & chosen) == 1 for word in words & chosen)
        least = min(chosen, key=lambda word: (alone[word], word))
        if alone[least] >= each:
            break
        chosen.remove(least)
    if len(chosen) < 2:
        raise MsltError(f"WordContent: {len(chosen)} words stand alone in {each} sentences or more; give more text, or "
                        "fewer --rows")  # fmt: skip
    found: ByLabel = {word: [] for word in sorted(chosen)}
    for words, of_chosen in zip(sentences, held, strict=True):
        if len(of_chosen & chosen) == 1:
            found[(of_chosen & chosen).pop()].append(words)
    return found


def bigram_shift(sentences: Sentences, num_rows: int, seed: int, num_words: int) -> ByLabel:
    """Every other sentence with two neighbours exchanged (I), unlike words behind the first; the others as they are
    (O)."""
    found: ByLabel = {"I": [], "O": []}
    for index, words in enumerate(sentences):
        places = [
            place
            for place in range(1, len(words) - 1)
            if is_of_letters(words[place])
            and is_of_letters(words[place + 1])
            and words[place].lower() != words[place + 1].lower()
        ]
        if not places:
            continue
        if len(found["O"]) < len(found["I"]):
            found["O"].append(words)
        else:
            place = places[int(keyed.integers(len(places), seed, "make_shift", index))]
            found["I"].append([*words[:place], words[place + 1], words[place], *words[place + 2 :]])
    return found


MAKERS: dict[str, Callable[[Sentences, int, int, int], ByLabel]] = {
    "SentLen": sentence_length,
    "WordContent": word_content,
    "BigramShift": bigram_shift,
}
