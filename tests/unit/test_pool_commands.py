"""`mslt pool` by the command line: a small checkpoint, made-up rows that can be learnt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate import pool_runs
from mslt.evaluate.glue_tasks import TASKS
from mslt.evaluate.opening import tuned_on
from mslt.evaluate.pool import Diverged, open_backbone
from mslt.evaluate.pool_errors import compared, positive_of
from mslt.files import lock_alone
from mslt.heads.pooling import PoolingHead, load_head, new_head, save_head
from tests.command_lines import run
from tests.encoders import write_encoder
from tests.glue_files import write_glue
from tests.squad_files import questions, write_squad

QUICK = ["--max-tokens", "24", "--learning-rate", "0.01"]


def command(*arguments: object) -> Any:
    return run("pool", *arguments)


def printed(*arguments: object) -> Any:
    return json.loads(command(*arguments, "--json").stdout)


def flip_first_label(file: Path) -> None:
    header, first, *more = file.read_text().splitlines()
    file.write_text("\n".join([header, first[:-1] + str(1 - int(first[-1])), *more, ""]))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data-dir", str(write_glue(tmp_path_factory.mktemp("glue"), num_train=128)), "--subset"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, glue: list[str], encoder: Path) -> Path:
    """Two poolers on SST-2 and RTE each, on hidden states 1 to 2 of three layers."""
    out = tmp_path_factory.mktemp("heads") / "out"
    command("train", encoder, "--task", "SST-2", "--task", "RTE", "--pooler", "adapter", "--pooler", "mix",
            "--adapter-width", "8", "--layers", "1:2", "--epochs", "2", "--out", out, *QUICK, *glue)  # fmt: skip
    return out


def test_heads_are_folders_that_say_what_they_are(heads: Path) -> None:
    names = [f"{task}-{pooler}-8-seed-0" for task in ("RTE", "SST-2") for pooler in ("adapter", "mix")]
    assert sorted(folder.name for folder in heads.glob("[!.]*")) == names
    described = json.loads((heads / "SST-2-adapter-8-seed-0" / "head.json").read_text())
    assert (described["task"], described["metric"], described["max_tokens"], described["rows"]) == (
        "SST-2", "accuracy", 24, 128,
    )  # fmt: skip
    assert described["settings"]["first_state"] == 1
    assert described["sizes"]["head"] == 32 * 8 + 8 + 24 * 8 * 2 * 2 + 2
    assert described["speedup_of_layers"] > 0
    assert {"accuracy", "f1", "matthews"} <= described["scores"]["validation"].keys()
    assert len(described["tokenizer"]) == 64


def test_heads_of_both_tasks_are_scored_again_alike(heads: Path, glue: list[str], tmp_path: Path) -> None:
    folders = sorted(heads.glob("[!.]*"))
    found = printed("eval", *folders, *glue, "--importance", tmp_path / "states.png")
    for folder, each in zip(folders, found, strict=True):
        described = json.loads((folder / "head.json").read_text())
        assert (each["task"], each["scores"]) == (described["task"], described["scores"])
        assert each["importance"]["states"] == [1, 2]
    with Image.open(tmp_path / "states.png") as picture:
        assert picture.size[0] > 200
    text = command("eval", folders[0], *glue).stdout
    for said in ("smaller", "deployed", "a further task", "MB"):
        assert said in text


def test_heads_answer_on_a_text(heads: Path, tmp_path: Path) -> None:
    folders = sorted(heads.glob("[!.]*"))
    text, pair = ["--text", "the film was good ."], ["--pair", "the book was bad ."]
    found = printed("eval", *folders[:2], *text, *pair) + printed("eval", *folders[2:], *text)
    assert [each["task"] for each in found] == ["RTE", "RTE", "SST-2", "SST-2"]
    for each, labels in zip(found, [["entailment", "not_entailment"]] * 2 + [["0", "1"]] * 2, strict=True):
        assert list(each["shares"]) == labels
        assert sum(each["shares"].values()) == pytest.approx(1)
        assert each["shares"][each["answer"]] == max(each["shares"].values())
    (alone,) = printed("eval", folders[2], *text)
    assert alone["shares"] == pytest.approx(found[2]["shares"])
    assert "SST-2" in command("eval", *folders[2:], *text).stdout
    with pytest.raises(MsltError, match="--pair"):
        command("eval", *folders, "--pair", "b")


def test_an_encoder_is_found_in_a_stage_and_a_tokenizer_elsewhere(
    heads: Path, encoder: Path, glue: list[str], tmp_path: Path
) -> None:
    stage = tmp_path / "run" / "stage-1"
    model = shutil.copytree(encoder, stage / "model")
    (tmp_path / "run" / "plan.json").write_text("{}")
    (stage / "summary.json").write_text("{}")
    (found,) = printed("eval", heads / "RTE-mix-8-seed-0", "--checkpoint", stage, *glue)
    assert found["scores"] == json.loads((heads / "RTE-mix-8-seed-0" / "head.json").read_text())["scores"]
    for file in model.glob("tokenizer*"):
        file.unlink()
    (made,) = printed("train", stage, "--task", "SST-2", "--out", tmp_path / "out", "--tokenizer", encoder, *QUICK,
                      *glue)  # fmt: skip
    with pytest.raises(MsltError, match="tokenizer"):
        command("eval", made["folder"], *glue)
    assert printed("eval", made["folder"], "--tokenizer", encoder, *glue)[0]["scores"] == made["scores"]
    both = printed("errors", made["folder"], made["folder"], "--tokenizer", encoder, *glue)
    assert both["each"][made["folder"]]["right"] == pytest.approx(made["headline"])
    with pytest.raises(MsltError, match="neither a head"):
        command("errors", made["folder"], stage, *glue, "--tokenizer", encoder)


def test_a_head_of_another_encoder_or_tokenizer_is_refused(heads: Path, glue: list[str], tmp_path: Path) -> None:
    folder = heads / "SST-2-mix-8-seed-0"
    with pytest.raises(MsltError, match="a head of another encoder: weights"):
        command("eval", folder, "--checkpoint", write_encoder(tmp_path / "e", seed=1, num_hidden_layers=3), *glue)
    described = json.loads((folder / "head.json").read_text())
    other = tmp_path / "head"
    other.mkdir()
    (other / "head.json").write_text(json.dumps({**described, "tokenizer": "another"}))
    (other / "head.safetensors").write_bytes((folder / "head.safetensors").read_bytes())
    with pytest.raises(MsltError, match="another tokenizer"):
        command("eval", other, *glue)


def with_nan(head: PoolingHead, is_lost: bool) -> PoolingHead:
    with torch.no_grad():
        head.output.bias.mul_(torch.nan if is_lost else 1)
    return head


def test_a_head_that_diverges_takes_no_other_with_it(
    encoder: Path, glue: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", encoder, "--task", "SST-2", "--pooler", "mean", "--pooler", "last", *QUICK, *glue]
    whole = printed(*train, "--out", tmp_path / "whole")
    monkeypatch.setattr(
        pool_runs,
        "new_head",
        lambda settings, model, seed: with_nan(new_head(settings, model, seed), settings.kind == "mean"),
    )
    with pytest.raises(Diverged, match=r"SST-2-mean-16-seed-0: diverged, and not written; the other 1 heads"):
        command(*train, "--out", tmp_path / "out")
    (folder,) = (tmp_path / "out").glob("[!.]*")
    assert folder.name == "SST-2-last-16-seed-0"
    assert json.loads((folder / "head.json").read_text())["scores"] == whole[1]["scores"]
    with pytest.raises(MsltError, match="--precision fp16"):
        command(*train, "--out", tmp_path / "more", "--precision", "fp16")
    lost = load_head(folder, open_backbone(str(encoder), None, "cpu").model)
    described = json.loads((folder / "head.json").read_text())
    save_head(tmp_path / "lost", with_nan(lost, True), described, **{  # as it were trained elsewhere
        name: described[name] for name in ("task", "labels", "max_tokens", "sizes")})  # fmt: skip
    for arguments in (["eval", tmp_path / "lost"], ["errors", tmp_path / "lost", folder]):
        with pytest.raises(MsltError, match="not finite"):
            command(*arguments, *glue)


def test_heads_that_read_padding_train_score_and_answer(encoder: Path, glue: list[str], tmp_path: Path) -> None:
    (made,) = printed("train", encoder, "--task", "SST-2", "--pad-states", "keep", "--out", tmp_path, *QUICK, *glue)
    assert made["settings"]["pad_states"] == "keep"
    (again,) = printed("eval", made["folder"], *glue)
    assert again["scores"] == made["scores"]
    (said,) = printed("eval", made["folder"], "--text", "the film was good .")
    assert sum(said["shares"].values()) == pytest.approx(1)


def test_spans_train_and_score(encoder: Path, tmp_path: Path) -> None:
    made = questions(48)
    files = ["--squad-train", write_squad(tmp_path / "train.json", made), "--squad-dev",
             write_squad(tmp_path / "dev.json", made[:16])]  # fmt: skip
    (found,) = printed("train", encoder, "--task", "SQuAD", "--out", tmp_path / "out", *files, "--subset",
                       "--stride", 4, "--question-tokens", 10, "--skip", "--max-tokens", 32,
                       "--learning-rate", 0.01)  # fmt: skip
    assert found["settings"]["tokens"] == "each"
    assert found["sizes"]["head"] == 32 * 16 + 16 + 2 * 16 * 4 + 2 + 2 * 32
    assert {"exact", "f1", "HasAns_exact", "NoAns_exact"} <= found["scores"]["dev"].keys()
    (again,) = printed("eval", found["folder"], "--squad-dev", tmp_path / "dev.json", "--subset")
    assert again["scores"] == found["scores"]


def test_a_cache_is_written_once_and_trained_from(encoder: Path, glue: list[str], tmp_path: Path) -> None:
    cached = ["--cache-dtype", "fp32", "--max-tokens", "24", *glue]
    (said,) = printed("cache", encoder, "--task", "SST-2", "--out", tmp_path / "cache", *cached)
    (file,) = (tmp_path / "cache" / "SST-2").glob("*.safetensors")
    assert said["bytes"] <= file.stat().st_size <= said["bytes"] + 200
    assert said["bytes"] == said["tokens"] * 4 * 32 * 4
    before = file.stat().st_mtime_ns
    train = ["train", encoder, "--task", "SST-2", *QUICK, *glue]
    (read,) = printed(*train, "--out", tmp_path / "a", "--cache", tmp_path / "cache", "--cache-dtype", "fp32")
    (computed,) = printed(*train, "--out", tmp_path / "b")
    assert file.stat().st_mtime_ns == before
    assert read["headline"] == pytest.approx(computed["headline"], abs=0.04)
    with pytest.raises(MsltError, match=rf"--max-cache-gb 1e-06: .*\({said['bytes']:,} bytes"):
        command("cache", encoder, "--task", "SST-2", "--out", tmp_path / "c", "--max-cache-gb", "0.000001", *cached)
    assert not (tmp_path / "c").exists()


def test_the_curve_over_the_encoders_epochs_goes_on(encoder: Path, glue: list[str], tmp_path: Path) -> None:
    train = ["train", encoder, "--task", "SST-2", "--out", tmp_path / "out", "--backbone-learning-rate", "0.003",
             "--backbone-batch-size", "8", *QUICK, *glue]  # fmt: skip
    (first,) = printed(*train, "--backbone-epochs", "0.5")
    assert not (tmp_path / "out" / "figure-1.png").exists()
    before = (tmp_path / "out" / "SST-2-epochs-0.5" / "point.json").stat().st_mtime_ns
    both = printed(*train, "--backbone-epochs", "0.5,4")
    assert (tmp_path / "out" / "SST-2-epochs-0.5" / "point.json").stat().st_mtime_ns == before
    assert both[0] == first
    assert [point["epochs"] for point in both] == [0.5, 4]
    assert both[1]["whole_headline"] > 0.9, "learnt"
    assert both[1]["heads"][0]["headline"] >= both[1]["whole_headline"] - 0.1
    assert (tmp_path / "out" / "figure-1.png").is_file()
    head, whole = both[1]["heads"][0]["folder"], tmp_path / "out" / "SST-2-epochs-4" / "backbone"
    assert tuned_on(str(whole)) == "SST-2"
    found = printed("errors", head, whole, *glue)
    assert (found["task"], found["positive"], found["rows"]) == ("SST-2", "1", 32)
    assert found["each"][str(whole)]["right"] == pytest.approx(both[1]["whole_headline"])
    assert found["each"][head]["right"] == pytest.approx(both[1]["heads"][0]["headline"])
    assert "both right" in command("errors", head, whole, *glue).stdout
    other = shutil.copytree(glue[1], tmp_path / "other")
    flip_first_label(other / "SST-2" / "dev.tsv")
    with lock_alone(tmp_path / "out" / ".lock", None), pytest.raises(MsltError, match="another process trains there"):
        command(*train, "--backbone-epochs", "4")
    for said, more in (
        ("heads", ["--adapter-width", "4"]), ("new_pooler", ["--new-pooler"]), ("data_sha256", ["--data-dir", other]),
    ):  # fmt: skip
        with pytest.raises(MsltError, match=rf"of other settings \({said}"):
            command(*train, "--backbone-epochs", "4", *more)


def test_errors_are_counted_as_by_hand() -> None:
    labels, a, b = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]
    found = compared(labels, {"a": a, "b": b}, 1)
    assert found["each"]["a"] == {
        "right": 3 / 6, "predicted_positive": 4 / 6, "recall": 2 / 3, "negatives_right": 1 / 3,
    }  # fmt: skip
    assert found["each"]["b"]["right"] == 3 / 6
    assert (found["both_right"], found["neither_right"]) == (2 / 6, 2 / 6)
    assert found["both_of_either"] == 2 / 4
    assert (found["first_alone_right"], found["second_alone_right"]) == (1 / 6, 1 / 6)
    assert [positive_of(TASKS[name]) for name in ("RTE", "MRPC", "MNLI")] == [0, 1, None]
    assert "recall" not in compared([0, 2], {"a": [0, 2], "b": [1, 2]}, None)["each"]["a"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "SST"], "did you mean SST-2"),
        (["--task", "SQuAD", "--squad-dev", "x.json"], "give both, or neither"),
        (["--task", "SST-2", "--pooler", "adaptor"], "did you mean adapter"),
        (["--task", "SST-2", "--layers", "1:9"], "--layers 1:9: give all, or two hidden states like 1:3"),
        (["--task", "SST-2", "--adapter-width", "0"], "adapter width 0"),
        (["--task", "SST-2", "--learning-rate", "0"], "--learning-rate 0"),
        (["--task", "SST-2", "--max-tokens", "64"], "has 40 positions"),
        (["--task", "SST-2", "--backbone-epochs", "1.5"], "--backbone-epochs 1.5"),
        (["--task", "SST-2", "--backbone-epochs", "inf"], "--backbone-epochs inf"),
        (["--task", "SST-2", "--skip"], "skip: is of spans alone"),
        (["--task", "SST-2", "--backbone-epochs", "x"], "apart by commas"),
        (["--task", "SST-2", "--backbone-epochs", "1", "--cache", "c"], "leave one out"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    encoder: Path, glue: list[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    more = [] if "--max-tokens" in arguments else ["--max-tokens", "24"]
    with pytest.raises(MsltError, match=said):
        command("train", encoder, "--out", tmp_path / "out", *arguments, *more, *glue)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train", "search"])
def test_a_seed_of_more_than_64_bits_is_refused(name: str, encoder: Path, glue: list[str], tmp_path: Path) -> None:
    arguments = ["pool", name, encoder, "--task", "SST-2", "--out", tmp_path / "out", "--seed", 2**64, *glue]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert (result.exit_code, "--seed" in result.output) == (2, True)


def test_folders_that_are_none_are_refused(encoder: Path, heads: Path, glue: list[str], tmp_path: Path) -> None:
    with pytest.raises(MsltError, match="holds no head"):
        command("eval", tmp_path, *glue)
    with pytest.raises(MsltError, match="no empty folder"):
        command("train", encoder, "--task", "SST-2", "--out", heads, *QUICK, *glue)
    (tmp_path / "out").mkdir()
    with (
        lock_alone(tmp_path / "out" / ".lock", None), pytest.raises(MsltError, match="another process trains there"),
    ):  # fmt: skip
        command("train", encoder, "--task", "SST-2", "--out", tmp_path / "out", *QUICK, *glue)
    with pytest.raises(MsltError, match="neither a head of `mslt pool train` nor a fine-tuned classifier"):
        command("errors", heads / "RTE-mix-8-seed-0", encoder, *glue)
    with pytest.raises(MsltError, match="They say RTE, SST-2"):
        command("errors", heads / "RTE-mix-8-seed-0", heads / "SST-2-mix-8-seed-0", *glue)
