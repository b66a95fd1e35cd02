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

from benchmarks import early_exit_options, early_exit_speed
from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate import exits as exits_module
from mslt.evaluate.exit_bench import seconds_to_exits
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


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is said of long work: what is being done, how much of it is, and of how much."""
    found: list[tuple[str, int, int]] = []

    @contextmanager
    def recorder() -> Iterator[Any]:
        yield lambda *each: found.append(each)

    monkeypatch.setattr("mslt.cli.progress.counted_parts", recorder)
    return found


def test_long_work_is_counted(trained: Path, glue: list[str], tmp_path: Path, told: list[tuple[str, int, int]]) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    command("train", encoder, "--task", "SST-2", "--out", tmp_path / "exits", "--max-train-rows", "32", *QUICK, *glue)
    assert told == [("fine-tuning", 1, 4), ("fine-tuning", 2, 4), ("fine-tuning", 3, 4), ("fine-tuning", 4, 4),
                    ("what ramps read, once", 1, 1), *(("ramps", batch, 4) for batch in range(1, 5))]  # fmt: skip
    told.clear()
    command("sweep", trained, *glue)
    assert told == [("all exits", 1, 1)]


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stops_at", ["train_exits", "EarlyExitModel.save_pretrained"])
def test_the_same_command_goes_on_after_a_stop(
    trained: Path, glue: list[str], tmp_path: Path, told: list[Any], stops_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", trained.parent / "encoder", "--task", "SST-2", "--out", tmp_path / "exits", *QUICK, *glue]
    with monkeypatch.context() as patched:
        patched.setattr(f"mslt.evaluate.exits.{stops_at}", stopped)
        assert CliRunner().invoke(app, ["exit", *map(str, arguments)]).exit_code == 130
    assert told[0][0] == "fine-tuning"
    assert not (tmp_path / "exits" / "ramps.json").exists()
    with pytest.raises(MsltError, match=r"other settings \(stage_1.seed 42, now 7, ramps.seed 42, now 7\)"):
        command(*arguments, "--seed", 7)
    told.clear()
    command(*arguments)
    assert {doing for doing, *_ in told} == {"what ramps read, once", "ramps"}, "the first stage is done"
    again, whole = (EarlyExitModel.from_pretrained(folder).state_dict() for folder in (tmp_path / "exits", trained))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


def test_what_is_done_is_not_done_again(trained: Path, glue: list[str], told: list[Any], tmp_path: Path) -> None:
    def files() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    arguments = ["train", trained / "model", "--task", "SST-2", "--out", tmp_path / "exits", *RAMPS, *glue]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EarlyExitModel, "save_pretrained", stopped)
        assert CliRunner().invoke(app, ["exit", *map(str, arguments)]).exit_code == 130
    first = printed(*arguments)
    told.clear()
    before = files()
    assert printed(*arguments) == first
    assert not told
    assert files() == before
    with pytest.raises(MsltError, match=r"other settings \(ramps.num_epochs 2, now 3\); give another --out"):
        command(*arguments, "--ramp-epochs", 3)
    (tmp_path / "exits" / "training.json").write_text("[")
    with pytest.raises(MsltError, match=r"training.json: is damaged .*; move .*exits away, and the same command"):
        command(*arguments)


def test_a_training_that_diverged_leaves_no_ramps(
    trained: Path, glue: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(whole: Any, *_: Any) -> None:
        with torch.no_grad():
            next(p for p in whole.parameters() if p.requires_grad).fill_(torch.nan)

    train_one = exits_module._train
    encoder, out = trained.parent / "encoder", tmp_path / "exits"
    monkeypatch.setattr(exits_module, "_train", spoil)
    for checkpoint, more, said in (
        (encoder, QUICK, "the training diverged: weights are not finite; give a lower --learning-rate"),
        (encoder, JOINT, "give a lower --learning-rate"),
        (trained / "model", RAMPS, "give a lower --ramp-learning-rate"),
    ):
        with pytest.raises(MsltError, match=said):
            command("train", checkpoint, "--task", "SST-2", "--out", out, *more, *glue)
        assert not out.exists()
    monkeypatch.setattr(exits_module, "_train", lambda *a: (spoil if a[4] == "ramps" else train_one)(*a))
    with pytest.raises(MsltError, match=f"train ramps on {out / 'model'} with a lower --ramp-learning-rate"):
        command("train", encoder, "--task", "SST-2", "--out", out, *QUICK, *glue)
    assert not (out / "ramps.json").exists()


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
    rows = heldout(opened.task, Path(glue[1]), True, "validation")
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
    ours = [row for row in table if row["is_ours"]]
    assert {row["split"] for row in ours} == {"validation"}
    assert ours[0]["score"] == pytest.approx(100 * swept["full"]["accuracy"])
    assert all(row["score"] >= -3 for row in ours[1:])
    assert [row["chosen_on"] for row in ours] == [None, *["the same rows"] * (len(ours) - 1)]
    assert "chosen on the same rows" in command("sweep", trained, *glue).stdout
    theirs = [row for row in table if not row["is_ours"]]
    assert {row["split"] for row in theirs} == {"test"}
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
    assert json.loads((trained / "bench-SST-2-validation-24-batch-8-every-1.json").read_text()) == found
    assert_says_where_it_comes_from(found, trained, 24)
    assert found["settings"] == {"batch_size": 8, "turns": 2, "check_every": 1, "split": "validation",
                                 "subset": True, "max_rows": 24}  # fmt: skip
    seldom = printed("bench", trained, "--threshold", "0.7", "--turns", "1", "--batch-size", "8", "--check-every", "0",
                     "--max-rows", "24", *glue)  # fmt: skip
    assert seldom["settings"]["check_every"] == 0
    assert seldom["rules"][0]["num_leaving"] == always["num_leaving"]
    assert json.loads((trained / "bench-SST-2-validation-24-batch-8-every-1.json").read_text()) == found, "still there"


def test_the_time_to_each_exit_is_taken_as_rows_really_leave(
    trained: Path, glue: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Any] = []
    walk = EarlyExitModel.walk
    monkeypatch.setattr(
        EarlyExitModel, "walk", lambda self, ids, mask, types: masks.append(mask) or walk(self, ids, mask, types)
    )
    opened = open_exits(trained, None, "cpu")
    assert len(seconds_to_exits(opened, heldout(opened.task, Path(glue[1]), True, "validation")[:2], 1)) == 4
    assert masks == [None] * 4


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
    assert (by_rule["rows"], by_rule["split"]) == (32, "validation"), "those that it was not chosen on"
    assert by_rule["expected_saving"] == pytest.approx(found["saving"], abs=1e-12)
    said = "calibration.json, chosen on half of 64 rows of validation; these are the other half"
    assert by_rule["rule_from"] == said
    assert said in command("eval", trained, *glue).stdout
    others = printed("eval", trained, "--max-rows", "40", *glue)
    assert others["rows"] == 40
    assert others["rule_from"].endswith("; some of them may be among these")
    given = printed("eval", trained, "--threshold", "0.3", *glue)
    assert (given["rows"], given["rule_from"]) == (64, "the command line")
    own = printed("calibrate", trained, "--max-drop", "2", "--per-layer", *glue)
    assert len(own["rule"]["thresholds"]) == 3
    assert json.loads((trained / "calibration.json").read_text()) == own
    assert_says_where_it_comes_from(own, trained, 64)
    assert own["settings"] == {"max_drop": 2, "max_ms": None, "by": "entropy", "per_layer": True, "seed": 0,
                               "split": "validation", "subset": True, "max_rows": None}  # fmt: skip
    slow = printed("calibrate", trained, "--max-ms", "100000", *glue)
    assert 0 < slow["measured_s"] < 100
    assert 0 < slow["predicted_s"] < 100
    assert "measured; predicted" in command("calibrate", trained, "--max-ms", "100000", *glue).stdout
    with pytest.raises(MsltError, match="the fastest rule takes"):
        command("calibrate", trained, "--max-ms", "0.000001", *glue)


def test_what_was_found_of_other_exits_is_refused(trained: Path, glue: list[str], tmp_path: Path) -> None:
    exits = shutil.copytree(trained, tmp_path / "exits")
    for path in exits.glob("bench-*"):
        path.unlink()
    printed("calibrate", exits, "--max-drop", "2", *glue)
    printed("bench", exits, "--turns", "1", "--max-rows", "4", *glue)
    (bench,) = exits.glob("bench-*")
    for path, verb, remedy in (
        (exits / "calibration.json", ["eval", exits], "run `mslt exit calibrate` again"),
        (bench, ["sweep", exits, "--out", tmp_path / "report"], "run `mslt exit bench` again"),
    ):
        whole = path.read_text()
        for name in ("task", "model_sha256", "ramps_sha256"):
            path.write_text(json.dumps({**json.loads(whole), name: "another"}))
            with pytest.raises(MsltError, match=rf"{path}: is of other exits than are here \({name}\); {remedy}"):
                command(*verb, *glue)
        path.write_text(whole[:99])
        with pytest.raises(MsltError, match=f"{path}: is damaged .*; {remedy}"):
            command(*verb, *glue)
        path.write_text(whole)
        command(*verb, *glue)


def test_a_sweep_says_its_split_and_takes_both_of_mnli(trained: Path, glue: list[str], tmp_path: Path) -> None:
    (swept,) = printed("sweep", trained, "--split", "train", "--max-rows", "9", "--out", tmp_path / "train", *glue)
    assert swept["settings"] == {"split": "train", "subset": True, "max_rows": 9}
    assert_says_where_it_comes_from(swept, trained, 9)
    table = json.loads((tmp_path / "train" / "table-1.json").read_text())
    assert {row["split"] for row in table if row["is_ours"]} == {"train"}
    command("train", write_encoder(tmp_path / "encoder", num_hidden_layers=2), "--task", "MNLI", "--out",
            tmp_path / "exits", *RAMPS, "--max-train-rows", "32", *glue)  # fmt: skip
    swept = printed("sweep", tmp_path / "exits", "--out", tmp_path / "report", *glue)
    assert [each["settings"]["split"] for each in swept] == ["validation_matched", "validation_mismatched"]
    table = json.loads((tmp_path / "report" / "table-1.json").read_text())
    whole = {(row["task"], row["is_ours"]): row["score"] for row in table if row["method"] == "whole"}
    assert [whole[name, True] for name in ("MNLI-m", "MNLI-mm")] == [100 * each["full"]["accuracy"] for each in swept]
    assert [row["score"] for row in table if (row["task"], row["method"]) == ("MNLI-mm", "whole")][1:] == [83.0, 86.3]


def test_the_studies_of_options_and_of_speed(
    trained: Path, glue: list[str], tmp_path: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(module: Any, *arguments: object) -> list[list[str]]:
        words = [module.__name__, *arguments, *glue, "--record", tmp_path / "record.md"]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        module.main()
        lines = [line for line in (tmp_path / "record.md").read_text().splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    options = [trained / "model", "--encoder", trained.parent / "encoder", "--task", "SST-2", "--work", tmp_path,
               "--only", "mean", "--max-tokens", "16"]  # fmt: skip
    header, _, row = study(early_exit_options, *options, "--max-train-rows", "32")
    assert (len(header), row[0]) == (8, "mean")
    assert all("%" in cell for cell in row[3:])
    assert ("ramps", 1, 3) in told
    told.clear()
    assert study(early_exit_options, *options, "--max-train-rows", "32")[2] == row
    assert not told, "done before"
    with pytest.raises(MsltError, match=r"mean-42.training.json: is the result of other settings \(data "):
        study(early_exit_options, *options)
    with pytest.raises(MsltError, match="stages: no run directory"):
        study(early_exit_options, *options, "--only", "stages", "--run", tmp_path / "stages")
    header, _, *rows = study(early_exit_speed, trained, tmp_path / "mean-42", "--turns", "1", "--max-rows", "3",
                             "--savings", "0.4", "--batch-sizes", "2")  # fmt: skip
    assert header[:5] == ["exits", "task", "layers", "rows", "at once"]
    assert [row[:5] for row in rows] == [[name, "SST-2", "4 × 32", "3", "2"] for name in ("exits", "mean-42")]
    assert all(float(score) <= 1 for score in (row[6] for row in rows))
    assert all(sum(map(int, row[7].split())) == 3 for row in rows)


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
        (["eval", "--threshold", "1", "--tolerance", "1"], "--tolerance 1.0: does nothing, it is for --patience"),
        (["bench", "--tolerance", "1"], "--tolerance 1.0: does nothing, it is for --patience"),
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
            "--epochs 3: does nothing.*by --ramp-learning-rate",
        ),
        ([trained / "model", "--task", "SST-2", "--joint", "--ramp-epochs", "3"], "--ramp-epochs 3: does nothing"),
        ([trained / "model", "--task", "SST-2", "--joint", "--no-backbone-dropout"], "--backbone-dropout False: does"),
        ([trained / "model", "--task", "SST-2", "--new-pooler"], "--new-pooler True: does nothing"),
        ([trained / "model", "--task", "SST-2", "--ramp-init-from", trained], "--ramp-init-from .*: does nothing"),
        ([trained / "model", "--task", "SST-2", "--ramp-learning-rate", "-1"], "-1.0: must be above 0 and below 1"),
        ([trained / "model", "--task", "SST-2", "--joint", "--learning-rate", "nan"], "nan: must be above 0 and"),
        ([write_encoder(tmp_path / "flat", num_hidden_layers=1), "--task", "SST-2"], "1 layer"),
        ([tmp_path, "--task", "SST-2"], "no model folder"),
    ):
        with pytest.raises(MsltError, match=said):
            command("train", *arguments, "--out", tmp_path / "out", "--max-tokens", "16", *glue) if (
                "--max-tokens" not in arguments
            ) else command("train", *arguments, "--out", tmp_path / "out", *glue)
        assert not (tmp_path / "out").exists()
    with pytest.raises(MsltError, match="no empty folder"):
        command("train", trained / "model", "--task", "SST-2", "--out", trained / "model", *glue)
    for verb in (["train", trained / "model", "--task", "SST-2", "--out", tmp_path / "out"], ["calibrate", trained]):
        refused = CliRunner().invoke(app, ["exit", *map(str, verb), "--seed", "-1", *glue])
        assert refused.exit_code == 2, refused.output
        assert "'--seed': Input should be greater than or equal to 0" in refused.output


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
    assert layerdrop.savings == {"SST-2": 50, "MNLI-m": 50}
    assert [row.scores["MNLI-mm"] for row in bert] == [-0.1, -0.7, -3.8]
