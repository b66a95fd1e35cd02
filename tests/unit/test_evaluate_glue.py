"""Fine-tuning on GLUE by the command line: small checkpoints, made-up rows that can be learnt."""

import csv
import io
import json
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForMaskedLM
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError
from mslt.evaluate import glue_grid, glue_tasks, grid
from mslt.evaluate.fine_tune import FineTuning, fine_tune
from mslt.evaluate.glue import Cell, Source, cells_of, run_cell
from mslt.evaluate.glue_grid import chosen_here, median_cell, summary
from mslt.evaluate.glue_tasks import PRESETS, TASKS
from mslt.evaluate.opening import open_with_new_head
from mslt.files import write_json
from tests.encoders import write_encoder
from tests.glue_files import GOOD, write_glue

SMALL = ("--subset", "--max-tokens", "16", "--epochs", "4", "--learning-rate", "3e-3", "--batch-size", "8")


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture
def in_this_process(monkeypatch):
    """Fine-tunings in a thread: a process of their own takes seconds to start."""
    monkeypatch.setattr(grid, "_process", lambda: ThreadPoolExecutor(1))


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["evaluate", "glue", *map(str, arguments)])


def test_learns_saves_and_submits(encoder, glue, tmp_path, in_this_process):
    out, zipped = tmp_path / "out", tmp_path / "new" / "glue.zip"
    arguments = (encoder, "--data-dir", glue, "--out", out, "--preset", "quick", *SMALL)
    result = run(
        *arguments, "--task", "SST-2", "--task", "STS-B", "--task", "MNLI", "--test-submission", zipped, "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())
    assert found["tasks"]["SST-2"]["median"] > 0.9
    assert found["tasks"]["STS-B"]["headline"] == "spearman"
    assert set(found["tasks"]["SST-2"]["scores"]["validation"]) == {"accuracy", "f1", "matthews"}
    assert found["average"] == pytest.approx(sum(entry["median"] for entry in found["tasks"].values()) / 3)
    assert found["tasks"]["SST-2"]["differs"] == ["learning_rates", "batch_sizes", "num_epochs", "max_tokens"]
    mnli = found["tasks"]["MNLI"]
    both = [values["accuracy"][0] for values in mnli["scores"].values()]
    assert mnli["median"] == sum(both) / 2
    model = AutoModelForSequenceClassification.from_pretrained(
        next((out / "models" / "MNLI").glob("*/config.json")).parent
    )
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}

    with zipfile.ZipFile(zipped) as submission:
        names = {"AX", "CoLA", "MNLI-m", "MNLI-mm", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"}
        assert {Path(name).stem for name in submission.namelist()} == names
        read = {
            name: list(csv.DictReader(io.StringIO(submission.read(f"{name}.tsv").decode()), delimiter="\t"))
            for name in ("SST-2", "STS-B", "MNLI-mm", "AX", "RTE", "WNLI")
        }
    tests = {
        "SST-2": ("SST-2/test.tsv", 1, {True: "1", False: "0"}),
        "MNLI-mm": ("MNLI/test_mismatched.tsv", 2, {True: "entailment", False: "contradiction"}),
    }
    for name, (file, column, labels) in tests.items():
        rows = [line.split("\t") for line in (glue / file).read_text().splitlines()[1:]]
        expected = [labels[row[column].split()[3] in GOOD] for row in rows]
        right = [row["prediction"] == label for row, label in zip(read[name], expected, strict=True)]
        assert sum(right) > 0.9 * len(right), name
        assert [row["index"] for row in read[name]] == [str(index) for index in range(len(rows))]
    assert all(0.0 <= float(row["prediction"]) <= 5.0 for row in read["STS-B"])
    assert len({row["prediction"] for row in read["AX"]}) > 1, "answered by the model of MNLI"
    assert {row["prediction"] for row in read["RTE"]} == {"entailment"}
    assert [row["prediction"] for row in read["WNLI"]] == ["0"] * 146

    more = run(*arguments, "--task", "RTE")
    assert more.exit_code == 0, more.output
    assert list(json.loads((out / "results.json").read_text())["tasks"]) == ["SST-2", "STS-B", "MNLI", "RTE"]


def test_a_failed_run_is_told_and_not_averaged_away(encoder, glue, tmp_path, in_this_process, monkeypatch):
    """Seed 1 fails twice: its setting does not count; with a submission nothing is submitted."""

    def run_or_fail(source, cell, model_folder, device):
        if cell.settings.seed == 1:
            raise FloatingPointError("diverged")
        return run_cell(source, cell, model_folder, device)

    monkeypatch.setattr(glue_grid, "run_cell", run_or_fail)
    base = (encoder, "--data-dir", glue, "--out", tmp_path, "--preset", "quick", *SMALL, "--epochs", "1")
    result = run(*base, "--task", "SST-2", "--seeds", "2")
    assert result.exit_code == 1
    assert "failed twice: SST-2/rate=0.003_batch=8_seed=1" in result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["tasks"]["SST-2"]["best"] is None
    assert found["average"] is None
    monkeypatch.setattr(glue_grid, "run_cell", run_cell)
    assert run(*base, "--task", "SST-2", "--seeds", "2").exit_code == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["tasks"]["SST-2"]["failed"] == []
    assert not list(tmp_path.rglob("*.failed.txt"))


def test_two_that_run_a_grid_at_once_come_to_the_same(encoder, glue, tmp_path, in_this_process, monkeypatch):
    """In two threads, which open models one after the other: transformers has a switch for all of a process."""
    opening = Lock()

    def in_turn(function):
        def wrapped(*arguments):
            with opening:
                return function(*arguments)

        return wrapped

    monkeypatch.setattr(glue_grid, "opened", in_turn(glue_grid.opened))
    monkeypatch.setattr(glue_grid, "run_cell", in_turn(run_cell))
    quick = replace(PRESETS["quick"], learning_rates=(3e-3,), max_tokens=16, num_epochs=1)
    cells = cells_of(quick, ["CoLA"], range(4), "fp32")
    source = Source(str(encoder), data_dir=glue, is_subset=True)
    with ThreadPoolExecutor(2) as pool:
        arguments = (source, "quick", quick, cells, tmp_path / "out", ["cpu"], print)
        both = [pool.submit(glue_grid.run_glue, *arguments) for _ in range(2)]
        first, second = (one.result() for one in both)
    assert first == second == json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(first["tasks"]["CoLA"]["headlines"]) == 4


def test_a_head_that_is_there_is_drawn_anew(encoder, glue, tmp_path):
    """Of the same number of labels or another: every seed has its own, and the encoder's weights stay."""
    cell = Cell("SST-2", FineTuning(3e-3, 8, 1, seed=0), 16, False, "accuracy")
    run_cell(Source(str(encoder), data_dir=glue, is_subset=True), cell, tmp_path / "tuned", "cpu")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    heads = []
    for seed, labels in ((0, 2), (1, 2), (1, 3)):
        model = open_with_new_head(str(tmp_path / "tuned"), AutoModelForSequenceClassification, seed, num_labels=labels)
        heads.append(model.get_parameter("classifier.weight").detach())
        assert len(heads[-1]) == labels
        for name, parameter in model.named_parameters():
            if not name.startswith("classifier."):
                assert torch.equal(parameter, tuned.get_parameter(name)), name
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], tuned.get_parameter("classifier.weight"))


