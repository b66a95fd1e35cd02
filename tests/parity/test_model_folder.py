"""M13: a stage's end is a plain Hugging Face folder."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoTokenizer, BertForPreTraining, BertModel

from mslt.config import ModelConfig
from mslt.data.shards import open_shards
from mslt.errors import MsltError
from mslt.models import factory
from mslt.models.checkpoint import save_model_folder
from mslt.models.surgery import State

PROVENANCE = {"plan": "a" * 64, "stage": 2, "versions": {"torch": "2"}}


@pytest.fixture
def state(tiny_model: ModelConfig) -> State:
    state = factory.initial_state(tiny_model, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.fixture
def folder(tiny_model: ModelConfig, state: State, tmp_path: Path, shards: Path) -> Path:
    model = factory.build(tiny_model, 4, state)
    save_model_folder(tmp_path / "model", model, open_shards(shards, "train").tokenizer_folder, PROVENANCE, "")
    return tmp_path / "model"


def test_pretraining_model_loads_with_no_key_missing_or_over(folder: Path, state: State) -> None:
    model, loading = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert type(model) is BertForPreTraining
    assert {name: list(found) for name, found in loading.items() if found} == {}
    loaded = dict(model.named_parameters())
    assert loaded.keys() == state.keys()
    for name, parameter in loaded.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state[name]), name
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_encoder_alone_loads_with_the_heads_left_over(folder: Path, state: State) -> None:
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is BertModel
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert all(name.startswith("cls.") for name in loading["unexpected_keys"]), loading["unexpected_keys"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[f"bert.{name}"]), name
    assert {f"bert.{name}" for name, _ in model.named_parameters()} == {
        name for name in state if name.startswith("bert.")
    }


def test_config_says_what_the_recipe_said(folder: Path, tiny_model: ModelConfig) -> None:
    config = AutoConfig.from_pretrained(folder)
    for name, value in tiny_model.model_dump(exclude={"family"}).items():
        assert getattr(config, name) == value, name
    assert config.architectures == ["BertForPreTraining"]
    assert config.tie_word_embeddings


def test_tokenizer_goes_along(folder: Path, shards: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(shards / "tokenizer")
    text = ("The import statement finds a module.", "It binds names in the local scope.")
    assert ours(*text) == theirs(*text)
    encoded = ours(*text)["input_ids"]
    assert len(encoded) > 10
    assert ours.decode(encoded, skip_special_tokens=True).replace(" ", "") == "".join(text).lower().replace(" ", "")
    assert len(ours) == 512
    for path in (shards / "tokenizer").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_loaded_model_reads_what_the_tokenizer_writes(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForPreTraining.from_pretrained(folder)
    inputs = tokenizer("A [MASK] module", "is imported", return_tensors="pt")
    out = model(**inputs)
    assert out.prediction_logits.shape == (1, inputs["input_ids"].shape[1], 512)
    assert out.seq_relationship_logits.shape == (1, 2)
    assert tokenizer.mask_token_id in inputs["input_ids"]


def test_folder_says_where_it_comes_from(folder: Path) -> None:
    assert json.loads((folder / "provenance.json").read_text()) == PROVENANCE
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"], "nothing beside it is left"


def test_folder_is_replaced_whole(folder: Path, tiny_model: ModelConfig, shards: Path) -> None:
    (folder / "stale").write_text("from an interrupted run")
    state = factory.initial_state(tiny_model, 2, seed=1)
    model = factory.build(tiny_model, 2, state)
    save_model_folder(folder, model, open_shards(shards, "train").tokenizer_folder, {}, "")
    assert not (folder / "stale").exists()
    assert factory.read_model(folder).config.num_hidden_layers == 2


def test_what_is_no_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MsltError, match=r"no model folder \(it has no config.json\)"):
        factory.read_model(tmp_path)
