"""`mslt evaluate mlm`: the loss that transformers has on the same samples, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.config import DataConfig
from mslt.data.loader import EVALUATION_SEED, Batch, Samples
from mslt.data.shards import open_shards
from mslt.errors import MsltError
from tests.checkpoints import write

NUM_SAMPLES = 24
OPTIONS = ("--sequence-length", 32, "--samples", NUM_SAMPLES, "--max-predictions", 5)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["evaluate", "mlm", *map(str, arguments)], catch_exceptions=False)


def evaluate(folder: Path, shards: Path, *options: Any) -> dict[str, Any]:
    return json.loads(invoke(folder, "--shards", shards, *OPTIONS, "--json", *options).stdout)


def refused(*arguments: Any) -> str:
    with pytest.raises(MsltError) as refusal:
        invoke(*arguments)
    return str(refusal.value)


def batch_of(shards: Path, **data: Any) -> Batch:
    config = DataConfig(shards=str(shards), max_predictions=5, **data)
    return Samples(open_shards(shards, "validation"), config, 32, EVALUATION_SEED).batch(range(NUM_SAMPLES))


def labels_of(batch: Batch) -> torch.Tensor:
    """As Hugging Face wants them: at every position, -100 where nothing is predicted."""
    labels_BT = torch.full_like(batch["input_ids"], -100)
    for row, (positions, labels) in enumerate(zip(batch["mlm_positions"], batch["mlm_labels"], strict=True)):
        labels_BT[row, positions[labels >= 0]] = labels[labels >= 0]
    return labels_BT


@torch.no_grad()
def theirs(folder: Path, batch: Batch) -> tuple[float, float]:
    """Loss and accuracy by transformers alone, all samples at once."""
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    labels, types = labels_of(batch), batch["token_type_ids"]
    if model.config.type_vocab_size == 1:
        types = torch.zeros_like(types)
    out = model(batch["input_ids"], batch["attention_mask"], token_type_ids=types, labels=labels)
    right = out.logits.argmax(-1)[labels >= 0] == labels[labels >= 0]
    return out.loss.item(), right.float().mean().item()


@pytest.mark.parametrize("options", [(), ("--whole-word-masking", "--no-next-sentence-prediction")])
@pytest.mark.parametrize("model_class", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_the_loss_is_transformers(tmp_path: Path, shards: Path, model_class: str, options: tuple[str, ...]) -> None:
    folder = write(tmp_path / "model", shards / "tokenizer", model_class)
    data = {"whole_word_masking": True, "next_sentence_prediction": False} if options else {}
    batch = batch_of(shards, **data)
    found = evaluate(folder, shards, "--batch-size", 7, *options)
    loss, accuracy = theirs(folder, batch)
    assert found["mlm_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["mlm_accuracy"] == pytest.approx(accuracy)
    assert found["mlm_tokens"] == (batch["mlm_labels"] >= 0).sum()
    assert found["samples"] == NUM_SAMPLES
    assert "nsp_loss" not in found
    assert found["logged"] is None
    assert found["remarks"] == []


@torch.no_grad()
def test_both_losses_of_bert_are_transformers(tmp_path: Path, shards: Path) -> None:
    folder, batch = write(tmp_path / "model", shards / "tokenizer", "BertForPreTraining"), batch_of(shards)
    found = evaluate(folder, shards)
    out = AutoModelForPreTraining.from_pretrained(folder).eval()(
        batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], labels=labels_of(batch),
        next_sentence_label=batch["nsp_labels"],
    )  # fmt: skip
    assert found["mlm_loss"] + found["nsp_loss"] == pytest.approx(out.loss.item(), rel=1e-6)
    right = out.seq_relationship_logits.argmax(-1) == batch["nsp_labels"]
    assert found["nsp_accuracy"] == pytest.approx(right.float().mean().item())
    assert found["mlm_loss"] == pytest.approx(theirs(folder, batch)[0], rel=1e-6)


def test_what_is_printed(tmp_path: Path, shards: Path) -> None:
    folder = write(tmp_path / "model", shards / "tokenizer", "BertForPreTraining")
    found, shown = evaluate(folder, shards), invoke(folder, "--shards", shards, *OPTIONS).stdout
    assert f"{NUM_SAMPLES} held-out samples of 32 tokens" in shown
    assert f"MLM {found['mlm_loss']:.4f} nats, {found['mlm_accuracy']:.1%} right" in shown
    assert f"NSP {found['nsp_loss']:.4f} nats" in shown
    assert f"MLM {found['unigram_entropy_nats']:.4f} nats" in shown
    assert "logged" not in shown


def test_low_precision_is_computed_in_it(tmp_path: Path, shards: Path) -> None:
    for model_class in ("BertForPreTraining", "ElectraForMaskedLM"):
        folder = write(tmp_path / model_class, shards / "tokenizer", model_class)
        exact, rounded = (evaluate(folder, shards, "--precision", p)["mlm_loss"] for p in ("fp32", "bf16"))
        assert exact != rounded
        assert exact == pytest.approx(rounded, rel=0.02)


@pytest.mark.parametrize(
    "model_class",
    ["BertModel", "BertForSequenceClassification", "BertForNextSentencePrediction", "RobertaModel", "ElectraModel",
     "ElectraForPreTraining"],
)  # fmt: skip
def test_a_head_that_is_not_there_is_not_made_up(tmp_path: Path, shards: Path, model_class: str) -> None:
    assert hasattr(transformers, model_class)
    folder = write(tmp_path / "model", shards / "tokenizer", model_class)
    message = refused(folder, "--shards", shards, *OPTIONS)
    assert f"{folder}: has no MLM head" in message
    assert "take a checkpoint that was pretrained with masked words" in message


def test_half_a_head_is_none(tmp_path: Path, shards: Path) -> None:
    folder = write(tmp_path / "model", shards / "tokenizer", "BertForPreTraining")
    tensors = load_file(folder / "model.safetensors")
    del tensors["cls.predictions.transform.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "cls.predictions.transform.dense.weight missing" in refused(folder, "--shards", shards, *OPTIONS)


def test_a_loss_that_is_not_finite(tmp_path: Path, shards: Path) -> None:
    folder = write(tmp_path / "model", shards / "tokenizer", "BertForPreTraining")
    tensors = {name: tensor * torch.nan for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f"{folder}: its loss is not finite" in refused(folder, "--shards", shards, *OPTIONS)


def test_other_vocabularies(tmp_path: Path, shards: Path) -> None:
    folder = write(tmp_path / "model", shards / "tokenizer", "BertForPreTraining")
    for file in ("tokenizer.json", "vocab.txt"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"the"', '"tha"').replace("\nthe\n", "\ntha\n"))
    message = refused(folder, "--shards", shards, *OPTIONS)
    assert f"{folder}: its vocabulary is not that of the shards in {shards}" in message
    assert "512 and 512 entries, 2 unlike: 'tha' is missing in the one and is " in message
    assert "prepare shards with this checkpoint's vocabulary" in message
    for file in (shards / "tokenizer").iterdir():
        (folder / file.name).unlink()
    assert "holds no tokenizer" in refused(folder, "--shards", shards, *OPTIONS)
    small = write(tmp_path / "small", shards / "tokenizer", "BertForPreTraining", vocab_size=500)
    assert "has embeddings of 500 entries, the shards" in refused(small, "--shards", shards, *OPTIONS)


def test_the_same_vocabulary_in_another_file_will_do(tmp_path: Path, shards: Path) -> None:
    folder = write(tmp_path / "model", shards / "tokenizer", "BertForPreTraining")
    expected = evaluate(folder, shards)
    (folder / "tokenizer.json").unlink()
    assert (folder / "vocab.txt").is_file()
    assert evaluate(folder, shards) == expected


def test_more_tokens_than_positions(tmp_path: Path, shards: Path) -> None:
    """RoBERTa's table of 33 holds 32 positions."""
    for model_class in ("BertForPreTraining", "RobertaForMaskedLM"):
        folder = write(tmp_path / model_class, shards / "tokenizer", model_class)
        message = refused(folder, "--shards", shards, "--sequence-length", 33)
        assert f"--sequence-length 33: {folder} has 32 positions; give 32 or less" in message


def test_nonsense(tmp_path: Path, shards: Path) -> None:
    folder = write(tmp_path / "model", shards / "tokenizer", "BertForPreTraining")
    assert "no model folder (it has no config.json)" in refused(tmp_path, "--shards", shards)
    assert "make the shards with `mslt data prepare`" in refused(folder, "--shards", tmp_path / "none", *OPTIONS)
    message = refused(folder, "--shards", shards, "--mask-probability", 2, "--samples", 0)
    assert "2 mistakes" in message
    assert "mask_probability: Input should be less than 1" in message
    assert "--max-predictions 20: is not below --sequence-length 16" in refused(
        folder, "--shards", shards, "--sequence-length", 16
    )
    message = refused(tmp_path / "a" / "b" / "c", "--shards", shards)
    assert "no such folder" in message
    unreadable = shutil.copytree(folder, tmp_path / "unreadable")
    (unreadable / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": "wide"}))
    assert f"{unreadable}: no checkpoint" in refused(unreadable, "--shards", shards, *OPTIONS)
