"""Golden losses: what the tiny recipe gives on a made text, step by step. They change only in a commit that says why.

To write them anew: python -m pytest tests/golden --write-golden
"""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from mslt.data import keyed
from mslt.validation import validate
from tests.distributed.runs import losses, train, write_recipe

GOLDEN = Path(__file__).with_name("losses.json")
NOUNS = [f"noun{number}" for number in range(100)]
VERBS = [f"verb{number}" for number in range(100)]
# fp32 on other processors and with other math libraries rounds differently, and 60 steps of LAMB spread that.
TOLERANCE = 2e-3


def made_text(folder: Path) -> None:
    """120 documents of sentences whose verb follows from their noun: something to learn, the same everywhere."""
    for document in range(120):
        sentences = []
        for sentence in range(12):
            subject, thing = (int(keyed.integers(100, 0, "golden", document, sentence, place)) for place in (0, 1))
            sentences.append(f"{NOUNS[subject]} {VERBS[subject]} {NOUNS[thing]} and {VERBS[thing]} .")
        (folder / f"{document:03d}.txt").write_text(" ".join(sentences))


def test_losses_of_the_tiny_recipe(tmp_path: Path, tiny_recipe: dict[str, Any], request: pytest.FixtureRequest) -> None:
    (tmp_path / "text").mkdir()
    made_text(tmp_path / "text")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "and", ".", *NOUNS, *VERBS]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    recipe = {
        "sources": [{"kind": "text", "path": str(tmp_path / "text")}],
        "vocabulary": {"file": str(tmp_path / "vocab.txt")},
        "validation_share": 0.1,
    }
    prepare(validate(DataRecipe, recipe, "golden"), tmp_path / "shards")
    run = tmp_path / "run"
    train(write_recipe(tmp_path / "recipe.yaml", tiny_recipe), tmp_path / "shards", run, workers=1)
    found = {str(step): list(pair) for step, pair in losses(run).items()}
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(found) + "\n")
    expected = json.loads(GOLDEN.read_text())
    assert found.keys() == expected.keys()
    for step, pair in expected.items():
        assert found[step] == pytest.approx(pair, abs=TOLERANCE), f"step {step}"
