"""The order of the data: which sentences make which sample, at any position, without a generator's state.

Pairs follow Google's `create_pretraining_data.py` (Devlin et al. 2019, A.2): a document's sentences are packed until
they reach the target length (the sequence length less three special tokens; with `short_sequence_probability` drawn
uniformly from 2 up to that, once for a document); the chunk is cut at random into A and B; half the time, and always
for a chunk of one sentence, B comes from another document and the unused rest goes back; the longer side is truncated
at either end at random. What differs from that script:
  - documents are chunked anew in every epoch, instead of `dupe_factor` copies written once;
  - the other document is drawn uniformly from all others, instead of up to ten tries that may end on the same one;
  - samples are shuffled over the whole corpus, instead of within a shuffled list of files.
Every draw is keyed by (seed, purpose, epoch, document or sample): a sample does not depend on the samples before it,
on ranks or on workers, and the position in the data is one integer, samples consumed.
"""

from dataclasses import dataclass

import numpy as np

from mslt.data import keyed
from mslt.data.shards import Shards
from mslt.errors import MsltError

SPECIAL_TOKENS_IN_PAIR = 3  # [CLS] A [SEP] B [SEP]


@dataclass(frozen=True)
class EpochIndex:
    """The chunks of one epoch, in the epoch's shuffled order: sentences `start … a_end-1` are A; B goes on to
    `end`, or comes from another document where `end == a_end`. `target` is the length in tokens aimed at. [chunks]"""

    start: np.ndarray
    a_end: np.ndarray
    end: np.ndarray
    target: np.ndarray
    document: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Token ids of A and B without special tokens, truncated; `is_random` is the NSP label (1: B is not the next)."""

    a: np.ndarray
    b: np.ndarray
    is_random: bool


class SampleOrder:
    """Position in the data → sample. Builds an epoch's index when first asked for a sample in it, keeps two."""

    def __init__(self, shards: Shards, sequence_length: int, short_sequence_probability: float, seed: int) -> None:
        if shards.num_documents < 2:
            raise MsltError(
                f"{shards.folder}: split {shards.split} holds {shards.num_documents} document(s); sentence pairs need "
                "at least 2: prepare more text, or raise validation_share if this is the validation split"
            )
        self.shards = shards
        self.max_pair_tokens = sequence_length - SPECIAL_TOKENS_IN_PAIR
        self.short_sequence_probability = short_sequence_probability
        self.seed = seed
        self._epoch_ends: list[int] = []  # samples up to the end of each epoch known so far
        self._indices: dict[int, EpochIndex] = {}

    def locate(self, sample: int) -> tuple[int, int]:
        """(epoch, index in it) of the sample at this position."""
        while not self._epoch_ends or sample >= self._epoch_ends[-1]:
            before = self._epoch_ends[-1] if self._epoch_ends else 0
            self._epoch_ends.append(before + len(self.index(len(self._epoch_ends)).start))
        epoch = int(np.searchsorted(self._epoch_ends, sample, side="right"))
        return epoch, sample - (self._epoch_ends[epoch - 1] if epoch else 0)

    def index(self, epoch: int) -> EpochIndex:
        if epoch not in self._indices:
            while len(self._indices) > 1:
                self._indices.pop(min(self._indices))
            self._indices[epoch] = self._build_index(epoch)
        return self._indices[epoch]

    def pair(self, epoch: int, index_in_epoch: int) -> Pair:
        index = self.index(epoch)
        start, a_end, end = (int(side[index_in_epoch]) for side in (index.start, index.a_end, index.end))
        a = self.shards.tokens(start, a_end)
        is_random = end == a_end
        if is_random:
            b = self._random_next(epoch, index_in_epoch, int(index.document[index_in_epoch]),
                                  int(index.target[index_in_epoch]) - len(a))  # fmt: skip
        else:
            b = self.shards.tokens(a_end, end)
        a_length, b_length = truncated_lengths(len(a), len(b), self.max_pair_tokens)
        return Pair(
            self._truncate(a, a_length, "truncate_a", epoch, index_in_epoch),
            self._truncate(b, b_length, "truncate_b", epoch, index_in_epoch),
            is_random,
        )

    def _build_index(self, epoch: int) -> EpochIndex:
        """All documents step through their sentences side by side, one chunk each a turn."""
        offsets, starts = self.shards.token_starts, self.shards.document_starts
        document = np.flatnonzero(np.diff(starts) > 0)
        target = self._targets(epoch, document)
        position = starts[document]
        turns: list[tuple[np.ndarray, ...]] = []
        while len(document):
            document_end = starts[document + 1]
            end = np.searchsorted(offsets, offsets[position] + target, side="left")
            end = np.clip(end, position + 1, document_end)
            size = end - position
            a_size = 1 + keyed.integers(np.maximum(size - 1, 1), self.seed, "split", epoch, document, position)
            is_random = (size == 1) | (keyed.uniform(self.seed, "next", epoch, document, position) < 0.5)
            a_end = position + a_size
            turns.append((position, a_end, np.where(is_random, a_end, end), target, document))
            position = np.where(is_random, a_end, end)
            goes_on = position < document_end
            position, document, target = position[goes_on], document[goes_on], target[goes_on]
        columns = [np.concatenate(column) for column in zip(*turns, strict=True)]
        shuffled = np.argsort(keyed.bits(self.seed, "order", epoch, columns[0]), kind="stable")
        return EpochIndex(*(column[shuffled] for column in columns))

    def _targets(self, epoch: int, document: np.ndarray) -> np.ndarray:
        short = keyed.uniform(self.seed, "short", epoch, document) < self.short_sequence_probability
        short_target = 2 + keyed.integers(self.max_pair_tokens - 1, self.seed, "short_length", epoch, document)
        return np.where(short, short_target, self.max_pair_tokens)

    def _random_next(self, epoch: int, index_in_epoch: int, document: int, target_tokens: int) -> np.ndarray:
        """From a random sentence of another document on, until `target_tokens` are reached; one sentence at least."""
        other = int(keyed.integers(self.shards.num_documents - 1, self.seed, "other", epoch, index_in_epoch))
        other += other >= document
        first, last = (int(bound) for bound in self.shards.document_starts[other : other + 2])
        start = first + int(keyed.integers(last - first, self.seed, "other_start", epoch, index_in_epoch))
        offsets = self.shards.token_starts
        end = int(np.searchsorted(offsets, offsets[start] + target_tokens, side="left"))
        return self.shards.tokens(start, min(max(end, start + 1), last))

    def _truncate(self, tokens: np.ndarray, length: int, purpose: str, epoch: int, index_in_epoch: int) -> np.ndarray:
        """Take away one token after the other, from the front or the back with equal chance."""
        surplus = len(tokens) - length
        if not surplus:
            return tokens
        coins = keyed.uniform(self.seed, purpose, epoch, index_in_epoch, np.arange(surplus)) < 0.5
        front = int(coins.sum())
        return tokens[front : front + length]


def truncated_lengths(a_length: int, b_length: int, max_length: int) -> tuple[int, int]:
    """Lengths after the longer side (B when equal) lost a token, again and again, until both fit."""
    surplus = max(a_length + b_length - max_length, 0)
    from_longer = min(surplus, abs(a_length - b_length))
    if a_length > b_length:
        a_length -= from_longer
    else:
        b_length -= from_longer
    rest = surplus - from_longer
    return a_length - rest // 2, b_length - (rest + 1) // 2
