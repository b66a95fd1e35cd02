"""Shared by all tests: shards of real English, a small model, and a recipe that trains it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from mslt.config import ModelConfig, parse_recipe
from mslt.engine.ds_config import read_engine_config
from mslt.plan import Plan
from mslt.schedule import make_plan
from mslt.validation import validate

torch.set_num_threads(1)  # two processes run tests side by side, on two cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden/losses.json anew")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder of Python's own docs: 512 entries in the vocabulary, over 100 documents to train on."""
    sections = {
        "sources": [{"kind": "python_docs", "max_files": 300}],
        "vocabulary": {"size": 512},
        "validation_share": 0.1,
    }
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    manifest, _ = prepare(validate(DataRecipe, sections, "shards for tests"), folder)
    assert manifest.tokenizer.vocab_size == 512
    assert manifest.splits["train"].documents >= 100
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=512,
        max_position_embeddings=32,
    )


@pytest.fixture(scope="session")
def tiny_sections(tiny_model: ModelConfig) -> dict[str, Any]:
    """A recipe's sections: three stages of 20 steps. `data.shards` is to be given on the command line."""
    return {
        "model": tiny_model.model_dump(),
        "data": {
            "shards": "given on the command line",
            "max_predictions": 5,
            "evaluation_samples": 32,
        },
        "schedule": {"name": "mslt", "k": 2, "steps": 60, "retrain_share": 1 / 3},
        "training": {"sequence_length": 32, "batch_size": 8, "micro_batch_size": 4},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 5},
        "engine": "zero0_fp32",
        "watch": {"log_every": 1, "checkpoint_every": 4},
    }


@pytest.fixture
def tiny_recipe(tiny_sections: dict[str, Any]) -> dict[str, Any]:
    """The same, to change at will."""
    return copy.deepcopy(tiny_sections)


@pytest.fixture
def tiny_plan(tiny_recipe: dict[str, Any]) -> Plan:
    recipe = parse_recipe(tiny_recipe, "recipe for tests")
    return make_plan(recipe, read_engine_config(recipe.engine))