def test_what_was_tuned_on_scores_is_tuned_on_labels(encoder, glue, tmp_path):
    settings = FineTuning(3e-3, 8, 1, seed=0)
    run_cell(Source(str(encoder), data_dir=glue, is_subset=True), Cell("STS-B", settings, 16, False, "spearman"),
             tmp_path / "tuned", "cpu")  # fmt: skip
    found = run_cell(Source(str(tmp_path / "tuned"), data_dir=glue, is_subset=True),
                     Cell("RTE", settings, 16, False, "accuracy"), None, "cpu")  # fmt: skip
    assert 0 <= found["headline"] <= 1


def test_a_grid_is_the_same_when_it_goes_on(encoder, glue, tmp_path, in_this_process):
    """Half of it done before, by the same cells; the other half in a second call; as in one."""
    base = (encoder, "--data-dir", glue, "--preset", "quick", *SMALL, "--epochs", "1", "--task", "SST-2", "--seeds", 2)
    assert run(*base, "--out", tmp_path / "one").exit_code == 0
    assert run(*base[:-1], 1, "--out", tmp_path / "two").exit_code == 0
    assert run(*base, "--out", tmp_path / "two").exit_code == 0
    one, two = ((tmp_path / name / "results.json").read_text() for name in ("one", "two"))
    assert one == two
    other = run(*base, "--out", tmp_path / "two", "--max-train-rows", "10")
    assert isinstance(other.exception, MsltError)
    assert "is the result of other settings (max_train_rows None, now 10)" in str(other.exception)
    other = run(*base, "--out", tmp_path / "two", "--max-tokens", "12")
    assert "(max_tokens 16, now 12)" in str(other.exception)
    changed = write_glue(tmp_path / "other", seed=1)
    other = run(*base, "--out", tmp_path / "two", "--data-dir", changed)
    assert "is the result of other settings (SST-2 " in str(other.exception)


