"""From shards to batches: Devlin's pairs and masks, the same wherever and whenever a sample is asked for.

The pairs are compared with Google's `create_instances_from_document`, written here as slowly as there, on the same
keyed draws.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mslt.config import DataConfig
from mslt.data import keyed
from mslt.data.loader import Batch, Samples, evaluation_batches, training_batches
from mslt.data.masking import IGNORED_LABEL, mask_tokens
from mslt.data.order import INDEX_VERSION, EpochIndex, SampleOrder, followed, truncated_lengths
from mslt.data.shards import Shards, open_shards
from mslt.errors import MsltError
from mslt.plan import Plan, Stage
from tests.corpus import FIRST_TOKEN, Corpus, random_corpus


@dataclass(frozen=True)
class Chunk:
    start: int
    a_end: int
    end: int
    target: int
    document: int
    num_sentences: int

    @property
    def is_random(self) -> bool:
        return self.end == self.a_end


def devlin_chunks(
    shards: Corpus | Shards, document: int, max_tokens: int, short_probability: float, seed: int, epoch: int
) -> list[Chunk]:
    target = max_tokens
    if keyed.uniform(seed, "short", epoch, document) < short_probability:
        target = 2 + int(keyed.integers(max_tokens - 1, seed, "short_length", epoch, document))  # randint(2, max)
    first, last = (int(bound) for bound in shards.document_starts[document : document + 2])
    chunks: list[Chunk] = []
    current: list[int] = []
    length = 0
    i = first
    while i < last:
        current.append(i)
        length += len(shards.tokens(i, i + 1))
        if i == last - 1 or length >= target:
            key = (epoch, document, current[0])
            a_size = 1
            if len(current) >= 2:
                a_size = 1 + int(keyed.integers(len(current) - 1, seed, "split", *key))  # randint(1, len - 1)
            is_random = len(current) == 1 or bool(keyed.uniform(seed, "next", *key) < 0.5)
            a_end = current[0] + a_size
            end = a_end if is_random else current[-1] + 1
            chunks.append(Chunk(current[0], a_end, end, target, document, len(current)))
            if is_random:
                i -= len(current) - a_size  # put the unused segments back
            current, length = [], 0
        i += 1
    return chunks


def devlin_epoch(
    shards: Corpus | Shards, max_tokens: int, short_probability: float, seed: int, epoch: int
) -> list[Chunk]:
    chunks = [
        chunk
        for document in range(shards.num_documents)
        for chunk in devlin_chunks(shards, document, max_tokens, short_probability, seed, epoch)
    ]
    return sorted(chunks, key=lambda chunk: int(keyed.bits(seed, "order", epoch, chunk.start)))


def devlin_pair(
    shards: Corpus | Shards, chunk: Chunk, max_tokens: int, seed: int, epoch: int, index: int
) -> tuple[list[int], list[int]]:
    a = shards.tokens(chunk.start, chunk.a_end).tolist()
    if chunk.is_random:
        others = [document for document in range(shards.num_documents) if document != chunk.document]
        other = others[int(keyed.integers(len(others), seed, "other", epoch, index))]
        first, last = (int(bound) for bound in shards.document_starts[other : other + 2])
        start = first + int(keyed.integers(last - first, seed, "other_start", epoch, index))
        b: list[int] = []
        for sentence in range(start, last):
            b.extend(shards.tokens(sentence, sentence + 1).tolist())
            if len(b) >= chunk.target - len(a):
                break
    else:
        b = shards.tokens(chunk.a_end, chunk.end).tolist()
    taken = {"a": 0, "b": 0}
    while len(a) + len(b) > max_tokens:
        name, side = ("a", a) if len(a) > len(b) else ("b", b)
        from_front = keyed.uniform(seed, f"truncate_{name}", epoch, index, taken[name]) < 0.5
        side.pop(0 if from_front else -1)
        taken[name] += 1
    return a, b


def chunks_of(index: EpochIndex) -> list[tuple[int, int, int]]:
    """(start, a_end, end) of each, end being a_end where B is random."""
    chunks = zip(*(column.tolist() for column in index), strict=True)
    return [(start, start + a_size, start + a_size + b_size) for start, a_size, b_size in chunks]


@dataclass(frozen=True)
class Pair:
    a: np.ndarray
    b: np.ndarray
    is_random: bool


def pairs_of(order: SampleOrder, epoch: int, indices: Iterable[int]) -> list[Pair]:
    index_B = np.fromiter(indices, np.int64)
    segments = order.segments(np.full(len(index_B), epoch), index_B)
    runs = order.shards.token_runs(segments.first_token_BS.ravel(), segments.num_tokens_BS.ravel())
    return [Pair(*row) for row in zip(runs[::2], runs[1::2], segments.is_random_B.tolist(), strict=True)]


def all_pairs(order: SampleOrder, epoch: int) -> list[Pair]:
    return pairs_of(order, epoch, range(order.num_samples(epoch)))


def compare_with_devlin(
    shards: Corpus | Shards, length: int, short_probability: float, seed: int, epoch: int, num_pairs: int
) -> list[Chunk]:
    order = SampleOrder(shards, length, short_probability, seed)  # type: ignore[arg-type]
    expected = devlin_epoch(shards, length - 3, short_probability, seed, epoch)
    found = chunks_of(order.index(epoch))
    assert found == [(chunk.start, chunk.a_end, chunk.end) for chunk in expected]
    sizes = order.chunk_sizes(np.full(len(found), epoch), np.arange(len(found)))
    assert sizes.tolist() == [chunk.num_sentences for chunk in expected]
    compared = range(0, len(found), max(len(found) // num_pairs, 1))
    for index, pair in zip(compared, pairs_of(order, epoch, compared), strict=True):
        assert (pair.a.tolist(), pair.b.tolist()) == devlin_pair(
            shards, expected[index], length - 3, seed, epoch, index
        ), index
        assert pair.is_random == expected[index].is_random
        assert min(len(pair.a), len(pair.b)) >= 1
    return expected


def samples_of(shards: Shards, length: int, seed: int, **changes: float) -> Samples:
    return Samples(shards, DataConfig(shards="", max_predictions=5).model_copy(update=changes), length, seed)


def rows(batch: Batch) -> list[tuple[list[int], ...]]:
    return [
        tuple(np.ravel(tensor[row]).tolist() for tensor in batch.values()) for row in range(len(batch["input_ids"]))
    ]


def stage_of(plan: Plan, **changes: int) -> Stage:
    return plan.stages[1].model_copy(update=changes)


# Pairs


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=2, max_size=6),
    length=st.integers(8, 24),
    short_probability=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_any_corpus_is_paired_as_devlin_does(
    documents: list[list[int]], length: int, short_probability: float, seed: int, epoch: int
) -> None:
    compare_with_devlin(Corpus(documents), length, short_probability, seed, epoch, num_pairs=100)


@pytest.mark.parametrize(("length", "seed", "epoch"), [(32, 0, 0), (128, 3, 1)])
def test_real_text_is_paired_as_devlin_does(shards: Path, length: int, seed: int, epoch: int) -> None:
    chunks = compare_with_devlin(open_shards(shards, "train"), length, 0.1, seed, epoch, num_pairs=200)
    assert len({chunk.target for chunk in chunks}) > 5, "short targets come in all lengths"
    short = [chunk.target < length - 3 for chunk in {chunk.document: chunk for chunk in chunks}.values()]
    assert 0.02 < np.mean(short) < 0.2


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_sentence_is_in_one_chunk_of_an_epoch(shards: Path, epoch: int) -> None:
    train = open_shards(shards, "train")
    index = SampleOrder(train, 64, 0.1, seed=0).index(epoch)
    chunks = sorted(chunks_of(index))
    assert chunks[0][0] == 0
    assert chunks[-1][2] == train.num_sentences
    assert all(start == end for (start, *_), (*_, end) in zip(chunks[1:], chunks[:-1], strict=True)), "no gap"
    assert all(start < a_end for start, a_end, _ in chunks)
    documents = [np.searchsorted(train.document_starts, (start, end - 1), side="right") for start, _, end in chunks]
    assert all(first == last for first, last in documents)


def test_nothing_is_lost_but_by_truncation() -> None:
    corpus = Corpus([[3, 40, 5, 2, 2, 9], [4, 4], [30]])
    order = SampleOrder(corpus, 16, 0.0, seed=1)  # type: ignore[arg-type]
    for (start, a_end, end), pair in zip(chunks_of(order.index(0)), all_pairs(order, 0), strict=True):
        wholes = [corpus.tokens(start, a_end).tolist()]
        wholes += [] if pair.is_random else [corpus.tokens(a_end, end).tolist()]
        for whole, part in zip(wholes, (pair.a.tolist(), pair.b.tolist()), strict=False):
            at = whole.index(part[0])
            assert whole[at : at + len(part)] == part, "what is left is one piece"
            if len(pair.a) + len(pair.b) < 13:
                assert whole == part


@pytest.mark.parametrize("seed", [0, 1])
def test_half_of_the_chunks_that_could_follow_do(shards: Path, seed: int) -> None:
    train = open_shards(shards, "train")
    order = SampleOrder(train, 64, 0.1, seed)
    is_random: dict[bool, list[bool]] = {True: [], False: []}
    for epoch in range(3):
        sizes = {chunk.start: chunk.num_sentences for chunk in devlin_epoch(train, 61, 0.1, seed, epoch)}
        for start, a_end, end in chunks_of(order.index(epoch)):
            is_random[sizes[start] >= 2].append(end == a_end)
    divisible, single = is_random[True], is_random[False]
    print(f"seed {seed}: {np.mean(divisible):.2%} of {len(divisible)} chunks are random")
    assert len(divisible) > 5000
    assert abs(np.mean(divisible) - 0.5) < 0.03
    assert len(single) > 100
    assert all(single)


@pytest.mark.parametrize("num_documents", [2, 3, 5])
def test_negatives_come_from_all_other_documents_evenly(num_documents: int) -> None:
    corpus = Corpus([[5, 7, 6]] * num_documents)
    order = SampleOrder(corpus, 16, 0.1, seed=0)  # type: ignore[arg-type]
    counts = np.zeros((num_documents, num_documents))
    starts = np.zeros(3)
    for epoch in range(1200 // num_documents):
        for pair in all_pairs(order, epoch):
            document, origin = corpus.document_of(pair.a[0]), corpus.document_of(pair.b[0])
            assert (origin != document) == pair.is_random
            if pair.is_random:
                counts[document, origin] += 1
                starts[corpus.sentence_of(pair.b[0]) % 3] += 1
    expected = counts.sum() / (num_documents * (num_documents - 1))
    off_diagonal = counts[~np.eye(num_documents, dtype=bool)]
    assert np.abs(off_diagonal - expected).max() < 5 * expected**0.5
    assert counts.diagonal().sum() == 0
    assert np.abs(starts / starts.sum() - 1 / 3).max() < 0.08, "from any sentence on"


def test_negatives_of_real_text_are_of_another_document(shards: Path) -> None:
    train = open_shards(shards, "train")
    segments = SampleOrder(train, 64, 0.1, seed=2).segments(np.zeros(500, int), np.arange(500))
    sentence = np.searchsorted(train.token_starts, segments.first_token_BS, side="right") - 1
    document = np.searchsorted(train.document_starts, sentence, side="right") - 1
    assert ((document[:, 0] != document[:, 1]) == segments.is_random_B).all()
    assert segments.is_random_B.sum() > 100


@pytest.mark.parametrize("max_length", range(2, 14))
def test_truncated_lengths_are_those_of_the_loop(max_length: int) -> None:
    for a in range(16):
        for b in range(16):
            left = [a, b]
            while sum(left) > max_length:
                left[0 if left[0] > left[1] else 1] -= 1
            assert truncated_lengths(np.array([[a, b]]), max_length).tolist() == [left], (a, b)


def test_both_ends_are_truncated_alike() -> None:
    corpus = Corpus([[40, 40]] * 2)
    order = SampleOrder(corpus, 33, 0.0, seed=0)  # type: ignore[arg-type]
    fronts = []
    for epoch in range(200):
        for start, pair in zip(order.index(epoch).start, all_pairs(order, epoch), strict=True):
            assert (len(pair.a), len(pair.b)) == (15, 15)
            fronts.append(int(pair.a[0] - FIRST_TOKEN - corpus.token_starts[start]))
    assert len(fronts) > 400
    assert abs(np.mean(fronts) - 12.5) < 5 * (25 / 4 / len(fronts)) ** 0.5
    assert abs(np.var(fronts) - 25 / 4) < 2


def test_fewer_than_two_documents_are_refused() -> None:
    with pytest.raises(MsltError, match=r"corpus: split train holds 1 document\(s\); .*at least 2.*validation_share"):
        SampleOrder(Corpus([[4, 5]]), 16, 0.1, seed=0)  # type: ignore[arg-type]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_jumps_are_followed_to_the_end(data: st.DataObject, sizes: list[int]) -> None:
    ends = np.cumsum(sizes)
    starts = ends - sizes
    jump = [
        data.draw(st.integers(i + 1, end))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        for i in range(start, end)
    ]
    expected, i = [], 0
    while i < len(jump):
        expected.append(i)
        i = jump[i]
    assert np.flatnonzero(followed(np.array(jump), starts)).tolist() == expected


def test_the_index_is_the_same_however_the_documents_are_cut(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = open_shards(shards, "train")
    whole = SampleOrder(train, 32, 0.1, seed=0).index(0)
    assert len(whole.start) > 2000
    for block_sentences in (1, 37, 1000):
        monkeypatch.setattr("mslt.data.order.BLOCK_SENTENCES", block_sentences)
        cut = SampleOrder(train, 32, 0.1, seed=0).index(0)
        assert all((one == other).all() for one, other in zip(whole, cut, strict=True))
    assert [column.dtype for column in whole] == [np.uint32, np.uint16, np.uint16]


def test_samples_are_the_same_where_starts_take_eight_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = random_corpus(40, seed=0)
    narrow = SampleOrder(corpus, 32, 0.1, seed=0)  # type: ignore[arg-type]
    chunks, sizes = chunks_of(narrow.index(0)), narrow.chunk_sizes(np.zeros(50, int), np.arange(50))
    pairs = all_pairs(narrow, 0)
    monkeypatch.setattr("mslt.data.order.UINT32_SENTENCES", corpus.num_sentences)
    wide = SampleOrder(corpus, 32, 0.1, seed=0)  # type: ignore[arg-type]
    assert [column.dtype for column in wide.index(0)] == [np.uint64, np.uint16, np.uint16]
    assert chunks_of(wide.index(0)) == chunks
    assert (wide.chunk_sizes(np.zeros(50, int), np.arange(50)) == sizes).all()
    for one, other in zip(all_pairs(wide, 0), pairs, strict=True):
        assert (one.a.tolist(), one.b.tolist(), one.is_random) == (other.a.tolist(), other.b.tolist(), other.is_random)


# sha256 of the columns of index(0), with and without pairs, under the version of the rules that made them.
PINNED_VERSION = 1
PINNED = {
    True: "5dd8e71341ff1ecd08748e1a1471e52703a20abf41e3196ef842fc26425d8fab",
    False: "32b4c6b1827e3c908b3678a6c453ddba7a2a910ea7b3a277f8ab023a5aed3990",
}


@pytest.mark.parametrize("pairs", [True, False])
def test_cached_indices_are_of_this_version_of_the_rules(pairs: bool) -> None:
    order = SampleOrder(random_corpus(500, seed=3), 64, 0.1, 7, pairs)  # type: ignore[arg-type]
    digest = hashlib.sha256(b"".join(column.tobytes() for column in order.index(0))).hexdigest()
    assert (INDEX_VERSION, digest) == (PINNED_VERSION, PINNED[pairs]), "samples changed: raise INDEX_VERSION"


def test_the_two_epochs_last_made_are_kept() -> None:
    made: list[int] = []

    class Watched(Corpus):
        def shared(self, name: str, key: dict, make: object, *_: object) -> object:
            made.extend([key["epoch"]] * (name == "epoch"))
            return super().shared(name, key, make)

    order = SampleOrder(Watched([[5, 7, 6]] * 4), 16, 0.1, seed=0)  # type: ignore[arg-type]
    for epoch in (0, 1, 0, 1, 2, 1, 2, 0, 2, 0):
        order.index(epoch)
    assert made == [0, 1, 2, 0]


# Without next-sentence prediction


def packed(shards: Corpus | Shards, length: int, short_probability: float, seed: int) -> SampleOrder:
    return SampleOrder(shards, length, short_probability, seed, next_sentence_prediction=False)  # type: ignore[arg-type]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=8), min_size=1, max_size=6),
    length=st.integers(8, 24),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_any_corpus_is_packed_with_as_many_sentences_as_fit(
    documents: list[list[int]], length: int, seed: int, epoch: int
) -> None:
    corpus, limit = Corpus(documents), length - 2
    expected = []
    for first, last in zip(corpus.document_starts[:-1], corpus.document_starts[1:], strict=True):
        run: list[int] = []
        for sentence in range(first, last):
            tokens = corpus.tokens(sentence, sentence + 1).tolist()
            if run and len(run) + len(tokens) > limit:
                expected.append(run)
                run = []
            run = run + tokens
        expected.append(run)
    order = packed(corpus, length, 0.0, seed)
    pairs = sorted(all_pairs(order, epoch), key=lambda pair: int(pair.a[0]))
    assert len(pairs) == len(expected)
    for pair, run in zip(pairs, expected, strict=True):
        assert len(pair.b) == 0
        assert not pair.is_random
        assert len(pair.a) == min(len(run), limit)
        at = run.index(pair.a[0])
        assert run[at : at + len(pair.a)] == pair.a.tolist(), "a sentence longer than the sequence is truncated"


def test_packed_samples_have_one_segment_and_no_label(shards: Path) -> None:
    train = open_shards(shards, "train")
    samples = samples_of(train, 48, seed=1, next_sentence_prediction=False)
    batch, special = samples.batch(range(400)), train.special_ids
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert (batch["nsp_labels"] == IGNORED_LABEL).all()
    assert not batch["token_type_ids"].any()
    pairs = pairs_of(samples.order, 0, range(400))
    for row, pair in enumerate(pairs):
        used = batch["mlm_labels"][row] != IGNORED_LABEL
        found = batch["input_ids"][row].clone()
        found[batch["mlm_positions"][row][used]] = batch["mlm_labels"][row][used]
        expected = [special.cls, *pair.a.tolist(), special.sep]
        assert found.tolist() == expected + [special.pad] * (48 - len(expected))
        assert int(batch["attention_mask"][row].sum()) == len(expected)
        assert int(used.sum()) == min(5, max(1, round(len(expected) * 0.15)))
    assert max(len(pair.a) for pair in pairs) == 46


def test_a_sentence_longer_than_the_sequence_is_met_in_full_over_the_epochs() -> None:
    length, num_sentences, num_epochs = 3 * 16, 10, 300
    corpus = Corpus([[length]] * num_sentences)
    order = packed(corpus, 16, 0.0, 0)
    pieces = np.array([pair.a for epoch in range(num_epochs) for pair in all_pairs(order, epoch)]) - FIRST_TOKEN
    assert (np.diff(pieces, axis=1) == 1).all()
    assert len(np.unique(pieces)) == num_sentences * length, "every token of every sentence"
    counts, num_places = np.bincount(pieces[:, 0] % length), length - 14 + 1
    expected = num_epochs * num_sentences / num_places
    assert len(counts) == num_places
    assert np.abs(counts - expected).max() < 5 * expected**0.5, "from any token on alike"


def test_packing_needs_no_second_document() -> None:
    assert packed(Corpus([[4, 5]]), 16, 0.0, 0).num_samples(0) == 1


# Positions


def test_positions_run_through_epochs_without_gap() -> None:
    corpus = Corpus([[5, 7, 6, 3], [2, 9], [12]])
    order = SampleOrder(corpus, 16, 0.1, seed=0)  # type: ignore[arg-type]
    addresses = list(zip(*(part.tolist() for part in order.locate(np.arange(60))), strict=True))
    expected = [(epoch, i) for epoch in range(30) for i in range(order.num_samples(epoch))]
    assert addresses == expected[:60]
    assert addresses[-1][0] > 5
    later_first = SampleOrder(corpus, 16, 0.1, seed=0)  # type: ignore[arg-type]
    epoch_B, index_B = later_first.locate(np.arange(60)[::-1])
    assert list(zip(epoch_B.tolist(), index_B.tolist(), strict=True)) == addresses[::-1]
    backwards = later_first.segments(epoch_B, index_B)
    forwards = order.segments(epoch_B[::-1], index_B[::-1])
    assert (backwards.first_token_BS[::-1] == forwards.first_token_BS).all()
    assert (backwards.num_tokens_BS[::-1] == forwards.num_tokens_BS).all()


@pytest.mark.parametrize("seed", [0, 5])
def test_a_sample_is_the_same_in_whichever_batch_it_comes(shards: Path, seed: int) -> None:
    train = open_shards(shards, "train")
    num_samples = SampleOrder(train, 32, 0.1, seed).num_samples(0)
    positions = [0, 1, 2, 17, num_samples - 1, num_samples, num_samples + 1, 2 * num_samples + 50]
    alone = [rows(samples_of(train, 32, seed).batch([position]))[0] for position in positions]
    together = samples_of(train, 32, seed)
    assert rows(together.batch(positions)) == alone
    assert rows(together.batch(positions[::-1])) == alone[::-1]
    assert rows(together.batch(positions[3:5])) == alone[3:5]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 1)])
def test_world_size_and_workers_do_not_alter_the_data(
    shards: Path, tiny_plan: Plan, world_size: int, num_workers: int
) -> None:
    samples = samples_of(open_shards(shards, "train"), 32, seed=4)
    stage = stage_of(tiny_plan, batch_size=12, steps=3, first_sample=500)
    ranks = [training_batches(samples, stage, rank, world_size, 0, num_workers) for rank in range(world_size)]
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == 3
    for step, shares in enumerate(steps):
        first = 500 + 12 * step
        assert [row for share in shares for row in rows(share)] == rows(samples.batch(range(first, first + 12)))


def test_a_stage_entered_late_goes_on_in_the_data(shards: Path, tiny_plan: Plan) -> None:
    samples = samples_of(open_shards(shards, "train"), 32, seed=4)
    stage = stage_of(tiny_plan, steps=6)
    from_start = [rows(batch) for batch in training_batches(samples, stage, 0, 1, 0, 0)]
    assert len(from_start) == 6
    assert [rows(batch) for batch in training_batches(samples, stage, 0, 1, 4, 0)] == from_start[4:]
    following = stage.model_copy(update={"first_sample": stage.first_sample + 8})
    assert rows(next(training_batches(samples, following, 0, 1, 0, 0))) == from_start[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_samples_are_dealt_out_whole(shards: Path, world_size: int) -> None:
    validation = open_shards(shards, "validation")
    for wanted in (10, 13, 10**6):  # of 13, ranks 1 and 2 of three have nothing left for their second batch
        samples = samples_of(validation, 32, seed=0, evaluation_samples=wanted)
        count = min(wanted, samples.order.num_samples(0))
        dealt = [
            row
            for rank in range(world_size)
            for batch in evaluation_batches(samples, 4, rank, world_size)
            if (batch["mlm_labels"] != IGNORED_LABEL).any()
            for row in rows(batch)
        ]
        assert len(dealt) == count
        assert sorted(dealt) == sorted(rows(samples.batch(range(count))))


def test_epochs_and_seeds_differ_in_order_pairs_and_masks(shards: Path) -> None:
    train = open_shards(shards, "train")
    one, other = SampleOrder(train, 32, 0.1, 0), SampleOrder(train, 32, 0.1, 1)
    epochs = [chunks_of(order.index(epoch)) for order, epoch in ((one, 0), (one, 1), (other, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert [chunk[0] for chunk in epochs[a][:50]] != [chunk[0] for chunk in epochs[b][:50]]
        assert len(set(epochs[a]) & set(epochs[b])) < 0.9 * len(epochs[a])


def test_masks_are_keyed_by_seed_and_sample() -> None:
    def masks(seed: int, epochs: list[int], indices: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Positions, and what was put there, of the same text at each address."""
        ids = np.tile(np.arange(10, 1010), (len(epochs), 1))
        positions, _ = mask_tokens(
            ids, np.ones_like(ids, bool), np.full(len(epochs), 1000), np.array(epochs), np.array(indices), seed=seed,
            mask_probability=0.15, max_predictions=150, mask_id=4, vocab_size=512,
        )  # fmt: skip
        fates = np.where(np.take_along_axis(ids, positions, 1) == 4, 1, 0)
        return [(tuple(p), tuple(f)) for p, f in zip(positions.tolist(), fates.tolist(), strict=True)]

    same, again = masks(0, [3, 3], [8, 8])
    assert same == again == masks(0, [3], [8])[0]
    others = [*masks(0, [4, 3, 8], [8, 9, 3]), *masks(1, [3], [8])]
    for part in (0, 1):
        assert len({same[part], *(other[part] for other in others)}) == 5, ("positions", "fates")[part]


