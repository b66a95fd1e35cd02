"""A user's mistake, at the command line: one message that names the thing and the remedy, status 2, nothing written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mslt.cli.main import main
from mslt.rundir import RunDir


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What `mslt ARGUMENTS` says on stderr as it ends with status 2."""
    monkeypatch.setattr("sys.argv", ["mslt", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.err.startswith("mslt: ")
    assert "Traceback" not in told.err
    return told.err


@pytest.fixture
def refuse_train(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_recipe: dict[str, Any],
    shards: Path,
) -> Any:
    """`mslt train` with changes to the recipe is refused; returns the message, and no run directory was made."""

    def run(changes: dict[str, Any] | None = None, shards: Path = shards, workers: int = 1) -> str:
        for section, change in (changes or {}).items():
            tiny_recipe[section] = tiny_recipe[section] | change if isinstance(change, dict) else change
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tiny_recipe))
        run_dir = tmp_path / "run"
        options = ("--shards", shards, "--run-dir", run_dir, "--workers", str(workers))
        message = refused(monkeypatch, capsys, "train", recipe, *options)
        assert not run_dir.exists()
        return message

    return run


def test_wrong_keys(refuse_train: Any) -> None:
    message = refuse_train({"model": {"hiden_size": 3}, "training": {"batch_size": "many"}})
    assert "2 mistakes" in message
    assert "model.hiden_size: unknown key" in message
    assert "training.batch_size" in message


def test_k_that_does_not_divide_the_layers(refuse_train: Any) -> None:
    assert "schedule.k: 3 does not divide model.num_hidden_layers 4; take one of 1, 2, 4" in refuse_train(
        {"schedule": {"k": 3}}
    )


def test_no_shards(refuse_train: Any, tmp_path: Path) -> None:
    assert "no such folder; make the shards with `mslt data prepare`" in refuse_train(shards=tmp_path / "none")


def test_shards_of_another_tokenizer(refuse_train: Any, tmp_path: Path, shards: Path) -> None:
    copied = tmp_path / "shards"
    shutil.copytree(shards, copied)
    tokenizer = json.loads((copied / "tokenizer" / "tokenizer.json").read_text())
    (copied / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))  # the same words, other bytes
    assert "shards were made with another tokenizer" in refuse_train(shards=copied)


def test_a_tokenizer_larger_than_the_model(refuse_train: Any) -> None:
    assert "set model.vocab_size to at least 512" in refuse_train({"model": {"vocab_size": 511}})


def test_a_missing_shard(refuse_train: Any, tmp_path: Path, shards: Path) -> None:
    copied = tmp_path / "shards"
    shutil.copytree(shards, copied)
    (copied / "train-00000.arrow").unlink()
    message = refuse_train(shards=copied)
    assert "train-00000.arrow: missing" in message
    assert "prepare the shards anew" in message


def test_fewer_samples_than_a_batch(refuse_train: Any) -> None:
    message = refuse_train({"training": {"batch_size": 10**6}})
    assert "fewer than one batch of training.batch_size 1000000" in message


def test_a_batch_that_the_workers_do_not_divide(refuse_train: Any) -> None:
    assert "training.batch_size 8 is not a multiple of the 3 workers" in refuse_train(workers=3)


def test_an_engine_that_holds_a_number_of_the_recipe(refuse_train: Any, tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text('{"gradient_clipping": 2.0}')
    message = refuse_train({"engine": str(tmp_path / "engine.json")})
    assert "gradient_clipping: belongs to the recipe, under training.clip_norm" in message


def test_a_run_directory_of_another_plan(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_recipe: dict[str, Any],
    tiny_plan: Any,
    shards: Path,
) -> None:
    recipe, run = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
    recipe.write_text(yaml.safe_dump(tiny_recipe))
    run.path.mkdir()
    other = tiny_plan.model_copy(update={"clip_norm": 3.0})
    run.plan.write_text(other.model_dump_json())
    message = refused(monkeypatch, capsys, "train", recipe, "--shards", shards, "--run-dir", run.path)
    assert "clip_norm: 3.0 → 1.0" in message
    assert "another --run-dir" in message
    assert [path.name for path in run.path.iterdir()] == ["plan.json"]


def test_a_text_folder_that_is_empty_or_binary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    assert str(text) in refused(monkeypatch, capsys, "data", "prepare", "--text", text, out)
    (text / "picture.txt").write_bytes(b"\x89PNG\x00\x01\x02" * 100)
    message = refused(monkeypatch, capsys, "data", "prepare", "--text", text, out)
    assert "1 document: 1 damaged" in message
    assert not out.exists()


def test_runs_to_compare_that_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "no run directory" in refused(monkeypatch, capsys, "compare", tmp_path)


def test_a_recipe_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "bert-base" in refused(monkeypatch, capsys, "plan", "bert-bse")
    assert "no such file" in refused(monkeypatch, capsys, "plan", "missing.yaml")
