"""100,000 samples of a generated corpus against their definition, from the tokens alone: each says where it is from."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mslt.config import DataConfig
from mslt.data.inspection import broken_rules, count_samples
from mslt.data.loader import Batch, Samples, training_batches
from mslt.data.masking import IGNORED_LABEL
from mslt.plan import Plan
from tests.corpus import FIRST_TOKEN, Corpus, random_corpus

NUM_SAMPLES = 100_000
LENGTH, MAX_PREDICTIONS = 64, 8
SPECIAL = Corpus.special_ids


def samples_of(corpus: Corpus, length: int = LENGTH, seed: int = 0, **changes: float) -> Samples:
    config = DataConfig(shards="", max_predictions=MAX_PREDICTIONS).model_copy(update=changes)
    return Samples(corpus, config, length, seed)  # type: ignore[arg-type]


def joined(batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    parts = list(batches)
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all((one[name] == other[name]).all() for name in one)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return random_corpus(13_000, seed=0)


@dataclass(frozen=True)
class Drawn:
    """100,000 samples, and their tokens as they were before masking."""

    batch: dict[str, np.ndarray]
    original: np.ndarray

    @property
    def is_used(self) -> np.ndarray:
        return self.batch["mlm_labels"] != IGNORED_LABEL


@pytest.fixture(scope="module", params=[False, True], ids=["tokens", "whole words"])
def drawn(request: pytest.FixtureRequest, corpus: Corpus) -> Drawn:
    samples = samples_of(corpus, whole_word_masking=request.param)
    assert samples.order.num_samples(0) > NUM_SAMPLES
    batch = joined(samples.batch(range(first, first + 1000)) for first in range(0, NUM_SAMPLES, 1000))
    original, used = batch["input_ids"].copy(), batch["mlm_labels"] != IGNORED_LABEL
    row, slot = np.nonzero(used)
    original[row, batch["mlm_positions"][row, slot]] = batch["mlm_labels"][row, slot]
    return Drawn(batch, original)


def test_layout_and_lengths(drawn: Drawn) -> None:
    original, length = drawn.original, drawn.batch["attention_mask"].sum(1)
    assert original.shape == (NUM_SAMPLES, LENGTH)
    assert length.max() == LENGTH
    rows = np.arange(NUM_SAMPLES)
    assert (original[:, 0] == SPECIAL.cls).all()
    assert (original[rows, length - 1] == SPECIAL.sep).all()
    assert ((original == SPECIAL.sep).sum(1) == 2).all()
    assert ((original == SPECIAL.cls).sum(1) == 1).all()
    assert ((original == SPECIAL.pad).sum(1) == LENGTH - length).all()
    assert not (original == SPECIAL.mask).any()


def test_negatives_are_of_two_documents_and_half_of_those_that_draw(drawn: Drawn, corpus: Corpus) -> None:
    original, is_b = drawn.original, drawn.batch["token_type_ids"] == 1
    is_random = drawn.batch["nsp_labels"] == 1
    rows = np.arange(NUM_SAMPLES)
    first_b = is_b.argmax(1)
    a_first, a_last, b_first = original[:, 1], original[rows, first_b - 2], original[rows, first_b]
    assert ((corpus.document_of(a_first) != corpus.document_of(b_first)) == is_random).all()
    assert (corpus.document_of(a_first) == corpus.document_of(a_last)).all()
    next_sentence = corpus.sentence_of(a_last) + 1
    assert (corpus.sentence_of(b_first)[~is_random] >= next_sentence[~is_random]).all(), "B follows"

    samples = samples_of(corpus)
    sizes = samples.order.chunk_sizes(*samples.order.locate(rows))
    assert is_random[sizes == 1].all(), "a chunk of one sentence has no next one"
    share = is_random[sizes > 1].mean()
    print(f"{share:.2%} of {(sizes > 1).sum():,} chunks of two sentences or more are negatives")
    assert (sizes > 1).sum() > 0.5 * NUM_SAMPLES
    assert abs(share - 0.5) < 0.005


def test_both_sides_are_pieces_of_the_text(drawn: Drawn) -> None:
    is_text = drawn.original >= FIRST_TOKEN
    both = is_text[:, 1:] & is_text[:, :-1]
    step = np.diff(drawn.original, axis=1)
    assert (step[both] == 1).all()


def test_predictions(drawn: Drawn, corpus: Corpus, request: pytest.FixtureRequest) -> None:
    used, labels = drawn.is_used, drawn.batch["mlm_labels"]
    length, count = drawn.batch["attention_mask"].sum(1), drawn.is_used.sum(1)
    wanted = np.clip(np.rint(0.15 * length), 1, MAX_PREDICTIONS)
    if "whole" in request.node.name:
        assert (count <= wanted).all()
        assert count.sum() > 0.98 * wanted.sum()
    else:
        assert (count == np.minimum(wanted, length - 3)).all()
    assert count.max() == MAX_PREDICTIONS
    assert labels[used].min() >= FIRST_TOKEN, "no special token"
    positions = drawn.batch["mlm_positions"]
    assert (np.diff(positions, axis=1)[used[:, 1:]] > 0).all(), "each once, ascending"

    stands = np.take_along_axis(drawn.batch["input_ids"], positions, axis=1)[used]
    masked, kept = stands == SPECIAL.mask, stands == labels[used]
    for share, expected in ((masked, 0.8), (kept, 0.1), (~masked & ~kept, 0.1)):
        assert abs(share.mean() - expected) < 0.005
    random_tokens = stands[~masked & ~kept]
    assert abs(random_tokens.mean() / corpus.vocab_size - 0.5) < 0.005, "of the whole vocabulary"


def test_every_position_of_a_full_row_is_predicted_alike(drawn: Drawn, request: pytest.FixtureRequest) -> None:
    if "whole" in request.node.name:
        pytest.skip("a word that exceeds the budget is passed over, so that long words are rarer")
    full = drawn.batch["attention_mask"].sum(1) == LENGTH
    counts = np.bincount(drawn.batch["mlm_positions"][full][drawn.is_used[full]], minlength=LENGTH)
    maskable = (drawn.original[full] >= FIRST_TOKEN).sum(0)
    expected = maskable * counts.sum() / maskable.sum()
    assert counts[0] == counts[-1] == 0
    assert (np.abs(counts - expected)[1:-1] < 5 * expected[1:-1] ** 0.5).all()


@pytest.mark.parametrize("changes", [{}, {"whole_word_masking": True}, {"next_sentence_prediction": False}], ids=str)
def test_the_checking_function_finds_nothing(corpus: Corpus, changes: dict[str, bool]) -> None:
    samples = samples_of(corpus, **changes)
    counts = count_samples(samples, range(30_000))
    assert counts["samples"] == 30_000
    assert broken_rules(counts, samples.config.whole_word_masking, tolerance=0.01) == []
    assert ("divisible" in counts) == changes.get("next_sentence_prediction", True)


def test_the_checking_function_agrees_with_the_tokens(corpus: Corpus) -> None:
    samples = samples_of(corpus)
    counts, batch = count_samples(samples, range(3000)), samples.batch(range(3000))
    assert counts["tokens"] == int(batch["attention_mask"].sum())
    assert counts["predictions"] == int((batch["mlm_labels"] != IGNORED_LABEL).sum())
    assert counts["divisible_next"] == int((batch["nsp_labels"] == 0).sum())
    assert counts["single"] + counts["divisible"] == 3000


BROKEN = {
    "too_long": "longer than the sequence",
    "too_many_predictions": "more predictions",
    "special_predicted": "special tokens",
    "single_next": "one-sentence chunks",
    "wrong_document": "of one document",
    "empty_side": "empty A or B",
    "predictions": "are due",
    "divisible_next": "IsNext of chunks",
    "masked": "masked: ",
    "kept": "kept: ",
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_checking_function_names_what_is_broken(corpus: Corpus, name: str) -> None:
    counts = count_samples(samples_of(corpus), range(2000))
    counts[name] += counts["predictions"] // 10
    assert any(BROKEN[name] in line for line in broken_rules(counts, tolerance=0.04))


# The same samples, however they are asked for


@pytest.mark.parametrize(
    ("world_size", "num_workers", "first_step"), [(1, 1, 0), (1, 4, 0), (3, 0, 0), (3, 4, 0), (1, 0, 13), (3, 1, 13)]
)
def test_ranks_workers_and_jumps_do_not_alter_a_sample(
    corpus: Corpus, tiny_plan: Plan, world_size: int, num_workers: int, first_step: int
) -> None:
    stage = tiny_plan.stages[0].model_copy(update={"batch_size": 24, "steps": 20, "first_sample": 5000})
    expected = joined([samples_of(corpus).batch(range(5000 + 24 * first_step, 5000 + 24 * 20))])
    ranks = [
        training_batches(samples_of(corpus), stage, rank, world_size, first_step, num_workers)
        for rank in range(world_size)
    ]
    found = joined(share for shares in zip(*ranks, strict=True) for share in shares)
    assert same(found, expected)


def test_a_jump_lands_where_walking_leads(corpus: Corpus) -> None:
    walked, jumped = samples_of(corpus), samples_of(corpus)
    far = 3 * walked.order.num_samples(0) + 17
    for epoch in range(4):
        walked.order.index(epoch)
    assert same(joined([walked.batch(range(far, far + 50))]), joined([jumped.batch(range(far, far + 50))]))


def test_another_epoch_masks_the_same_sentences_otherwise() -> None:
    samples = samples_of(random_corpus(300, seed=1), short_sequence_probability=0.0, next_sentence_prediction=False)
    size = samples.order.num_samples(0)
    assert size == samples.order.num_samples(1), "without pairs and short samples the runs are the same"
    by_start: list[dict[int, tuple[int, ...]]] = [{}, {}]
    for epoch, found in enumerate(by_start):
        first = joined([samples.batch(range(epoch * size, (epoch + 1) * size))])
        starts = samples.order.index(epoch).start.tolist()
        found |= dict(zip(starts, map(tuple, first["mlm_positions"].tolist()), strict=True))
    assert by_start[0].keys() == by_start[1].keys()
    assert np.mean([by_start[0][start] == by_start[1][start] for start in by_start[0]]) < 0.1


# Any corpus

CORPORA = st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=9), min_size=2, max_size=6).map(Corpus)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(corpus=CORPORA, seed=st.integers(0, 2**32), epoch=st.integers(0, 2), pairs=st.booleans(), whole=st.booleans())
def test_every_sentence_is_used_once_an_epoch_but_for_truncation(
    corpus: Corpus, seed: int, epoch: int, pairs: bool, whole: bool
) -> None:
    samples = samples_of(corpus, 16, seed, next_sentence_prediction=pairs, whole_word_masking=whole)
    order = samples.order
    size = order.num_samples(epoch)
    segments = order.segments(np.full(size, epoch), np.arange(size))
    index = order.index(epoch)
    ends = index.start.astype(int) + index.a_size + index.b_size
    covered = sorted(zip(index.start.tolist(), ends.tolist(), strict=True))
    assert [sentence for start, end in covered for sentence in range(start, end)] == list(range(corpus.num_sentences))

    met = np.zeros(corpus.vocab_size, int)
    for first, count, is_random in zip(
        segments.first_token_BS.tolist(), segments.num_tokens_BS.tolist(), segments.is_random_B.tolist(), strict=True
    ):
        sides = zip(first[:1], count[:1], strict=True) if is_random else zip(first, count, strict=True)
        for start, num_tokens in sides:
            met[FIRST_TOKEN + start : FIRST_TOKEN + start + num_tokens] += 1
    assert met.max() == 1, "no token twice"
    whole_samples = segments.num_tokens_BS.sum(1) < order.max_tokens
    for start, end, is_whole in zip(index.start.tolist(), ends.tolist(), whole_samples.tolist(), strict=True):
        if is_whole:
            assert met[corpus.tokens(start, end)].all(), "nothing is lost where nothing had to be truncated"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    corpus=CORPORA,
    seed=st.integers(0, 2**32),
    positions=st.lists(st.integers(0, 120), min_size=1, max_size=12),
    pairs=st.booleans(),
    whole=st.booleans(),
)
def test_a_sample_does_not_depend_on_its_batch(
    corpus: Corpus, seed: int, positions: list[int], pairs: bool, whole: bool
) -> None:
    options = {"next_sentence_prediction": pairs, "whole_word_masking": whole}
    together = joined([samples_of(corpus, 16, seed, **options).batch(positions)])
    alone = joined(samples_of(corpus, 16, seed, **options).batch([position]) for position in positions)
    assert same(together, alone)