def test_replaced_tokens_are_keyed_by_seed_and_sample() -> None:
    def replaced(seed: int, epoch: int, index: int) -> np.ndarray:
        """What was drawn for each of 5,000 tokens that all are predicted; -1 where nothing was."""
        ids = np.full((1, 5000), 512)  # beyond the vocabulary, as the mask is
        mask_tokens(
            ids, np.ones_like(ids, bool), np.array([5000]), np.array([epoch]), np.array([index]), seed=seed,
            mask_probability=1.0, max_predictions=5000, mask_id=513, vocab_size=512,
        )  # fmt: skip
        return np.where(ids[0] < 512, ids[0], -1)

    drawn = replaced(0, 3, 8)
    assert (drawn == replaced(0, 3, 8)).all()
    for other in (replaced(1, 3, 8), replaced(0, 4, 8), replaced(0, 3, 9), replaced(0, 8, 3)):
        both = (drawn >= 0) & (other >= 0)
        assert both.sum() > 20
        assert (drawn == other)[both].mean() < 0.1


# Batches


@pytest.fixture(scope="module", params=[(32, 5), (64, 20)], ids=["T32-M5", "T64-M20"])
def made(request: pytest.FixtureRequest, shards: Path) -> tuple[Samples, Batch]:
    """1500 samples as one batch; max_predictions binds in the first, not in the second."""
    length, max_predictions = request.param
    samples = samples_of(open_shards(shards, "train"), length, seed=6, max_predictions=max_predictions)
    return samples, samples.batch(range(1500))


