"""The order of the data: which sentences make which sample, at any position, without a generator's state.

Pairs follow Google's `create_pretraining_data.py` (Devlin et al. 2019, A.2): a document's sentences are packed until
they reach the target length (the sequence length less three special tokens; with `short_sequence_probability` drawn
uniformly from 2 up to that, once for a document); the chunk is cut at random into A and B; half the time, and always
for a chunk of one sentence, B comes from another document and the unused rest goes back; a random B starts at any
sentence of its document and goes on until A and B reach the target; then one token after the other is taken from the
longer side (B when equal), at either end at random: of a very long sentence the middle stays, its ends are hardly ever
seen. What differs from that script:
  - documents are chunked anew in every epoch, instead of `dupe_factor` (10) copies written once and read for ever;
  - the other document is drawn uniformly from all others of the split, instead of from one group of input files with
    up to ten tries that may end on the same document (there a split of one document makes do, here it is refused);
  - samples are shuffled over the whole split, instead of inside a group of files and then a reader's buffer;
  - draws are keyed, so they are other draws of the same distributions.
The same as there, though easily taken for a deviation: a one-sentence chunk that ends a document is a negative; a
chunk that a document's end cuts off, however short, is a sample; the short target holds for all of a document. What
differs in the masks is said in masking.py.

Without next-sentence prediction a sample is one run of a document's sentences, as many as fit whole: DOC-SENTENCES of
Liu et al. 2019 (RoBERTa), section 4.2, there the best of four by a little. What differs: the batch does not grow where
a document's end leaves a sequence short, so that part is padding; of a sentence longer than the sequence a piece is
drawn uniformly in each epoch, so that it is met in full over the epochs. `short_sequence_probability` holds here too;
RoBERTa has none.

Every draw is keyed by (seed, purpose, epoch, document or sample): a sample does not depend on the samples before it,
on ranks or on workers, and the position in the data is one integer, samples consumed. B samples, S sides (A and B).
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mslt.data import keyed
from mslt.data.shards import Shards
from mslt.errors import MsltError

INDEX_VERSION = 1  # of the rules below, in the key of cached indices: raise it when an index changes
BLOCK_SENTENCES = 2**16  # chunked at a time by one thread: about 8 MB, so that it stays in the processor's cache
NUM_BUCKETS = 64  # of the shuffle, sorted side by side
UINT32_SENTENCES = 2**32  # from here on a chunk's start takes 8 bytes
UNCOUNTED_SENTENCES = 2**16  # below, the epochs' sizes are no file: an epoch is chunked in 10 ms

Item = TypeVar("Item")
Result = TypeVar("Result")


class EpochIndex(NamedTuple):
    """The chunks of one epoch, in the epoch's shuffled order: A is `a_size` sentences from sentence `start` on, B the
    `b_size` sentences behind them, or from another document where `b_size` is 0. [chunks]

    8 bytes a sample (uint32, uint16, uint16; `start` is uint64 beyond 2^32 sentences), mapped from a file where the
    split is large; about 40 in the process that builds it. Target and document are worked out from `start`.
    """

    start: np.ndarray
    a_size: np.ndarray
    b_size: np.ndarray

    def take(self, which: np.ndarray) -> "EpochIndex":
        return EpochIndex(*(column[which] for column in self))


@dataclass(frozen=True)
class Segments:
    """Where the tokens of samples lie, truncation done: `num_tokens_BS` from `first_token_BS` on, S = 2 (a sample
    without B has none there). `is_random_B`: B is of another document (the NSP label 1)."""

    first_token_BS: np.ndarray
    num_tokens_BS: np.ndarray
    is_random_B: np.ndarray


class SampleOrder:
    """Position in the data → sample. Makes or maps an epoch's index when first asked for a sample in it, keeps two."""

    def __init__(
        self,
        shards: Shards,
        sequence_length: int,
        short_sequence_probability: float,
        seed: int,
        next_sentence_prediction: bool = True,
    ) -> None:
        if next_sentence_prediction and shards.num_documents < 2:
            raise MsltError(
                f"{shards.folder}: split {shards.split} holds {shards.num_documents} document(s); sentence pairs need "
                "at least 2: prepare more text, or raise validation_share if this is the validation split"
            )
        self.shards = shards
        self.pairs = next_sentence_prediction
        self.max_tokens = sequence_length - (3 if self.pairs else 2)  # [CLS] A [SEP] B [SEP] or [CLS] A [SEP]
        self.short_sequence_probability = short_sequence_probability
        self.seed = seed
        self._epoch_starts = [0]  # position of the first sample of each epoch known so far, and of the next one
        self._indices: dict[int, EpochIndex] = {}
        self._unshuffled: tuple[int, EpochIndex] | None = None  # counted, and most likely to be shuffled next

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, index in it) of the samples at these positions, each int64 [B]."""
        last = int(positions.max(initial=0))
        self._count_epochs(lambda starts: starts[-1] > last)
        starts = np.array(self._epoch_starts)
        epoch_B = np.searchsorted(starts, positions, side="right") - 1
        return epoch_B, positions - starts[epoch_B]

    def num_samples(self, epoch: int) -> int:
        """Samples of an epoch."""
        if epoch in self._indices:
            return len(self._indices[epoch].start)
        self._count_epochs(lambda starts: len(starts) > epoch + 1)
        return self._epoch_starts[epoch + 1] - self._epoch_starts[epoch]

    def index(self, epoch: int) -> EpochIndex:
        if epoch not in self._indices:
            while len(self._indices) > 1:
                self._indices.pop(min(self._indices))
            key = {**self._key(), "epoch": epoch}
            columns = self.shards.shared("epoch", key, lambda: self._shuffled(epoch)._asdict())
            self._indices[epoch] = EpochIndex(**columns)
            self._unshuffled = None
        return self._indices[epoch]

    def segments(self, epoch_B: np.ndarray, index_B: np.ndarray) -> Segments:
        """The samples at these addresses, as runs of tokens."""
        offsets = self.shards.token_starts
        chunk = self._chunks_at(epoch_B, index_B)
        a_end_B = chunk.start + chunk.a_size
        first_token_BS = np.stack([offsets[chunk.start], offsets[a_end_B]], 1)
        num_tokens_BS = np.stack([offsets[a_end_B], offsets[a_end_B + chunk.b_size]], 1) - first_token_BS
        is_random_B = (chunk.b_size == 0) & self.pairs
        rows = np.flatnonzero(is_random_B)
        first_token_BS[rows, 1], num_tokens_BS[rows, 1] = self._random_next(
            epoch_B[rows], index_B[rows], chunk.start[rows], num_tokens_BS[rows, 0]
        )
        kept_BS = truncated_lengths(num_tokens_BS, self.max_tokens)
        for side, purpose in enumerate(("truncate_a", "truncate_b")):
            surplus_B = num_tokens_BS[:, side] - kept_BS[:, side]
            first_token_BS[:, side] += self._cut_in_front(surplus_B, purpose, epoch_B, index_B)
        return Segments(first_token_BS, kept_BS, is_random_B)

    def chunk_sizes(self, epoch_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
        """Sentences of each sample's chunk as it was packed, those included that a random B sent back."""
        start_B = self._chunks_at(epoch_B, index_B).start
        document_B = self.document_of(start_B)
        ends = self.shards.document_starts[document_B + 1]
        return self._chunk_ends(start_B, self._targets(epoch_B, document_B), ends, self.shards.token_starts) - start_B

    def document_of(self, sentence: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.shards.document_starts, sentence, side="right") - 1

    def _count_epochs(self, is_reached: Callable[[list[int]], bool]) -> None:
        """Extend the epochs' starts until `is_reached` is content with them. An epoch that is passed over is chunked
        and counted, not shuffled; the sizes of all epochs counted so far are one file of the cache."""

        def counted() -> dict[str, np.ndarray]:
            starts = self._epoch_starts.copy()
            while not is_reached(starts):
                epoch = len(starts) - 1
                chunks = self._indices[epoch] if epoch in self._indices else self._chunks(epoch)
                starts.append(starts[-1] + len(chunks.start))
            return {"samples": np.diff(starts)}

        def is_more(found: dict[str, np.ndarray]) -> bool:
            return len(found["samples"]) >= len(self._epoch_starts)

        while not is_reached(self._epoch_starts):
            sizes = self.shards.shared("epoch-sizes", self._key(), counted, is_more, UNCOUNTED_SENTENCES)
            self._epoch_starts = [0, *np.cumsum(sizes["samples"]).tolist()]

    def _chunks_at(self, epoch_B: np.ndarray, index_B: np.ndarray) -> EpochIndex:
        """The chunks of these samples; their columns are int64."""
        columns = [np.empty(len(epoch_B), np.int64) for _ in range(3)]
        for epoch in np.unique(epoch_B).tolist():
            rows = epoch_B == epoch
            for column, values in zip(columns, self.index(epoch).take(index_B[rows]), strict=True):
                column[rows] = values
        return EpochIndex(*columns)

    def _chunks(self, epoch: int) -> EpochIndex:
        """All chunks of the epoch in the order of the text, the same however it is cut into blocks of documents."""
        if self._unshuffled is None or self._unshuffled[0] != epoch:
            documents = self.shards.document_starts
            cuts = np.searchsorted(documents, range(0, int(documents[-1]), BLOCK_SENTENCES))
            blocks = list(pairwise([*np.unique(cuts).tolist(), len(documents) - 1]))
            parts = in_threads(lambda block: self._chunks_of(epoch, *block), blocks)
            self._unshuffled = epoch, joined(parts)
        return self._unshuffled[1]

    def _chunks_of(self, epoch: int, first_document: int, last_document: int) -> EpochIndex:
        """The chunks of some documents: of every sentence it is worked out how far a chunk would go that began there,
        then these jumps are followed from each document's start."""
        bounds = self.shards.document_starts[first_document : last_document + 1]
        first = int(bounds[0])
        offsets = self.shards.token_starts[first : int(bounds[-1]) + 1]
        bounds = bounds - first
        position = np.arange(len(offsets) - 1)
        documents, sizes = np.arange(first_document, last_document), np.diff(bounds)
        document, document_end = np.repeat(documents, sizes), np.repeat(bounds[1:], sizes)
        target = np.repeat(self._targets(epoch, documents), sizes)
        size = self._chunk_ends(position, target, document_end, offsets) - position
        a_size, is_random = size, np.zeros(len(position), bool)
        if self.pairs:
            a_size = 1 + keyed.integers(np.maximum(size - 1, 1), self.seed, "split", epoch, document, position + first)
            is_random = size == 1
            is_random |= keyed.uniform(self.seed, "next", epoch, document, position + first) < 0.5
        b_size = np.where(is_random, 0, size - a_size)
        start = np.flatnonzero(followed(position + a_size + b_size, bounds[:-1]))
        start_dtype = np.uint32 if self.shards.document_starts[-1] < UINT32_SENTENCES else np.uint64
        return EpochIndex(
            (start + first).astype(start_dtype), a_size[start].astype(np.uint16), b_size[start].astype(np.uint16)
        )

    def _chunk_ends(
        self, start: np.ndarray, target: np.ndarray, document_end: np.ndarray, offsets: np.ndarray
    ) -> np.ndarray:
        """Pairs: the first sentence end at which the target is reached; else the last at which it is not exceeded.
        One sentence at least. `offsets` are token starts, numbered as `start` is."""
        if self.pairs:
            end = np.searchsorted(offsets, offsets[start] + target, side="left")
        else:
            end = np.searchsorted(offsets, offsets[start] + target, side="right") - 1
        return np.clip(end, start + 1, document_end)

    def _shuffled(self, epoch: int) -> EpochIndex:
        """The epoch's chunks by a random key of 64 bits each, equal keys in the order of the text."""
        chunks = self._chunks(epoch)
        parts = [slice(first, first + BLOCK_SENTENCES) for first in range(0, len(chunks.start), BLOCK_SENTENCES)]
        key = np.concatenate(in_threads(lambda part: keyed.bits(self.seed, "order", epoch, chunks.start[part]), parts))
        bucket = (key >> np.uint64(58)).astype(np.uint8)

        def sorted_bucket(number: int) -> EpochIndex:
            inside = np.flatnonzero(bucket == number)
            return chunks.take(inside[np.argsort(key[inside], kind="stable")])

        return joined(in_threads(sorted_bucket, range(NUM_BUCKETS)))

    def _targets(self, epoch: int | np.ndarray, document: np.ndarray) -> np.ndarray:
        short = keyed.uniform(self.seed, "short", epoch, document) < self.short_sequence_probability
        short_target = 2 + keyed.integers(self.max_tokens - 1, self.seed, "short_length", epoch, document)
        return np.where(short, short_target, self.max_tokens)

    def _random_next(
        self, epoch_B: np.ndarray, index_B: np.ndarray, start_B: np.ndarray, num_a_tokens_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """First token and number of tokens: from a random sentence of another document on, until A and B reach the
        target; one sentence at least."""
        documents, offsets = self.shards.document_starts, self.shards.token_starts
        document_B = self.document_of(start_B)
        other_B = keyed.integers(self.shards.num_documents - 1, self.seed, "other", epoch_B, index_B)
        other_B += other_B >= document_B
        first_B, last_B = documents[other_B], documents[other_B + 1]
        b_start_B = first_B + keyed.integers(last_B - first_B, self.seed, "other_start", epoch_B, index_B)
        wanted_B = self._targets(epoch_B, document_B) - num_a_tokens_B
        b_end_B = np.clip(np.searchsorted(offsets, offsets[b_start_B] + wanted_B, side="left"), b_start_B + 1, last_B)
        return offsets[b_start_B], offsets[b_end_B] - offsets[b_start_B]

    def _cut_in_front(
        self, surplus_B: np.ndarray, purpose: str, epoch_B: np.ndarray, index_B: np.ndarray
    ) -> np.ndarray:
        """How many of the surplus tokens are taken from the front: of a pair's each with even chance, without pairs
        any number alike."""
        if not self.pairs:
            return keyed.integers(surplus_B + 1, self.seed, purpose, epoch_B, index_B)
        row = np.repeat(np.arange(len(surplus_B)), surplus_B)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(surplus_B) - surplus_B, surplus_B)
        coins = keyed.as_uniform(keyed.extended(keyed.bits(self.seed, purpose, epoch_B, index_B)[row], nth)) < 0.5
        return np.bincount(row[coins], minlength=len(surplus_B))

    def _key(self) -> dict[str, Any]:
        """Everything besides the corpus and the epoch that decides an epoch's index."""
        return {
            "version": INDEX_VERSION,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "pairs": self.pairs,
            "short_sequence_probability": self.short_sequence_probability,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_indices": {}, "_unshuffled": None}  # a spawned worker maps or builds its own


def followed(jump: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """bool [n]: which of 0 … n-1 are met from `starts` on, going from i to jump[i] > i until that is n.

    A path from one start must run through all later ones. Each round doubles how far every path was followed, so that
    a book of 10,000 sentences takes 14 rounds and no loop over its chunks.
    """
    met = np.zeros(len(jump) + 1, bool)
    met[starts] = True
    jump, num_before = np.append(jump, len(jump)), 0
    while (num_met := int(met.sum())) > num_before:
        num_before = num_met
        met[jump[met]] = True
        jump = jump[jump]
    return met[:-1]


def joined(parts: list[EpochIndex]) -> EpochIndex:
    return EpochIndex(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Threads do: numpy lets go of the interpreter in everything that takes long here."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def truncated_lengths(num_tokens_BS: np.ndarray, max_tokens: int) -> np.ndarray:
    """[B, 2] after the longer side (B when equal) lost a token, again and again, until both fit together."""
    a_B, b_B = num_tokens_BS.T
    surplus_B = np.maximum(a_B + b_B - max_tokens, 0)
    from_longer_B = np.minimum(surplus_B, np.abs(a_B - b_B))
    rest_B = surplus_B - from_longer_B
    a_is_longer_B = a_B > b_B
    a_loss_B = np.where(a_is_longer_B, from_longer_B, 0) + rest_B // 2
    b_loss_B = np.where(a_is_longer_B, 0, from_longer_B) + (rest_B + 1) // 2
    return num_tokens_BS - np.stack([a_loss_B, b_loss_B], 1)
