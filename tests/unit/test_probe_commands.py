"""`mslt probe` by the command line: a small encoder, made-up tasks."""

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate import senteval
from mslt.evaluate.intervals import Z_95, packed, paired, unpacked
from mslt.evaluate.senteval import checkpoints_of
from mslt.heads.layer_probe import Features
from mslt.report.probing import best_layer, difference_intervals
from tests.command_lines import run
from tests.encoders import write_encoder
from tests.probing_files import sentence, write_probing


def command(*arguments: object) -> Any:
    return run("probe", *arguments)


def printed(*arguments: object) -> Any:
    return json.loads(command(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return [write_encoder(folder / f"e/{name}", seed=n, num_hidden_layers=3) for n, name in enumerate(("one", "other"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_probing(tmp_path_factory.mktemp("probing"))


FAST = ("--classifier", "logistic")


@pytest.fixture(scope="module")
def probed(encoders: list[Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    command("senteval", *encoders, "--data-dir", data, "--out", out, "--pooling", "mean", *FAST)
    return out


def test_a_search_knows_what_the_words_say(encoders: list[Path], data: Path, tmp_path: Path) -> None:
    options = ["--data-dir", data, "--task", "Tense", "--pooling", "mean", "--repetitions", 2, "--out", tmp_path]
    found = printed("senteval", encoders[0], *options)["e-one"][0]
    assert found["task"] == "Tense"
    assert found["rows"] == {"tr": 120, "va": 40, "te": 40}
    assert len(found["accuracy"]) == len(found["control"]) == 4
    assert min(found["accuracy"]) >= 0.95
    assert max(found["control"]) <= 0.8
    assert found["majority"] == found["majority_of_test"] == 0.5
    assert found["dev"] == [pytest.approx(sum(run["dev"][k] for run in found["runs"]) / 2) for k in range(4)]
    assert found["protocol"] == "mlp on standardized features, mean"
    for k in range(4):
        runs = [run["accuracy"][k] for run in found["runs"]]
        assert found["accuracy"][k] == pytest.approx(sum(runs) / 2)
        assert found["selectivity"][k] == found["accuracy"][k] - found["control"][k]
        assert found["low"][k] <= found["accuracy"][k] <= found["high"][k]
    other = printed("senteval", encoders[0], *options[:-1], tmp_path / "other", "--seed", 1)["e-one"][0]
    assert len({run["seed"] for result in (found, other) for run in result["runs"]}) == 4, "seed 1 is no part of seed 0"
    folder = tmp_path / "e-one/senteval-mean-mlp"
    written = json.loads((folder / "Tense.json").read_text())
    for each in written["runs"]:
        assert [unpacked(text, 40).mean() for text in each.pop("right")] == pytest.approx(each["accuracy"])
    assert written == found, "but for which rows were right"
    assert sorted(path.name for path in folder.iterdir()) == ["Tense.json", "heatmap.csv", "heatmap.png"]
    assert not list(tmp_path.rglob("*.npy")), "gone when the task is done"
    assert Image.open(folder / "heatmap.png").width > 200


def test_what_is_done_is_not_done_again(
    encoders: list[Path], data: Path, probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*encoders, "--data-dir", data, "--out", probed, "--pooling", "mean", *FAST]
    command("senteval", *options)
    file = probed / "e-one/senteval-mean-logistic/Tense.json"
    before = json.loads(file.read_text())
    file.unlink()  # as if killed before it
    done = []
    monkeypatch.setattr(senteval, "_probe_task", lambda name, *rest: done.append(name) or before)
    command("senteval", *options)
    assert done == ["Tense"]
    with pytest.raises(MsltError, match=r"is the result of other settings \(seed 0, now 1\)"):
        command("senteval", *options, "--seed", 1)


def test_all_checkpoints_are_looked_at_before_one_is_probed(encoders: list[Path], data: Path, tmp_path: Path) -> None:
    short = write_encoder(tmp_path / "e/short", max_position_embeddings=20)
    with pytest.raises(MsltError, match=r"--max-tokens 30: .* has 20 positions"):
        command(
            "senteval", encoders[0], short, "--data-dir", data, "--max-tokens", 30, *FAST, "--out", tmp_path / "out"
        )
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentence(random.Random(index), 12) for index in range(40)))
    with pytest.raises(MsltError, match=r"--max-tokens 30: .* has 20 positions"):
        command("mlm", encoders[0], short, "--text", text, "--max-tokens", 30, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_are_kept_where_asked(
    encoders: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [encoders[0], "--data-dir", data, "--task", "Tense", "--out", tmp_path, "--keep-features"]
    first = printed("senteval", *options, *FAST)["e-one"][0]["accuracy"]
    assert (tmp_path / "e-one/features-cls/Tense.npy").stat().st_size == 128 + 201 * 4 * 32 * 2
    (tmp_path / "e-one/senteval-cls-logistic/Tense.json").unlink()
    monkeypatch.setattr(senteval, "write_features", lambda *rest: pytest.fail("they are there"))
    assert printed("senteval", *options, *FAST)["e-one"][0]["accuracy"] == first
    command("senteval", *options[:-1], *FAST, "--raw")
    monkeypatch.undo()
    claim = tmp_path / "e-one/features-cls/Tense.json"
    (tmp_path / "e-one/senteval-cls-logistic/Tense.json").unlink()
    assert json.loads(claim.read_text())["keep"], "a later command does not take back what was asked for"
    of_others = json.loads(claim.read_text()) | {"made_of": {"checkpoint": "another"}}
    claim.write_text(json.dumps(of_others))
    (tmp_path / "e-one/features-cls/Tense.npy").write_bytes(b"of another checkpoint")
    assert printed("senteval", *options, *FAST)["e-one"][0]["accuracy"] == first, "made anew"
    for name, left in (("Tense.json", b"{"), ("Tense.json", b"[]"), ("Tense.npy", b""), ("Tense.npy", b"\x93NUMPY")):
        (tmp_path / "e-one/senteval-cls-logistic/Tense.json").unlink()
        (claim.parent / name).write_bytes(left)
        assert printed("senteval", *options, *FAST)["e-one"][0]["accuracy"] == first, "damaged, so made anew"
    size = (claim.parent / "Tense.npy").stat().st_size
    os.truncate(claim.parent / "Tense.npy", size - 1)
    assert senteval._claim(claim.parent / "Tense.npy") is None


def test_a_constant_says_nothing(encoders: list[Path], data: Path, tmp_path: Path) -> None:
    found = printed("senteval", encoders[0], "--data-dir", data, "--task", "Tense", "--out", tmp_path, *FAST)["e-one"][
        0
    ]
    assert found["accuracy"][0] == 0.5, "[CLS] of the embedding output is one vector"


def test_a_checkpoint_is_itself(encoders: list[Path], probed: Path, tmp_path: Path) -> None:
    """P8."""
    options = ["--results", probed, "--pooling", "mean", *FAST, "--picture", tmp_path / "p.png"]
    (itself,) = printed("compare", encoders[0], encoders[0], *options)
    assert itself["values"] == [[0.0] * 4] * 2
    assert itself["columns"] == ["emb", "0", "1", "2"]
    (other,) = printed("compare", encoders[0], encoders[1], *options)
    one, two = (json.loads((probed / f"e-{name}/senteval-mean-logistic/BigramShift.json").read_text())
                for name in ("one", "other"))  # fmt: skip
    assert other["title"] == "e-other − e-one, points"
    expected = [100 * (b - a) for a, b in zip(one["accuracy"], two["accuracy"], strict=True)]
    row = other["rows"].index("BigramShift")
    assert other["values"][row] == pytest.approx(expected)
    for k, (low, high) in enumerate(other["intervals"][row]):
        here, there = (unpacked(result["runs"][0]["right"][k], 40)[None] for result in (two, one))
        assert (low, high) == pytest.approx(tuple(100 * end for end in paired(here, there, np.ones(40))))
        assert other["in_brackets"][row][k] == (low <= 0 <= high)
    assert itself["in_brackets"] == [[True] * 4] * 2
    said = command("compare", *encoders, *options).stdout
    assert "in brackets: its 95 % interval holds 0" in said
    assert "(+0.0)" in command("compare", encoders[0], encoders[0], *options).stdout
    printed("compare", *encoders, *options)
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[1][end]) for end in ("low", "high")] == pytest.approx(other["intervals"][row][1])
    assert rows[1]["in_brackets"] == str(int(other["in_brackets"][row][1]))
    assert float(rows[1]["value"]) == pytest.approx(expected[1])
    assert (rows[1]["row"], rows[1]["column"]) == ("BigramShift", "0")


def test_repetitions_are_compared_by_their_mean() -> None:
    """Two repetitions of two layers on three rows: which were right, by hand."""

    def result(first: list[list[int]], second: list[list[int]]) -> dict[str, Any]:
        runs = [{"right": [packed(np.array(row, bool)) for row in layers]} for layers in (first, second)]
        return {"task": "T", "checkpoint": "c", "rows": {"te": 3}, "runs": runs}

    ours = result([[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]])
    theirs = result([[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0]])
    found = difference_intervals(ours, theirs)
    assert [sum(ends) / 2 for ends in found] == pytest.approx([50, 100 / 3])
    # Of the first layer rows differ by 1, 1/2 and 0 in the mean, repetitions by 2/3 and 1/3.
    deviation = (0.25 / 3 + 1 / 18 / 2) ** 0.5
    assert found[0][1] - found[0][0] == pytest.approx(2 * Z_95 * 100 * deviation)
    assert difference_intervals(ours, ours) == [(0.0, 0.0)] * 2
    for damaged, said in ((packed(np.ones(9, bool)), "2 bytes are not 3 rows"), ("?", "base64")):
        ours["runs"][1]["right"][0] = damaged
        with pytest.raises(MsltError, match=rf"T: which answers of c were right is damaged .*{said}.*probe it again"):
            difference_intervals(ours, theirs)


def test_results_of_before_are_not_gone_on_with(encoders: list[Path], data: Path, tmp_path: Path) -> None:
    options = ["senteval", encoders[0], "--data-dir", data, "--task", "Tense", *FAST, "--out", tmp_path]
    command(*options)
    file = tmp_path / "e-one/senteval-cls-logistic/Tense.json"
    result = json.loads(file.read_text())
    del result["settings"]["format"], result["runs"][0]["right"]
    file.write_text(json.dumps(result))
    with pytest.raises(MsltError, match=r"is the result of other settings \(format None, now 2\); give another --out"):
        command(*options)


def test_results_of_another_checkpoint_are_not_shown(data: Path, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "e/one", seed=0)
    options = [encoder, "--data-dir", data, *FAST]
    command("senteval", *options, "--max-train-rows", 60, "--task", "BigramShift")
    command("senteval", *options, "--task", "Tense")
    folder = tmp_path / "e/one-evaluation/senteval-cls-logistic"
    with open(folder / "heatmap.csv") as file:
        assert {row["row"] for row in csv.DictReader(file)} == {"Tense"}, "what was probed otherwise is another picture"
    compared = ["compare", encoder, "--side-by-side", *FAST, "--picture", tmp_path / "p.png"]
    assert len(printed(*compared)) == 2
    write_encoder(encoder, seed=1)
    with pytest.raises(MsltError, match=r"BigramShift.json: is of another checkpoint, .* run `mslt probe senteval` on"):
        command(*compared)


def test_the_best_layer_is_chosen_by_the_dev_rows() -> None:
    assert best_layer({"dev": [0.5, 0.7, 0.7], "accuracy": [0.9, 0.6, 0.8]}) == 1


def test_the_fast_way_scores_dev_and_test_rows_apart() -> None:
    """The feature is the label on training and dev rows, and its opposite on test rows."""
    labels = np.array([0, 1] * 6)
    x = labels * 2.0 - 1
    x[8:] *= -1
    features = Features(torch.tensor(x)[:, None, None].float(), torch.ones(1, 1), torch.zeros(1, 1))
    splits = {"tr": np.arange(4), "va": np.arange(4, 8), "te": np.arange(8, 12)}
    right, dev = senteval.logistic_probes(features, labels[None], splits, lambda done, total: None)
    assert right.tolist() == [[[False] * 4]]
    assert dev == [1.0]


def test_a_task_that_is_probed_later_joins_the_picture(encoders: list[Path], data: Path, tmp_path: Path) -> None:
    for task in ("Tense", "BigramShift"):
        command("senteval", encoders[0], "--data-dir", data, *FAST, "--task", task, "--out", tmp_path)
        (tmp_path / "e-one/senteval-cls-logistic/foreign.json").write_text("[")  # passed over
    with open(tmp_path / "e-one/senteval-cls-logistic/heatmap.csv") as file:
        assert {row["row"] for row in csv.DictReader(file)} == {"BigramShift", "Tense"}


def test_what_was_probed_otherwise_is_not_held_against(
    encoders: list[Path], data: Path, probed: Path, tmp_path: Path
) -> None:
    options = ["--data-dir", data, "--pooling", "mean", *FAST]
    command("senteval", encoders[0], *options, "--task", "Tense", "--out", tmp_path)
    command("senteval", encoders[1], *options, "--task", "BigramShift", "--out", tmp_path)
    compared = [
        "compare",
        *encoders,
        "--results",
        tmp_path,
        "--pooling",
        "mean",
        *FAST,
        "--picture",
        tmp_path / "p.png",
    ]
    with pytest.raises(MsltError, match="e-other, e-one: have no probed task in common"):
        command(*compared)
    command("senteval", encoders[1], *options, "--task", "Tense", "--max-train-rows", 60, "--out", tmp_path)
    with pytest.raises(MsltError, match=r"Tense: e-other was probed otherwise than e-one \(max_train_rows, rows\)"):
        command(*compared)


def test_checkpoints_stand_side_by_side(encoders: list[Path], probed: Path, tmp_path: Path) -> None:
    picture = tmp_path / "beside.png"
    maps = printed("compare", *encoders, "--side-by-side", "--results", probed, "--pooling", "mean", *FAST,
                   "--picture", picture)  # fmt: skip
    assert [each["title"] for each in maps] == ["BigramShift, %", "Tense, %"]
    assert maps[0]["rows"] == ["e-one", "e-other"]
    assert Image.open(picture).width > 400
    out = command("compare", *encoders, "--side-by-side", "--results", probed, "--pooling", "mean", *FAST,
                  "--picture", picture).stdout  # fmt: skip
    assert "Tense, %" in out


def test_words_are_read_back_and_compared(encoders: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentence(random.Random(index), 12) for index in range(40)))
    options = ["--text", text, "--steps", 30, "--batch-size", 8, "--max-tokens", 16, "--learning-rate", 0.01]
    found = printed("mlm", *encoders, *options, "--dropout", 0.3, "--dropout", 0.9, "--out", tmp_path)
    assert [each["task"] for each in found["e-one"]] == ["dropout 0.3", "dropout 0.9"]
    for each in found["e-one"]:
        for low, share, high in zip(each["low"], each["accuracy"], each["high"], strict=True):
            assert 0 <= low <= share <= high <= 1
    assert (tmp_path / "e-one/mlm/heatmap.png").is_file()
    told = command("mlm", encoders[0], *options, "--out", tmp_path).stdout
    assert "input words read back" in told
    (difference,) = printed("compare", *encoders, "--probe", "mlm", "--results", tmp_path,
                            "--picture", tmp_path / "mlm.png")  # fmt: skip
    assert difference["rows"] == ["dropout 0.3", "dropout 0.9"]
    for low, high in (each for line in difference["intervals"] for each in line):
        assert low <= high
    with open(tmp_path / "e-one/mlm/heatmap.csv") as file:
        assert {row["row"] for row in csv.DictReader(file)} == {"dropout 0.3", "dropout 0.9"}, "though 0.3 was last"
    with pytest.raises(MsltError, match=r"--dropout 1.5: is a probability"):
        command("mlm", encoders[0], "--text", text, "--dropout", 1.5)
    with pytest.raises(MsltError, match=r"--learning-rate -1.0: must be above 0 and below 1"):
        command("mlm", encoders[0], "--text", text, "--learning-rate", -1)


@pytest.mark.parametrize("arguments", [("senteval", "x", "--data-dir"), ("mlm", "x", "--text"),
                                       ("make", "SentLen", "--out", "x", "--text")])  # fmt: skip
def test_seeds_are_natural_numbers(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["probe", *arguments, "x", "--seed", "-1"])
    assert result.exit_code == 2
    assert "'--seed'" in result.output


def run_of(folder: Path, plan: Any) -> Path:
    """A run's folder of two finished stages, with encoders of 2 and 4 layers in it."""
    folder.mkdir()
    (folder / "plan.json").write_text(plan.model_dump_json())
    for number, depth in ((1, 2), (2, 4)):
        write_encoder(folder / f"stage-{number}/model", num_hidden_layers=depth)
        (folder / f"stage-{number}/summary.json").write_text("{}")
    return folder


def test_stages_of_runs_stand_side_by_side(data: Path, tmp_path: Path, tiny_plan: Any) -> None:
    runs = [run_of(tmp_path / name, tiny_plan) for name in ("grown", "full")]
    command("senteval", *runs, "--stages", "--data-dir", data, "--task", "Tense", *FAST)
    assert (runs[0] / "stage-2/model-evaluation/senteval-cls-logistic/Tense.json").is_file()
    (found,) = printed("compare", *runs, "--stages", *FAST, "--picture", tmp_path / "stages.png")
    steps = [sum(stage.steps for stage in tiny_plan.stages[:done]) for done in (1, 2)]
    titles = [f"stage-{n}: {tiny_plan.stages[n - 1].depth} layers, step {steps[n - 1]:,}" for n in (1, 2)]
    assert found["rows"] == [f"{name}-{title}" for name in ("grown", "full") for title in titles]
    assert [sum(line) for line in found["in_brackets"]] == [0, 3] * 2, "emb, 0 and 1 are below layer 2, which trains"
    assert tiny_plan.stages[1].trainable[0] == "layer.2"
    (one,) = printed("compare", runs[0] / "stage-2", "--side-by-side", *FAST, "--picture", tmp_path / "p.png")
    assert one["rows"] == found["rows"][1:2]
    assert one["in_brackets"] == [[True] * 3 + [False] * 2]
    assert [sum(value is not None for value in line) for line in found["values"]] == [3, 5, 3, 5]
    with pytest.raises(MsltError, match="have 3 and 5 hidden states"):
        command("compare", runs[0] / "stage-1", runs[0] / "stage-2", *FAST, "--picture", tmp_path / "p.png")
    with pytest.raises(MsltError, match="no run directory"):
        command("senteval", data, "--stages", "--data-dir", data)


def test_names_tell_checkpoints_apart(tmp_path: Path) -> None:
    folders = [str(write_encoder(tmp_path / place / "a/model")) for place in ("x", "y")]
    assert [checkpoint.name for checkpoint in checkpoints_of(folders[:1] * 2)] == ["a-model"] * 2
    assert senteval._folder_name(Path("/model")) == "model", "and not below the root"
    with pytest.raises(MsltError, match="are both called a-model in tables; rename a folder"):
        checkpoints_of(folders)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["senteval", "ENCODER", "--data-dir", "DATA", "--task", "Tens"], "--task Tens: .*did you mean Tense"),
        (["senteval", "ENCODER", "--data-dir", "DATA", "--classifier", "logistic", "--repetitions", "5"],
         "--repetitions 5: all would be the same with --classifier logistic"),
        (["senteval", "ENCODER", "--data-dir", "ENCODER"], "holds no file of SentEval's probing tasks"),
        (["senteval", "ENCODER", "--data-dir", "DATA", "--task", "SentLen"], "sentence_length.txt: not readable"),
        (["senteval", "ENCODER", "--data-dir", "DATA", "--max-tokens", "64"], "--max-tokens 64: .* has 40 positions"),
        (["senteval", "ENCODER", "--data-dir", "DATA", "--device", "tpu9"], "--device tpu9: cannot be used here"),
        (["senteval", "DATA", "--data-dir", "DATA"], "no model folder"),
        (["compare", "ENCODER", "ENCODER", "--picture", "p.png"], "holds no results; run `mslt probe senteval` on"),
        (["compare", "ENCODER", "--results", "PROBED", "--pooling", "mean", "--classifier", "logistic", "--picture",
          "p.png"], "there is nothing to hold it against"),
        (["make", "Tense", "--text", "DATA", "--out", "DATA"], "TASK Tense: there are SentLen, WordContent, BigramSh"),
        (["make", "SentLen", "--text", "DATA", "--out", "DATA"], "sentence_length.txt|not readable as UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    encoders: list[Path], data: Path, probed: Path, arguments: list[str], said: str
) -> None:
    places = {"ENCODER": str(encoders[0]), "DATA": str(data), "PROBED": str(probed)}
    with pytest.raises(MsltError, match=said):
        command(*(places.get(argument, argument) for argument in arguments))