@pytest.mark.slow
def test_killed_three_times_a_grid_comes_to_the_same(encoder, glue, tmp_path):
    """SIGKILL after one, two and three fine-tunings more, in the midst of the next."""
    command = [sys.executable, "-m", "mslt.cli.main", "evaluate", "glue", str(encoder), "--data-dir", str(glue), *SMALL,
               "--preset", "quick", "--task", "SST-2", "--task", "CoLA", "--seeds", "4"]  # fmt: skip
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    folder, reached = tmp_path / "killed", 0
    for _ in range(3):
        with subprocess.Popen([*command, "--out", str(folder)], start_new_session=True) as process:
            while len(list(folder.glob("cells/*/*.json"))) < reached + 2:
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
        reached = len(list(folder.glob("cells/*/*.json")))
        assert reached < 8
        assert not (folder / "results.json").exists()
    assert subprocess.run([*command, "--out", str(folder)]).returncode == 0
    assert (folder / "results.json").read_text() == (tmp_path / "whole" / "results.json").read_text()


@pytest.mark.parametrize("kind", ["roberta", "electra"])
def test_other_encoders(kind, glue, tmp_path):
    encoder = write_encoder(tmp_path / kind, kind)
    cell = Cell("SST-2", FineTuning(3e-3, 8, 4, seed=0), 16, False, "accuracy")
    found = run_cell(Source(str(encoder), data_dir=glue, is_subset=True), cell, None, "cpu")
    assert found["headline"] > 0.9


def test_seeds_draw_another_head_and_another_order(encoder, glue):
    source = Source(str(encoder), data_dir=glue, is_subset=True)
    cells = [Cell("STS-B", FineTuning(1e-3, 8, 1, seed=seed), 16, False, "spearman") for seed in (0, 0, 1)]
    first, again, other = (run_cell(source, cell, None, "cpu")["headline"] for cell in cells)
    assert first == again
    assert first != other


