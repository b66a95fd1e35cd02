"""What `mslt reproduce` lists: the papers' tables, commands that exist, records that are there."""

from glob import glob
from pathlib import Path

import pytest

from mslt.report.reproduce import (
    BASE,
    LARGE,
    RECORDS,
    fine_tuning_hours,
    hours_of,
    markdown,
    pass_hours,
    reproductions,
)
from tests.command_lines import refuse_unknown_options

ROOT = Path(__file__).parents[2]
NAMES = [
    "mslt-t2", "mslt-t3", "mslt-t4", "mslt-f2", "mslt-f3", "mslt-f4",
    "deebert-t1", "deebert-f2", "deebert-f3", "deebert-f4", "deebert-f5", "deebert-f6",
    "bv-t1", "bv-t2", "bv-f1", "bv-e", "conv-t1", "conv-t2", "conv-f1", "conv-f2", "conv-f4",
]  # fmt: skip


def test_every_table_and_figure_is_listed_once() -> None:
    assert [one.name for one in reproductions()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_its_commands_exist(name: str) -> None:
    (one,) = (one for one in reproductions() if one.name == name)
    for line in one.commands:
        if not line.startswith(("printf ", "hf ", "git ")):  # a recipe, downloads
            refuse_unknown_options(line)


def test_early_exit_is_trained_on_the_papers_models_and_tasks() -> None:
    commands = {one.name: one.commands for one in reproductions() if one.name.startswith("deebert")}
    trained = {name: [line.split()[3:6:2] for line in lines if " train " in line] for name, lines in commands.items()}
    tasks = ("SST-2", "MRPC", "QNLI", "RTE", "QQP", "MNLI")
    assert trained["deebert-t1"] == [[model, task] for model in ("bert-base-uncased", "roberta-base") for task in tasks]
    assert trained["deebert-f2"] == trained["deebert-f4"] == trained["deebert-t1"]
    assert {model for model, _ in trained["deebert-f5"]} == {"bert-large-uncased", "roberta-large"}
    assert {task for _, task in trained["deebert-f6"]} == {"SST-2"}
    for name, lines in commands.items():
        num_benches = sum(line.startswith("mslt exit bench ") for line in lines)
        assert num_benches == (4 if name == "deebert-f3" else 0)
        assert lines[-1].startswith("mslt exit sweep ")
        folders = lines[-1].removeprefix("mslt exit sweep ").removesuffix(" --out report").split()
        assert folders == [line.split()[-1] for line in lines if " train " in line]


def test_nothing_of_ours_stands_without_its_record() -> None:
    for one in reproductions():
        if one.ours is not None:
            assert (ROOT / RECORDS / one.ours.record).is_file(), one.name


def test_hours_are_operations_at_a_v100s_rate() -> None:
    width, tokens, rows = 768, 128, 1000
    layer = tokens * (24 * width**2 + 4 * tokens * width)
    assert pass_hours(BASE, rows) == pytest.approx(3 * 12 * layer * rows / (15.7e12 * 0.65) / 3600)
    # 4 rates, 5 seeds, 10 epochs of 2,490 rows.
    assert fine_tuning_hours("mslt", BASE, ["RTE"]) == pytest.approx(pass_hours(BASE, 20 * 10 * 2490))


def test_hours_are_those_of_the_commands() -> None:
    assert hours_of("mslt train bert-base --shards data/shards") == 32 * 40
    assert hours_of("mslt evaluate glue runs/bert-large --task RTE") == fine_tuning_hours("mslt", LARGE, ["RTE"])
    assert hours_of("mslt evaluate glue copied --preset convexity --task RTE --task CoLA --out copy") == (
        fine_tuning_hours("convexity", BASE, ["RTE", "CoLA"])
    )
    assert hours_of("mslt exit train roberta-base --task RTE --preset paper-roberta --out e") == (
        2 * fine_tuning_hours("deebert-roberta", BASE, ["RTE"])
    )
    once = pass_hours(BASE, 2490, 250)
    assert hours_of("mslt pool train b --task RTE --backbone-epochs 0.5,2 --out c") == pytest.approx(2.5 * once)
    assert hours_of("mslt pool search b --task RTE --trials 100 --out s") == pytest.approx(once / 3)
    senteval = hours_of("mslt probe senteval b --data-dir probing")
    tuned = "mslt probe senteval b tuned/models/*/*_seed=[0-9]/ --raw --data-dir probing"
    assert hours_of(tuned) == pytest.approx(10 * senteval)
    assert hours_of("mslt probe compare b c --picture tuned.png") == 0
    assert all(one.gpu_hours > 0 for one in reproductions())


def test_the_tuned_models_of_figure_1_are_found_by_their_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside them lie what made them and their probes."""
    models = tmp_path / "tuned" / "models"
    name = "rate=2e-05_batch=16_seed=1"
    for task in ("MRPC", "RTE"):
        for folder in (name, f"{name}-evaluation"):
            (models / task / folder).mkdir(parents=True)
        for ending in (".json", ".lock"):
            (models / task / f"{name}{ending}").touch()
    (figure,) = (one for one in reproductions() if one.name == "conv-f1")
    monkeypatch.chdir(tmp_path)
    for command in figure.commands[-2:]:
        (pattern,) = (word for word in command.split() if "*" in word)
        assert sorted(glob(pattern)) == [f"tuned/models/{task}/{name}/" for task in ("MRPC", "RTE")]


def test_every_size_and_task_of_a_table_is_trained() -> None:
    every = {one.name: one for one in reproductions()}
    for name in ("mslt-t2", "mslt-t3", "mslt-t4"):
        lines = " ".join(every[name].commands)
        for row in every[name].reported[1:]:
            model = ("bert-large" if "Large" in row[0] else "bert-base") + "-full" * ("full" in row[0])
            assert f"train {model} " in lines or f"extends: {model}\\n" in lines, (name, row[0])
    for name, first in (("bv-t1", 1), ("conv-t1", 1), ("conv-t2", 1)):
        for task in every[name].reported[0][first:]:
            assert f"--task {task}" in " ".join(every[name].commands), (name, task)


def test_figures_keep_the_papers_digits() -> None:
    (table,) = (one for one in reproductions() if one.name == "deebert-t1")
    assert table.reported[1][2].startswith("SST-2 93.6, MRPC 88.2, QNLI 91.0")
    assert "RTE -0.4, QQP -0.0" in table.reported[3][2]
    assert table.reported[8][2].startswith("SST-2 +0.1"), "a gain"


def test_readme_shows_the_same() -> None:
    assert "\n".join(markdown(reproductions())) in (ROOT / "README.md").read_text(), (
        "put what `mslt reproduce --markdown` prints into README.md"
    )