def test_layout_is_cls_a_sep_b_sep(made: tuple[Samples, Batch]) -> None:
    samples, batch = made
    special, length = samples.shards.special_ids, samples.sequence_length
    for row in range(300):
        (pair,) = pairs_of(samples.order, 0, [row])
        expected = [special.cls, *pair.a.tolist(), special.sep, *pair.b.tolist(), special.sep]
        num_tokens = len(expected)
        assert num_tokens <= length
        positions, labels = (batch[name][row].numpy() for name in ("mlm_positions", "mlm_labels"))
        found = batch["input_ids"][row].numpy().copy()
        used = labels != IGNORED_LABEL
        found[positions[used]] = labels[used]  # labels are the original tokens, all others stand unchanged
        assert found.tolist() == expected + [special.pad] * (length - num_tokens)
        num_first = len(pair.a) + 2
        num_second = num_tokens - num_first
        types = [0] * num_first + [1] * num_second + [0] * (length - num_tokens)
        assert batch["token_type_ids"][row].tolist() == types
        assert batch["attention_mask"][row].tolist() == [1] * num_tokens + [0] * (length - num_tokens)
        assert batch["nsp_labels"][row] == pair.is_random
    assert 0.3 < batch["nsp_labels"].double().mean() < 0.8


def test_shapes_are_static_and_int64(made: tuple[Samples, Batch]) -> None:
    samples, batch = made
    length, most = samples.sequence_length, samples.config.max_predictions
    shapes = {
        "input_ids": (1500, length),
        "token_type_ids": (1500, length),
        "attention_mask": (1500, length),
        "mlm_positions": (1500, most),
        "mlm_labels": (1500, most),
        "nsp_labels": (1500,),
    }
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == shapes
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert int(batch["attention_mask"].sum(1).max()) == length, "the longest pairs fill the sequence"


