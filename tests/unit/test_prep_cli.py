"""`mslt data`: the quickstart recipe, JSON, and the shortcuts."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.recipe import DataRecipe
from mslt.cli.data import app
from mslt.errors import MsltError
from mslt.validation import read_yaml, validate

QUICKSTART = Path(__file__).parents[2] / "launch/recipes/data-quickstart.yaml"


def test_quickstart_recipe_makes_shards_of_python_docs(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    result = CliRunner().invoke(app, ["prepare", str(QUICKSTART), str(out), "--json"], catch_exceptions=False)
    values = json.loads(result.stdout)
    assert values["made"]
    assert values["sources"][0]["kept"]["bytes"] > 1_500_000
    assert values["tokenizer"]["vocab_size"] == 4096
    assert values["splits"]["validation"]["documents"] > 5
    assert 4 < values["unigram_entropy_nats"] < 8.32
    again = CliRunner().invoke(app, ["prepare", str(QUICKSTART), str(out)], catch_exceptions=False)
    assert "already made" in again.stdout
    verified = CliRunner().invoke(app, ["verify", str(out), "--json"], catch_exceptions=False)
    assert json.loads(verified.stdout)["manifest_hash"] == values["hash"]


def test_text_shortcut(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for index in range(60):
        (tmp_path / f"text/{index}.txt").write_text(f"The number {index} is a number like any other number. " * 5)
    arguments = ["prepare", "--text", str(tmp_path / "text"), "--vocab-size", "256", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "60 documents" in result.stdout


def test_recipe_and_shortcut_together_are_refused(tmp_path: Path) -> None:
    for arguments in (
        ["r.yaml", "out", "--text", "x"],
        ["out"],
        ["r.yaml", "out", "--vocab-size", "512"],
        ["out", "--text", "x", "--limit", "5"],
        ["r.yaml", "out", "--validation-share", "0.5"],
    ):
        with pytest.raises(MsltError, match="give RECIPE OUT and no other option"):
            CliRunner().invoke(app, ["prepare", *arguments], catch_exceptions=False)
    with pytest.raises(MsltError, match="no such file"):
        CliRunner().invoke(app, ["prepare", str(tmp_path / "r.yaml"), "out"], catch_exceptions=False)


def test_quickstart_recipe_is_whole() -> None:
    assert validate(DataRecipe, read_yaml(QUICKSTART), "quickstart").vocabulary.size == 4096