def test_one_step_is_transformers_own(encoder):
    """Plain AdamW with its linear schedule: two steps on one batch end at the same weights."""
    model = AutoModelForSequenceClassification.from_pretrained(encoder, hidden_dropout_prob=0.0,
                                                               attention_probs_dropout_prob=0.0)  # fmt: skip
    reference = AutoModelForSequenceClassification.from_pretrained(encoder, hidden_dropout_prob=0.0,
                                                                   attention_probs_dropout_prob=0.0)  # fmt: skip
    reference.load_state_dict(model.state_dict())
    batch = {"input_ids": torch.tensor([[2, 5, 3]] * 4), "labels": torch.tensor([0, 1, 0, 1])}
    list(fine_tune(model, [0, 1, 2, 3], lambda rows: batch, FineTuning(1e-3, 4, 2, 0, 0.0, 0.01)))
    decays = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}])
    for rate in (1e-3, 0.5e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        reference.train()
        reference(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=0, atol=1e-7, msg=name)


def test_the_median_over_seeds_and_then_the_best_setting(tmp_path):
    cells = cells_of(PRESETS["mslt"], ["SST-2", "MNLI"], range(5), "fp32")
    assert len(cells) == 2 * 4 * 5
    assert {cell.settings.num_epochs for cell in cells_of(PRESETS["mslt"], ["RTE"], range(5), "fp32")} == {10}
    headlines = {5e-5: [0.9, 0.1, 0.8, 0.7, 0.2], 4e-5: [0.6, 0.61, 0.62, 0.63, 0.99],
                 3e-5: [0.71, 0.3, 0.3, 0.72, 0.73], 2e-5: [0.5] * 5}  # fmt: skip
    for cell in cells:
        value = headlines[cell.settings.learning_rate][cell.settings.seed]
        splits = {split: {"accuracy": value} for split in TASKS[cell.task].validation}
        if (cell.task, cell.settings.learning_rate, cell.settings.seed) != ("MNLI", 5e-5, 3):
            path = tmp_path / "cells" / f"{cell.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"epochs": [splits], "epoch": 0, "headline": value})
    found = summary("mslt", PRESETS["mslt"], cells, tmp_path)
    assert (found["tasks"]["SST-2"]["best"], found["tasks"]["SST-2"]["median"]) == ("rate=3e-05_batch=32", 0.71)
    median = median_cell(cells, "SST-2", found["tasks"]["SST-2"])
    assert (median.settings.learning_rate, median.settings.seed) == (3e-5, 0)
    assert found["tasks"]["MNLI"]["failed"] == ["MNLI/rate=5e-05_batch=32_seed=3"]
    assert "rate=5e-05_batch=32" not in found["tasks"]["MNLI"]["settings"]
    assert found["tasks"]["SST-2"]["best_run"] == 0.99
    assert found["tasks"]["SST-2"]["differs"] == []
    assert chosen_here(found) == "Chosen by the scores that are shown: the setting."
    one = summary("mslt", PRESETS["mslt"], [cell for cell in cells if cell.settings.learning_rate == 3e-5], tmp_path)
    assert chosen_here(one) is None


def test_presets_name_known_tasks():
    for preset in PRESETS.values():
        assert set(preset.tasks) <= set(TASKS)
        named = {*preset.epochs, *preset.rates, *preset.batches, *preset.tokens, *preset.headlines}
        assert named <= set(preset.tasks)
        for task in preset.tasks:
            metric = preset.headline(task)
            assert (metric in ("pearson", "spearman")) == TASKS[task].is_regression, task
    assert glue_tasks.EIGHT == ("MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "SST2"], "--task SST2: there are CoLA, .*; did you mean SST-2?"),
        (["--preset", "msl"], "did you mean mslt?"),
        (["--task", "SST-2", "--task", "SST-2"], "stands there twice"),
        (["--task", "QNLI", "--max-tokens", "16"], "QNLI/train.tsv: not there"),
        (["--task", "SST-2", "--max-tokens", "41"], "--max-tokens 41: .* has 40 positions; give 40 or less"),
        (["--node-rank", "1"], "give --hostfile, too"),
        (["--learning-rate", "-1"], "--learning-rate -1.0: must be above 0"),
        (["--learning-rate", "1e-4", "--learning-rate", "1e-4"], "stands there twice"),
        (["--task", "SST-2", "--tokenizer", "/nonexistent/folder"], "no tokenizer that transformers can open"),
    ],
)
def test_mistakes(encoder, glue, tmp_path, arguments, message):
    result = run(encoder, "--data-dir", glue, "--subset", "--preset", "quick", "--out", tmp_path / "out", *arguments)
    assert isinstance(result.exception, MsltError), result.output
    assert re.search(message, str(result.exception)), result.exception


def test_checkpoints_that_do_not_fit(glue, tmp_path, in_this_process):
    def refused(encoder: Path, *more: str) -> str:
        result = run(encoder, "--data-dir", glue, "--preset", "quick", "--task", "SST-2", "--out", tmp_path / "out",
                     *SMALL, *more)  # fmt: skip
        assert isinstance(result.exception, MsltError), result.output
        return str(result.exception)

    no_model = tmp_path / "nothing"
    no_model.mkdir()
    assert "no model folder" in refused(no_model)
    assert "no such folder" in refused(tmp_path / "misspelt")
    small, large = write_encoder(tmp_path / "small", vocab_size=10), write_encoder(tmp_path / "large")
    assert "has 20 entries, the model" in refused(small)
    assert "give it by --tokenizer" in refused(small, "--tokenizer", str(large))

    other = write_encoder(tmp_path / "other")
    held = json.loads((other / "tokenizer.json").read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (other / "tokenizer.json").write_text(json.dumps(held))
    assert "is another tokenizer than the one in" in refused(large, "--tokenizer", str(other))

    bare = write_encoder(tmp_path / "bare")
    BertForMaskedLM.from_pretrained(bare).save_pretrained(bare)  # no pooler
    assert "has no pooler" in refused(bare)
    again = run(bare, "--data-dir", glue, "--preset", "quick", "--task", "SST-2", "--out", tmp_path / "new", *SMALL,
                "--new-pooler")  # fmt: skip
    assert again.exit_code == 0, again.output