def test_number_of_predictions_is_devlins(made: tuple[Samples, Batch]) -> None:
    samples, batch = made
    counts = []
    for labels, num_tokens in zip(batch["mlm_labels"], batch["attention_mask"].sum(1).tolist(), strict=True):
        wanted = min(samples.config.max_predictions, max(1, round(num_tokens * 0.15)))
        used = labels != IGNORED_LABEL
        assert int(used.sum()) == wanted
        assert used[:wanted].all(), "padding stands behind"
        counts.append(wanted)
    assert len(set(counts)) > 1


def test_special_tokens_are_never_predicted(made: tuple[Samples, Batch]) -> None:
    samples, batch = made
    special = samples.shards.special_ids
    for row in range(1500):
        positions, labels = batch["mlm_positions"][row], batch["mlm_labels"][row]
        used = labels != IGNORED_LABEL
        first_sep = int(batch["token_type_ids"][row].argmax()) - 1
        last_sep = int(batch["attention_mask"][row].sum()) - 1
        chosen = positions[used].tolist()
        assert chosen == sorted(set(chosen)), "each once, ascending"
        assert not {0, first_sep} & set(chosen)
        assert chosen[-1] < last_sep
        assert positions[~used].tolist() == [0] * int((~used).sum())
        assert not set(labels[used].tolist()) & {special.pad, special.cls, special.sep, special.mask}
        assert batch["input_ids"][row][[0, first_sep, last_sep]].tolist() == [special.cls, special.sep, special.sep]


