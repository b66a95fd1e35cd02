"""A corpus that is only numbers: stands in for Shards, and every token tells where it comes from."""

from pathlib import Path
from typing import Any

import numpy as np

from mslt.data.shards import SpecialIds

FIRST_TOKEN = 5  # ids below are BERT's special tokens


class Corpus:
    """Documents given by their sentences' lengths. The token at position p of the corpus has the id FIRST_TOKEN + p;
    `goes_on` are the positions of tokens that go on a word."""

    folder, split = Path("corpus"), "train"
    special_ids = SpecialIds(0, 1, 2, 3, 4)

    def __init__(self, documents: list[list[int]], goes_on: tuple[int, ...] = ()) -> None:
        self.num_documents = len(documents)
        self.document_starts = np.cumsum([0, *map(len, documents)])
        self.token_starts = np.cumsum([0, *(length for document in documents for length in document)])
        self.num_sentences = len(self.token_starts) - 1
        self.all_tokens = FIRST_TOKEN + np.arange(self.token_starts[-1])
        self.token_blocks = [self.all_tokens]
        self.vocab_size = FIRST_TOKEN + len(self.all_tokens)
        self.is_continuation_V = np.isin(np.arange(self.vocab_size) - FIRST_TOKEN, goes_on)

    def tokens(self, first_sentence: int, last_sentence: int) -> np.ndarray:
        return self.all_tokens[self.token_starts[first_sentence] : self.token_starts[last_sentence]]

    def token_runs(self, first_token: np.ndarray, num_tokens: np.ndarray) -> list[np.ndarray]:
        runs = zip(first_token.tolist(), num_tokens.tolist(), strict=True)
        return [self.all_tokens[first : first + count] for first, count in runs]

    def shared(self, name: str, key: dict[str, Any], make: Any, *_: Any) -> Any:
        return make()

    def sentence_of(self, token: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.token_starts, token - FIRST_TOKEN, side="right") - 1

    def document_of(self, token: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.document_starts, self.sentence_of(token), side="right") - 1


def random_corpus(num_documents: int, seed: int, most_sentences: int = 60, most_tokens: int = 45) -> Corpus:
    """Documents of 1 … `most_sentences` sentences of 1 … `most_tokens` tokens, short ones more often; a third of the
    tokens goes on a word."""
    generator = np.random.default_rng(seed)
    sizes = 1 + (most_sentences * generator.random(num_documents) ** 2).astype(int)
    documents = [(1 + most_tokens * generator.random(size) ** 1.5).astype(int).tolist() for size in sizes]
    num_tokens = sum(map(sum, documents))
    return Corpus(documents, tuple(np.flatnonzero(generator.random(num_tokens) < 1 / 3).tolist()))
