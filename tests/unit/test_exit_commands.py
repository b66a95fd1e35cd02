"""`mslt exit` by the command line: a small checkpoint, made-up rows that can be learnt."""

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate.exits import exit_logits_of, heldout, open_exits, refuse_labels
from mslt.evaluate.glue_tasks import TASKS
from mslt.evaluate.opening import open_tokenizer, tokenizer_digest
from mslt.heads.early_exit import EarlyExitModel
from mslt.heads.exit_rule import by_entropy, by_patience, counts, exits_of, expected_saving, left_with
from mslt.report import paper
from tests.command_lines import run
from tests.encoders import write_encoder
from tests.exits import classifier
from tests.glue_files import write_glue

SMALL = ["--batch-size", "16", "--max-tokens", "16"]
JOINT = [*SMALL, "--joint", "--epochs", "2", "--learning-rate", "0.002"]
RAMPS = [*SMALL, "--ramp-epochs", "2"]
QUICK = [*RAMPS, "--epochs", "2", "--learning-rate", "0.002"]


def command(*arguments: object) -> Any:
    return run("exit", *arguments)


def printed(*arguments: object) -> Any:
    return json.loads(command(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data-dir", str(write_glue(tmp_path_factory.mktemp("glue"), num_dev=64)), "--subset"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, glue: list[str]) -> Path:
    """Exits of four layers, on SST-2, both stages."""
    folder = tmp_path_factory.mktemp("trained")
    encoder = write_encoder(folder / "encoder", num_hidden_layers=4)
    command("train", encoder, "--task", "SST-2", "--out", folder / "exits", *QUICK, *glue)
    return folder / "exits"


def test_both_stages_make_a_model_and_its_ramps(trained: Path) -> None:
    described = json.loads((trained / "ramps.json").read_text())
    assert (described["task"], described["stages"], described["num_layers"]) == ("SST-2", "both", 4)
    assert described["labels"] == ["0", "1"]
    assert described["training"]["ramps"]["learning_rate"] == 1e-3
    assert AutoModelForSequenceClassification.from_pretrained(trained / "model").config.num_hidden_layers == 4
    assert len(EarlyExitModel.from_pretrained(trained).ramps) == 3


def test_ramps_alone_on_a_finetuned_model_name_it_and_leave_it(trained: Path, glue: list[str], tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in (trained / "model").iterdir()}
    found = printed("train", trained / "model", "--task", "SST-2", "--out", tmp_path / "mean", "--pooling", "mean",
                    "--distillation", "0.5", *RAMPS, *glue)  # fmt: skip
    assert found["stages"] == "ramps"
    assert not (tmp_path / "mean" / "model").exists()
    assert {file.name: file.read_bytes() for file in (trained / "model").iterdir()} == before
    opened = open_exits(tmp_path / "mean", None, "cpu")
    assert opened.exits.options.pooling == "mean"
    assert json.loads((tmp_path / "mean" / "ramps.json").read_text())["model"] == str((trained / "model").resolve())


@pytest.mark.parametrize("kind", ["roberta", "electra"])
def test_joint_training_of_other_families(kind: str, glue: list[str], tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", kind)
    found = printed("train", encoder, "--task", "SST-2", "--out", tmp_path / "exits", *JOINT, *glue)
    assert found["stages"] == "joint"
    assert found["training"]["ramps"] == found["training"]["stage_1"]
    assert (found["training"]["ramps"]["learning_rate"], found["training"]["ramps"]["num_epochs"]) == (0.002, 2)
    assert (tmp_path / "exits" / "model" / "config.json").is_file()
    scored = printed("eval", tmp_path / "exits", "--threshold", "0.5", *glue)
    assert 0 <= scored["expected_saving"] <= 0.5
    assert sum(scored["num_leaving"]) == 64


def test_a_grown_model_gets_exits(glue: list[str], tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", num_hidden_layers=2)
    grown = CliRunner().invoke(app, ["grow", str(encoder), str(tmp_path / "grown"), "--sources", "0-1,0-1"])
    assert grown.exception is None, grown.output
    command("train", tmp_path / "grown", "--task", "SST-2", "--out", tmp_path / "exits", *QUICK, *glue)
    scored = printed("eval", tmp_path / "exits", "--threshold", "0", *glue)
    assert scored["num_leaving"] == [0, 0, 0, 64]


def test_the_tokenizer_that_was_named_stays_with_the_exits(trained: Path, glue: list[str], tmp_path: Path) -> None:
    other, model = tmp_path / "other", tmp_path / "model"
    shutil.copytree(trained / "model", model)
    shutil.copytree(trained / "model", other)
    named = json.loads((other / "tokenizer.json").read_text())
    good, bad = (named["model"]["vocab"][word] for word in ("good", "bad"))
    named["model"]["vocab"] |= {"good": bad, "bad": good}
    (other / "tokenizer.json").write_text(json.dumps(named))
    for file in model.glob("tokenizer*"):
        file.unlink()
    command("train", model, "--task", "SST-2", "--out", tmp_path / "exits", "--tokenizer", other, *RAMPS, *glue)
    assert open_exits(tmp_path / "exits", None, "cpu").tokenizer.convert_tokens_to_ids("good") == bad
    command("eval", tmp_path / "exits", "--threshold", "0.5", *glue)


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        ("MNLI", ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"],
         r"in the order CONTRADICTION, NEUTRAL, ENTAILMENT, MNLI counts its labels in the order "
         r"entailment, neutral, contradiction; put the rows"),
        ("SST-2", ["1", "0"], "in the order 1, 0, SST-2 counts its labels in the order 0, 1"),
        ("RTE", ["not entailment", "entailment"], "in the order not entailment, entailment, RTE counts"),
        ("MNLI", ["Entailment", "neutral", "contradiction"], None),
        ("MNLI", ["LABEL_0", "LABEL_1", "LABEL_2"], None),
    ],
)  # fmt: skip
def test_labels_in_another_order_are_refused(task: str, labels: list[str], said: str | None) -> None:
    model = classifier(num_labels=len(labels), id2label=dict(enumerate(labels)))
    if said is None:
        refuse_labels("tuned", model, TASKS[task])
    else:
        with pytest.raises(MsltError, match=said):
            refuse_labels("tuned", model, TASKS[task])


def test_long_work_is_counted(trained: Path, glue: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []

    @contextmanager
    def recorder() -> Iterator[Any]:
        yield lambda *each: told.append(each)

    monkeypatch.setattr("mslt.cli.progress.counted_parts", recorder)
    encoder = write_encoder(tmp_path / "encoder")
    command("train", encoder, "--task", "SST-2", "--out", tmp_path / "exits", "--max-train-rows", "32", *QUICK, *glue)
    assert told == [("fine-tuning", 1, 4), ("fine-tuning", 2, 4), ("fine-tuning", 3, 4), ("fine-tuning", 4, 4),
                    ("what ramps read, once", 1, 1), *(("ramps", batch, 4) for batch in range(1, 5))]  # fmt: skip
    told.clear()
    command("sweep", trained, *glue)
    assert told == [("all exits", 1, 1)]


def test_a_regression_leaves_by_patience(glue: list[str], tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", num_hidden_layers=4)
    command("train", encoder, "--task", "STS-B", "--out", tmp_path / "exits", *QUICK, *glue)
    with pytest.raises(MsltError, match=r"entropy: a regression has none"):
        command("eval", tmp_path / "exits", "--threshold", "0.5", *glue)
    scored = printed("eval", tmp_path / "exits", "--patience", "1", "--tolerance", "10", *glue)
    assert scored["num_leaving"] == [0, 64, 0, 0]
    assert set(scored["scores"]) == {"pearson", "spearman"}
    (swept,) = printed("sweep", tmp_path / "exits", "--out", tmp_path / "report", *glue)
    assert swept["points"]["entropy"] == []
    assert len(swept["points"]["patience"]) == 18
    with pytest.raises(MsltError, match="entropy: a regression has none; choose by patience"):
        command("calibrate", tmp_path / "exits", "--max-drop", "1", *glue)
    assert printed("calibrate", tmp_path / "exits", "--max-drop", "50", "--by", "patience", *glue)["saving"] > 0


def test_a_sweep_of_kept_logits_is_what_real_runs_give(trained: Path, glue: list[str]) -> None:
    """D6: predictions, exits, metric and saving at five thresholds and each patience."""
    opened = open_exits(trained, None, "cpu")
    rows = heldout(opened.task, Path(glue[1]), True, None)
    kept = exit_logits_of(opened.exits, rows, opened.batch_of)
    middle = float(np.quantile(-(kept[:-1].log_softmax(-1).exp() * kept[:-1].log_softmax(-1)).sum(-1).numpy(), 0.4))
    for rule, arguments in [
        *((by_entropy(s), ["--threshold", repr(s)]) for s in (0.0, middle / 2, middle, 0.6, 0.7)),
        *((by_patience(t), ["--patience", t]) for t in (1, 2, 3)),
    ]:
        exit_R = exits_of(rule, kept)
        expected = opened.scores(left_with(kept, exit_R), rows)
        for batch_size in (1, 7):
            found = printed("eval", trained, *arguments, "--batch-size", batch_size, *glue)
            assert found["num_leaving"] == counts(exit_R, 4)
            assert found["expected_saving"] == expected_saving(counts(exit_R, 4))
            assert found["scores"] == expected


def test_the_papers_table_and_figures(trained: Path, glue: list[str], tmp_path: Path) -> None:
    command("bench", trained, "--turns", "1", "--max-rows", "8", *glue)
    swept = printed("sweep", trained, "--out", tmp_path, *glue)[0]
    names = ["table-1", *(f"figure-{number}" for number in range(2, 7))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{ending}" for name in names for ending in ("csv", "json", "png")
    )
    for name in names:
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        with open(tmp_path / f"{name}.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(rows)
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 5
    table = json.loads((tmp_path / "table-1.json").read_text())
    ours = [row for row in table if row["split"] == "validation"]
    assert ours[0]["score"] == pytest.approx(100 * swept["full"]["accuracy"])
    assert all(row["score"] >= -3 for row in ours[1:])
    assert [row["chosen_on"] for row in ours] == [None, *["the same rows"] * (len(ours) - 1)]
    assert "chosen on the same rows" in command("sweep", trained, *glue).stdout
    theirs = [row for row in table if row["split"] == "test"]
    assert {row["chosen_on"] for row in theirs if row["method"] == "DeeBERT"} == {"validation"}
    assert [(r["score"], r["saving"]) for r in theirs if r["method"] == "DeeBERT"][:3] == [
        (-0.2, 21), (-0.6, 40), (-2.1, 47)
    ]  # fmt: skip
    savings = [point["saving"] for point in swept["points"]["entropy"]]
    assert savings == sorted(savings)
    assert savings[0] == 0
    assert savings[-1] == pytest.approx(0.75)
    histogram = json.loads((tmp_path / "figure-6.json").read_text())
    assert {row["chosen_on"] for row in histogram} == {"the same rows"}
    assert sum(row["rows"] for row in histogram) % 64 == 0


def test_bench_sets_measured_beside_expected(trained: Path, glue: list[str]) -> None:
    found = printed("bench", trained, "--threshold", "0", "--threshold", "0.7", "--turns", "2", "--batch-size", "8",
                    "--max-rows", "24", *glue)  # fmt: skip
    never, always = found["rules"]
    assert (never["expected_saving"], always["expected_saving"]) == (0, 0.75)
    assert never["num_leaving"] == [0, 0, 0, 24]
    assert always["speedup"] > never["speedup"]
    assert len(always["plain_s"]) == len(always["early_s"]) == 2
    assert json.loads((trained / "bench-SST-2-8.json").read_text()) == found
    assert_says_where_it_comes_from(found, trained, 24)
    assert found["settings"] == {"batch_size": 8, "turns": 2, "check_every": 1, "split": None, "subset": True,
                                 "max_rows": 24}  # fmt: skip
    seldom = printed("bench", trained, "--threshold", "0.7", "--turns", "1", "--batch-size", "8", "--check-every", "0",
                     "--max-rows", "24", *glue)  # fmt: skip
    assert seldom["settings"]["check_every"] == 0
    assert seldom["rules"][0]["num_leaving"] == always["num_leaving"]


def assert_says_where_it_comes_from(found: dict[str, Any], exits: Path, num_rows: int) -> None:
    described = json.loads((exits / "ramps.json").read_text())
    assert found["model_sha256"] == described["model_sha256"]["float32"]
    assert found["ramps_sha256"] == described["ramps_sha256"]
    assert found["tokenizer"] == tokenizer_digest(open_tokenizer(str(exits / "model")))
    assert found["data"]["rows"] == num_rows
    assert len(found["data"]["sha256"]) == 64
    assert found["provenance"]["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("check_every", [0, 3])
def test_how_often_the_device_is_asked_changes_no_score(
    trained: Path, glue: list[str], check_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    forward = EarlyExitModel.forward
    monkeypatch.setattr(
        EarlyExitModel, "forward", lambda *a, **more: asked.append(more["check_every"]) or forward(*a, **more)
    )
    found = printed("eval", trained, "--threshold", "0.5", "--check-every", check_every, *glue)
    assert set(asked) == {check_every}
    assert found == printed("eval", trained, "--threshold", "0.5", *glue)


def test_calibration_chooses_on_one_half_and_judges_by_the_other(trained: Path, glue: list[str]) -> None:
    found = printed("calibrate", trained, "--max-drop", "2", *glue)
    assert (found["num_chosen_on"], found["num_heldout"]) == (32, 32)
    assert found["drop_interval"][0] <= found["drop"] <= found["drop_interval"][1]
    low, high = found["saving_interval"]
    assert low <= found["saving"] <= high
    assert found == printed("calibrate", trained, "--max-drop", "2", *glue), "keyed"
    by_rule = printed("eval", trained, *glue)
    assert by_rule["rule"] == found["rule"]
    own = printed("calibrate", trained, "--max-drop", "2", "--per-layer", *glue)
    assert len(own["rule"]["thresholds"]) == 3
    assert json.loads((trained / "calibration.json").read_text()) == own
    assert_says_where_it_comes_from(own, trained, 64)
    assert own["settings"] == {"max_drop": 2, "max_ms": None, "by": "entropy", "per_layer": True, "seed": 0,
                               "split": None, "subset": True, "max_rows": None}  # fmt: skip
    slow = printed("calibrate", trained, "--max-ms", "100000", *glue)
    assert 0 < slow["measured_s"] < 100
    assert 0 < slow["predicted_s"] < 100
    assert "measured; predicted" in command("calibrate", trained, "--max-ms", "100000", *glue).stdout
    with pytest.raises(MsltError, match="the fastest rule takes"):
        command("calibrate", trained, "--max-ms", "0.000001", *glue)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_exported_graphs_answer_as_the_model(trained: Path, tmp_path: Path, kind: str) -> None:
    """D12."""
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    found = printed("export", trained, tmp_path / "graphs", "--format", kind, "--threshold", "0.6")
    assert found["difference"] <= 1e-5
    assert found["graphs"] == 4
    described = json.loads((tmp_path / "graphs" / "exits.json").read_text())
    assert described["thresholds"] == [0.6]
    assert all((tmp_path / "graphs" / name).is_file() for name in described["graphs"])
    assert (tmp_path / "graphs" / "tokenizer.json").is_file()
    with pytest.raises(MsltError, match="exists; name a folder that does not"):
        command("export", trained, tmp_path / "graphs", "--threshold", "0.6")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "--threshold", "nan"], "threshold nan: entropies are 0 nats or more"),
        (["eval", "--threshold", "-0.5"], "threshold -0.5"),
        (["eval", "--threshold", "0.1", "--threshold", "0.2"], "2 are given; give one for all exits, or 3"),
        (["eval", "--threshold", "0.1", "--patience", "2"], "rows leave by one of them"),
        (["eval", "--patience", "0"], "patience 0"),
        (["eval", "--patience", "1", "--tolerance", "-1"], "tolerance -1"),
        (["eval", "--patience", "1", "--task", "sst2"], "did you mean SST-2"),
        (["eval", "--patience", "1", "--task", "STS-B"], "has 2 labels, STS-B takes 1"),
        (["eval", "--patience", "1", "--split", "test"], "SST-2 has train, validation with labels"),
        (["eval", "--patience", "1", "--task", "RTE"], "were trained on SST-2, not on RTE"),
        (["sweep", "--out", "/dev/null"], "--out /dev/null: is no folder"),
        (["calibrate"], "either --max-drop POINTS or --max-ms"),
        (["calibrate", "--max-drop", "1", "--max-ms", "3"], "either --max-drop POINTS or --max-ms"),
        (["calibrate", "--max-drop", "-1"], "--max-drop -1"),
        (["calibrate", "--max-drop", "nan"], "--max-drop nan"),
        (["calibrate", "--max-ms", "0"], "--max-ms 0"),
        (["calibrate", "--max-ms", "5", "--per-layer"], "goes with --max-drop"),
        (["calibrate", "--max-drop", "1", "--max-rows", "8"], "8 rows: too few"),
        (["bench", "--threshold", "-1"], "threshold -1"),
    ],
)
def test_bad_input_is_one_message(trained: Path, glue: list[str], arguments: list[str], said: str) -> None:
    with pytest.raises(MsltError, match=said):
        command(arguments[0], trained, *arguments[1:], *glue)


def test_bad_folders_and_checkpoints_are_refused_before_training(
    trained: Path, glue: list[str], tmp_path: Path
) -> None:
    with pytest.raises(MsltError, match="holds no ramps"):
        command("eval", tmp_path, "--threshold", "0.1", *glue)
    (tmp_path / "calibration.json").unlink(missing_ok=True)
    for arguments, said in (
        ([trained / "model", "--task", "STS-B"], "has 2 labels, STS-B takes 1"),
        ([trained / "model", "--task", "SST"], "did you mean SST-2"),
        ([trained / "model", "--task", "SST-2", "--ramp-init", "pretrained"], "where from"),
        ([trained / "model", "--task", "SST-2", "--ramp-init", "stages", "--ramp-init-from", tmp_path], "no run dir"),
        ([trained / "model", "--task", "SST-2", "--distillation", "1.5"], "distillation 1.5: is a share"),
        ([trained / "model", "--task", "SST-2", "--max-tokens", "64"], "has 40 positions"),
        (
            [trained / "model", "--task", "SST-2", "--epochs", "3"],
            "--epochs 3: trains nothing.*give --ramp-learning-rate",
        ),
        ([trained / "model", "--task", "SST-2", "--joint", "--ramp-epochs", "3"], "--ramp-epochs 3: trains nothing"),
        ([write_encoder(tmp_path / "flat", num_hidden_layers=1), "--task", "SST-2"], "1 layer"),
        ([tmp_path, "--task", "SST-2"], "no model folder"),
    ):
        with pytest.raises(MsltError, match=said):
            command("train", *arguments, "--out", tmp_path / "out", "--max-tokens", "16", *glue) if (
                "--max-tokens" not in arguments
            ) else command("train", *arguments, "--out", tmp_path / "out", *glue)
        assert not (tmp_path / "out").exists()
    with pytest.raises(MsltError, match="no empty folder"):
        command("train", trained / "model", "--task", "SST-2", "--out", trained, *glue)


def test_ramps_whose_model_was_changed_are_refused(trained: Path, glue: list[str], tmp_path: Path) -> None:
    command("train", trained / "model", "--task", "SST-2", "--out", tmp_path / "ramps", *RAMPS, *glue)
    model = AutoModelForSequenceClassification.from_pretrained(trained / "model")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(MsltError, match="ramps of another model: weights"):
        EarlyExitModel.from_pretrained(tmp_path / "ramps", model)


def test_the_papers_rows_are_all_there() -> None:
    assert len(paper.EARLY_EXIT) == 10
    bert = [row for row in paper.EARLY_EXIT if (row.model, row.method) == ("BERT-base", "DeeBERT")]
    assert [row.savings["RTE"] for row in bert] == [9, 11, 33]
    (layerdrop,) = (row for row in paper.EARLY_EXIT if row.method == "LayerDrop")
    assert layerdrop.savings == {"SST-2": 50, "MNLI": 50}