def test_eighty_ten_ten(made: tuple[Samples, Batch]) -> None:
    samples, batch = made
    used = batch["mlm_labels"] != IGNORED_LABEL
    now = batch["input_ids"].gather(1, batch["mlm_positions"])[used]
    labels = batch["mlm_labels"][used]
    total = len(labels)
    assert total > 4000
    masked, same = now == samples.shards.special_ids.mask, now == labels
    for share, expected in ((masked, 0.8), (same, 0.1), (~masked & ~same, 0.1)):
        assert abs(share.double().mean() - expected) < 5 * (expected * (1 - expected) / total) ** 0.5 + 1 / 512
    replaced = now[~masked & ~same]
    distinct = samples.shards.vocab_size * (1 - (1 - 1 / samples.shards.vocab_size) ** len(replaced))
    assert len(replaced.unique()) > 0.9 * distinct, "random entries of the whole vocabulary"
    assert int(replaced.max()) < samples.shards.vocab_size


def test_every_position_is_masked_alike(made: tuple[Samples, Batch]) -> None:
    samples, batch = made
    length = samples.sequence_length
    full = batch["attention_mask"].sum(1) == length
    positions, labels = batch["mlm_positions"][full], batch["mlm_labels"][full]
    counts = torch.bincount(positions[labels != IGNORED_LABEL], minlength=length).double()
    assert counts[0] == counts[-1] == 0
    separators = torch.bincount(batch["token_type_ids"][full].argmax(1) - 1, minlength=length)
    maskable = int(full.sum()) - separators[1:-1].double()
    expected = maskable * counts.sum() / maskable.sum()
    assert int(full.sum()) > 300
    assert ((counts[1:-1] - expected).abs() < 5 * expected.sqrt()).all()


