"""What a person sees of a sample and of a corpus is what is there."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mslt.config import DataConfig
from mslt.data.inspection import describe_corpus, describe_sample, histogram, render_corpus, render_sample
from mslt.data.loader import Samples
from mslt.data.masking import IGNORED_LABEL
from mslt.data.shards import open_shards
from mslt.errors import MsltError


def samples_of(shards: Path, length: int = 64, **changes: bool) -> Samples:
    config = DataConfig(shards="", max_predictions=10).model_copy(update=changes)
    return Samples(open_shards(shards, "train"), config, length, seed=3)


@pytest.mark.parametrize("pairs", [True, False])
def test_a_sample_is_shown_as_it_is_batched(shards: Path, pairs: bool) -> None:
    samples = samples_of(shards, next_sentence_prediction=pairs)
    tokenizer = AutoTokenizer.from_pretrained(samples.shards.tokenizer_folder)
    seen = set()
    for position in range(40):
        sample = describe_sample(samples, position)
        batch = {name: tensor[0] for name, tensor in samples.batch([position]).items()}
        sides = [[token["token"] for token in segment["tokens"]] for segment in sample["segments"]]
        shown = ["[CLS]"] + [token for side in sides for token in [*side, "[SEP]"]]
        length = sample["num_tokens"]
        assert shown == tokenizer.convert_ids_to_tokens(batch["input_ids"].tolist())[:length]
        assert length == int(batch["attention_mask"].sum())
        labels = [token["label"] for segment in sample["segments"] for token in segment["tokens"] if "label" in token]
        used = batch["mlm_labels"][batch["mlm_labels"] != IGNORED_LABEL]
        assert labels == tokenizer.convert_ids_to_tokens(used.tolist())
        assert sample["num_predictions"] == len(labels)
        assert sample["next"] == ({0: "IsNext", 1: "Random"}[int(batch["nsp_labels"])] if pairs else None)
        documents = [segment["document"] for segment in sample["segments"]]
        assert (len(set(documents)) == 2) == (sample["next"] == "Random")
        assert json.loads(json.dumps(sample)) == sample
        seen.add(sample["next"])
    assert len(seen) == (2 if pairs else 1)


def test_rendering_marks_every_prediction(shards: Path) -> None:
    samples = samples_of(shards)
    for position in range(20):
        sample = describe_sample(samples, position)
        *text, legend = render_sample(sample).splitlines()
        assert "predict x" in legend
        marks = re.findall(r"\[MASK→|\{[^{}]+\}", "\n".join(text))
        assert len(marks) >= sample["num_predictions"]
        for name in "AB":
            assert sum(line.startswith(f"{name}  document") for line in text) == 1


def test_rendering_joins_pieces_and_tells_the_fates_apart() -> None:
    tokens = [
        {"token": "the"},
        {"token": "cat"},
        {"token": "[MASK]", "label": "sat"},
        {"token": "on"},
        {"token": "play"},
        {"token": "##ing"},
        {"token": "[MASK]", "label": "##s"},
        {"token": "table", "label": "chair"},
        {"token": "mat", "label": "mat"},
    ]
    sample = {
        "position": 1234, "epoch": 0, "index": 1234, "sequence_length": 16, "num_tokens": 12, "num_predictions": 4,
        "next": "IsNext", "segments": [{"name": "A", "document": 7, "num_tokens": 9, "tokens": tokens}],
    }  # fmt: skip
    text = render_sample(sample)
    assert "   the cat [MASK→sat] on playing[MASK→##s] {table→chair} {mat}\n" in text
    assert text.startswith("sample 1,234: epoch 0, index 1,234  IsNext\n12 of 16 tokens, 4 to predict\n")


def test_positions_count_on_over_epochs(shards: Path) -> None:
    samples = samples_of(shards)
    size = samples.order.num_samples(0)
    shown = describe_sample(samples, size + 2)
    assert (shown["epoch"], shown["index"]) == (1, 2)
    with pytest.raises(MsltError, match="position -1"):
        describe_sample(samples, -1)


def test_a_corpus_is_counted(shards: Path) -> None:
    samples = samples_of(shards)
    train, entry = samples.shards, samples.shards.manifest.splits["train"]
    corpus = describe_corpus(samples, num_samples=700)
    assert (corpus["documents"], corpus["sentences"], corpus["tokens"]) == (
        entry.documents, entry.sentences, entry.tokens,
    )  # fmt: skip
    assert corpus["tokens_per_sentence"]["mean"] == pytest.approx(entry.tokens / entry.sentences)
    assert corpus["sentences_per_document"]["mean"] == pytest.approx(entry.sentences / entry.documents)
    assert sum(entry["count"] for entry in corpus["tokens_per_sentence"]["bins"]) == train.num_sentences
    every = np.concatenate(train.token_blocks)
    assert corpus["unknown_share"] == (every == train.special_ids.unk).mean()
    tokenizer = AutoTokenizer.from_pretrained(train.tokenizer_folder)
    most = corpus["frequent_tokens"][0]
    entry_id = tokenizer.convert_tokens_to_ids(most["token"])
    assert entry_id == np.bincount(every).argmax()
    assert most["share"] == pytest.approx((every == entry_id).mean())
    attention = samples.batch(range(700))["attention_mask"].double()
    assert corpus["samples_looked_at"] == 700
    assert corpus["broken_rules"] == []
    assert corpus["padding_share"] == pytest.approx(1 - float(attention.mean()))
    assert corpus["tokens_per_sample"]["max"] == int(attention.sum(1).max())
    assert corpus["tokens_per_sample"]["mean"] == pytest.approx(float(attention.sum(1).mean()))
    assert json.loads(json.dumps(corpus)) == corpus


def test_slices_make_no_difference(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe_corpus(samples_of(shards), num_samples=50)
    monkeypatch.setattr("mslt.data.inspection.SLICE", 97)
    monkeypatch.setattr("mslt.data.inspection.SAMPLES_AT_ONCE", 7)
    assert describe_corpus(samples_of(shards), num_samples=50) == whole


def test_a_corpus_is_rendered(shards: Path) -> None:
    corpus = describe_corpus(samples_of(shards), num_samples=200)
    text = render_corpus(corpus)
    assert f"{corpus['documents']:,} documents" in text
    for title in ("sentences per document", "tokens per sentence", "tokens per sample"):
        assert f"\n{title}: mean " in text
    assert "█" in text
    assert max(map(len, text.splitlines()[:-1])) < 120


@settings(derandomize=True, deadline=None, max_examples=80)
@given(parts=st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=20), min_size=1, max_size=4))
def test_histograms_count_everything_once(parts: list[list[int]]) -> None:
    every = [number for part in parts for number in part]
    found = histogram(np.array(part) for part in parts)
    assert found["mean"] == pytest.approx(np.mean(every))
    assert (found["min"], found["max"]) == (min(every), max(every))
    for entry in found["bins"]:
        assert entry["count"] == sum(entry["from"] <= number <= entry["to"] for number in every)
    assert sum(entry["count"] for entry in found["bins"]) == len(every)