# Whole words


def slow_whole_words(words: list[list[int]], keys: list[int], wanted: int) -> list[int]:
    """`create_masked_lm_predictions` with whole words; `keys` by position instead of a shuffle."""
    chosen: list[int] = []
    for word in sorted(words, key=lambda word: keys[word[0]]):
        if len(chosen) >= wanted:
            break
        if len(chosen) + len(word) <= wanted:
            chosen += word
    return sorted(chosen)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    sides=st.tuples(st.lists(st.booleans(), min_size=1, max_size=14), st.lists(st.booleans(), max_size=14)),
    probability=st.sampled_from([0.05, 0.15, 0.6]),
    max_predictions=st.integers(1, 8),
    seed=st.integers(0, 2**32),
    index=st.integers(0, 10**6),
)
def test_whole_words_are_masked_as_devlins_script_does(
    sides: tuple[list[bool], list[bool]], probability: float, max_predictions: int, seed: int, index: int
) -> None:
    a, b = sides  # True: the token goes on a word
    length = 34
    goes_on = np.array([False, *a, False, *b, False])
    maskable = np.zeros((2, length), bool)
    maskable[:, 1 : len(goes_on) - 1] = True
    maskable[:, len(a) + 1] = False
    ids = np.zeros((2, length), np.int64)
    ids[:, : len(goes_on)] = np.where(goes_on, 7, 6)
    words: list[list[int]] = []
    for position in np.flatnonzero(maskable[0]).tolist():
        if goes_on[position] and maskable[0, position - 1]:
            words[-1].append(position)
        else:
            words.append([position])
    wanted = min(max_predictions, max(1, round(len(goes_on) * probability)), int(maskable[0].sum()))
    keys = [int(keyed.bits(seed, "mask_position", 3, index, position)) for position in range(length)]

    def mask(is_continuation_V: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return mask_tokens(
            ids.copy(), maskable, np.full(2, len(goes_on)), np.array([0, 3]), np.array([5, index]), seed=seed,
            mask_probability=probability, max_predictions=max_predictions, mask_id=4, vocab_size=100,
            is_continuation_V=is_continuation_V,
        )  # fmt: skip

    positions, labels = mask(np.arange(100) == 7)
    assert positions[1][labels[1] != IGNORED_LABEL].tolist() == slow_whole_words(words, keys, wanted)
    one_each, tokens = mask(np.zeros(100, bool)), mask(None)
    assert all((one == other).all() for one, other in zip(one_each, tokens, strict=True)), "words of one token each"


def test_whole_words_of_real_text(shards: Path) -> None:
    train = open_shards(shards, "train")
    samples = samples_of(train, 64, seed=6, max_predictions=10, whole_word_masking=True)
    batch = samples.batch(range(500))
    goes_on = train.is_continuation_V
    assert 50 < goes_on.sum() < 500
    num_pieces = 0
    for row in range(500):
        used = batch["mlm_labels"][row] != IGNORED_LABEL
        assert int(used.sum()) <= min(10, max(1, round(int(batch["attention_mask"][row].sum()) * 0.15)))
        original = batch["input_ids"][row].clone()
        original[batch["mlm_positions"][row][used]] = batch["mlm_labels"][row][used]
        chosen = set(batch["mlm_positions"][row][used].tolist())
        for position, token in enumerate(original.tolist()):
            if goes_on[token] and original[position - 1] not in (train.special_ids.cls, train.special_ids.sep):
                assert (position in chosen) == (position - 1 in chosen), "all of a word or nothing"
                num_pieces += position in chosen
    assert num_pieces > 300
    alone = [rows(samples.batch([position]))[0] for position in (0, 7, 300)]
    assert alone == [rows(batch)[position] for position in (0, 7, 300)]
