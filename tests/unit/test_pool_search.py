"""The search for settings: equal budgets, trials that go on where they were stopped, tables of what was found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate import pool_search
from mslt.evaluate.pool_search import ADAPTER_WIDTHS, BATCH_SIZES
from mslt.files import lock_alone
from mslt.heads.pooling import new_head
from mslt.report import paper
from mslt.report.pooling import compression_rows, score_table, size_rows
from tests.encoders import write_encoder
from tests.glue_files import write_glue
from tests.squad_files import questions, write_squad
from tests.unit.test_pool_commands import command, flip_first_label, printed, with_nan


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = write_glue(tmp_path_factory.mktemp("glue"), num_train=64, num_dev=16)
    return ["--data-dir", str(folder), "--subset", "--max-tokens", "24"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


BUDGET = ["--trials", "3", "--seeds", "2", "--choose-share", "0.25"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, glue: list[str], encoder: Path) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("searched")
    methods = [each for name in ("adapter", "probe", "full") for each in ("--method", name)]
    return out, printed("search", encoder, "--task", "SST-2", "--out", out / "out", *methods, *BUDGET, *glue)


def test_each_method_has_the_same_budget_and_its_own_ranges(searched: tuple[Path, Any]) -> None:
    out, (found,) = searched
    assert (found["rows"], found["chosen_on"]) == (48, 16)
    assert list(found["methods"]) == ["adapter", "probe", "full"]
    for method, each in found["methods"].items():
        assert sum(each["trials"].values()) == 3
        assert len(each["headlines"]) == len(each["scores"]) == 2
        assert each["best"]["batch_size"] in BATCH_SIZES
        assert (each["best"]["adapter_width"] in ADAPTER_WIDTHS) == (method == "adapter")
        low, high, _ = pool_search.RATES["head" if method == "adapter" else method]
        assert low <= each["best"]["learning_rate"] <= high
    assert found["methods"]["probe"]["sizes"]["head"] == 32 * 2 + 2
    assert found["methods"]["full"]["sizes"]["ratio"] == 1
    assert json.loads((out / "out" / "SST-2" / "results.json").read_text()) == found
    heads = sorted(folder.name for folder in (out / "out" / "SST-2" / "heads").iterdir())
    assert heads == ["adapter-0", "adapter-1", "probe-0", "probe-1"]


def test_a_search_that_was_stopped_finds_the_same(
    searched: tuple[Path, Any], encoder: Path, glue: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the second trial; then more methods come to the results, and no trial is done twice."""
    _, (whole,) = searched
    arguments = ["search", encoder, "--task", "SST-2", "--out", tmp_path, *BUDGET, *glue]
    tried, stop_at = [], 1
    real = pool_search._tried

    def counted(*given: Any) -> float:
        tried.append(given[2].number)
        if len(tried) == stop_at + 1:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(pool_search, "_tried", counted)
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        command(*arguments, "--method", "adapter")
    assert not (tmp_path / "SST-2" / "results.json").exists()
    (found,) = printed(*arguments, "--method", "adapter")
    assert len(tried) == 4
    assert _without_time(found["methods"]["adapter"]) == _without_time(whole["methods"]["adapter"])
    (both,) = printed(*arguments, "--method", "probe")
    assert both["methods"].keys() == {"adapter", "probe"}
    assert len(tried) == 7
    shutil.rmtree(tmp_path / "SST-2" / "finals")
    assert _without_time(printed(*arguments, "--method", "probe")[0]["methods"]["probe"]) == _without_time(
        both["methods"]["probe"]
    )
    assert len(tried) == 7
    (more,) = printed(*arguments[: -len(glue) - len(BUDGET)], "--method", "probe", "--trials", "4", *BUDGET[2:], *glue)
    assert more["methods"].keys() == {"probe"}, "of unequal budgets no table is made"
    (less,) = printed(*arguments, "--method", "probe")
    assert _without_time(less["methods"]["probe"]) == _without_time(both["methods"]["probe"]), "the first three trials"
    with pytest.raises(MsltError, match=r"of other settings .*choose_share"):
        command(*arguments, "--method", "probe", "--choose-share", "0.5")


def test_what_a_killed_process_leaves_stops_no_search(
    searched: tuple[Path, Any], encoder: Path, glue: list[str], tmp_path: Path
) -> None:
    """Half a line in the journal, a trial that never ended, and optuna's own lock."""
    out, (whole,) = searched
    shutil.copytree(out / "out", tmp_path / "out")
    folder = tmp_path / "out" / "SST-2"
    journal = (folder / "adapter.journal").read_bytes().splitlines(keepends=True)
    ends = [index for index, line in enumerate(journal) if b'"op_code":6' in line]
    (folder / "adapter.journal").write_bytes(b"".join(journal[: ends[1]]) + journal[ends[1]][:20])
    (folder / "adapter.journal.lock").symlink_to("adapter.journal")
    shutil.rmtree(folder / "finals")
    (found,) = printed("search", encoder, "--task", "SST-2", "--out", tmp_path / "out", "--method", "adapter", *BUDGET,
                       *glue)  # fmt: skip
    assert _without_time(found["methods"]["adapter"]) == _without_time(whole["methods"]["adapter"])


def _without_time(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "train_s"}


def test_an_encoder_that_has_learnt_the_rows_is_told(encoder: Path, glue: list[str], tmp_path: Path) -> None:
    tuned = shutil.copytree(encoder, tmp_path / "tuned")
    (tuned / "provenance.json").write_text('{"task": "SST-2"}')
    search = ["search", tuned, "--out", tmp_path / "out", "--trials", "1", "--seeds", "1", *glue]
    for more in ([], ["--full-from", tuned]):
        with pytest.raises(MsltError, match=r"was fine-tuned on SST-2 already.*--full-from"):
            command(*search, "--task", "SST-2", "--method", "full", *more)
    assert not (tmp_path / "out").exists()
    (found,) = printed(*search, "--task", "SST-2", "--method", "probe", "--full-from", encoder)
    assert "chosen by scores that are too good" in found["warnings"][0]
    (other,) = printed(*search, "--task", "RTE", "--method", "probe")
    assert other["warnings"] == []
    (tuned / "provenance.json").write_text("[")
    with pytest.raises(MsltError, match=r"provenance\.json: cannot be read"):
        command(*search, "--task", "SST-2", "--method", "probe")


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_search_goes_on_with_the_same_labels_alone(
    split: str, searched: tuple[Path, Any], encoder: Path, glue: list[str], tmp_path: Path
) -> None:
    data = shutil.copytree(glue[1], tmp_path / "glue")
    flip_first_label(data / "SST-2" / f"{split}.tsv")
    folder = shutil.copytree(searched[0] / "out", tmp_path / "out")
    with pytest.raises(MsltError, match=r"of other settings \(data_sha256"):
        command("search", encoder, "--task", "SST-2", "--out", folder, "--method", "probe", *BUDGET, "--data-dir", data,
                *glue[2:])  # fmt: skip
    with lock_alone(folder / "SST-2" / ".lock", None), pytest.raises(MsltError, match="another process searches there"):
        command("search", encoder, "--task", "SST-2", "--out", folder, "--method", "probe", *BUDGET, *glue)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("search.json", "{"), ("search.json", "[]"), ("results.json", "{"), ("results.json", '{"num_trials": 3}'),
        ("finals/probe-0.json", "{"), ("finals/probe-0.json", "{}"), ("probe.journal", "{\n"),
        ("probe.journal", "{}\n"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_search_is_named(
    name: str, text: str, searched: tuple[Path, Any], encoder: Path, glue: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(searched[0] / "out", tmp_path / "out")
    (folder / "SST-2" / name).write_text(text)
    with pytest.raises(MsltError, match=rf"{name}: is damaged .*(remove it|move .* away)"):
        command("search", encoder, "--task", "SST-2", "--out", folder, "--method", "probe", *BUDGET, *glue)


def test_a_seed_that_diverges_is_counted(
    encoder: Path, glue: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where all do, the search ends, too."""
    seeds = [keyed.torch_seed(0, "final", index) % 2**31 for index in range(2)]
    search = ["search", encoder, "--task", "SST-2", "--method", "probe", "--trials", "1", "--seeds", "2", *glue]
    for num_lost in (1, 2):
        monkeypatch.setattr(
            pool_search, "new_head", lambda settings, model, seed, lost=seeds[:num_lost]: with_nan(
                new_head(settings, model, seed), seed in lost))  # fmt: skip
        results = printed(*search, "--out", tmp_path / str(num_lost))
        found = results[0]["methods"]["probe"]
        assert found["headlines"].count(None) == found["scores"].count(None) == num_lost
        assert (found["mean"], found["deviation"]) == (found["headlines"][1], None)
        assert score_table(results)[1][0][1].endswith(f"({num_lost} diverged)")
        heads = [folder.name for folder in (tmp_path / str(num_lost) / "SST-2").glob("heads/*")]
        assert heads == ["probe-1"][: 2 - num_lost]
    full = {"mean": 0.9, "sizes": found["sizes"]}
    assert compression_rows([{**results[0], "methods": {"probe": found, "full": full}}])[0][0] == "full"


def test_poor_trials_are_pruned(
    encoder: Path, glue: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_search, "STARTUP_TRIALS", 1)
    monkeypatch.setattr(pool_search, "BATCH_SIZES", (8,))
    scores = iter([0.9, 0.9, 0.9, 0.9, 0.1, 0.8, 0.8, 0.8, 0.8])
    monkeypatch.setattr(pool_search.Trained, "chosen_headline", lambda self: next(scores))
    (found,) = printed("search", encoder, "--task", "SST-2", "--out", tmp_path, "--method", "probe", "--trials", "2",
                       "--seeds", "1", *glue)  # fmt: skip
    assert found["methods"]["probe"]["trials"] == {"complete": 1, "pruned": 1}
    assert next(scores) == 0.8, "the second trial ended at its first look"


def test_spans_are_searched_from_a_cache(encoder: Path, tmp_path: Path) -> None:
    made = questions(24)
    (found,) = printed(
        "search", encoder, "--task", "SQuAD", "--squad-train", write_squad(tmp_path / "t.json", made), "--squad-dev",
        write_squad(tmp_path / "d.json", made[:8]), "--subset", "--max-tokens", 32, "--stride", 4, "--question-tokens",
        10, "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--method", "adapter", "--method", "probe",
        "--trials", "1", "--seeds", "1",
    )  # fmt: skip
    assert (tmp_path / "cache" / "SQuAD" / "cache.json").is_file()
    assert found["methods"]["probe"]["sizes"]["head"] == 2 * 32 + 2
    assert "HasAns_f1" in found["methods"]["adapter"]["scores"][0]["dev"]


def test_tables_hold_ours_from_results_and_the_papers(searched: tuple[Path, Any]) -> None:
    _, results = searched
    header, rows = score_table(results)
    assert header == ["", "SST-2"]
    assert [row[0] for row in rows] == [
        "adapter, 3 trials, 2 seeds", "probe, 3 trials, 2 seeds", "full, 3 trials, 2 seeds",
        *(f"{each.name} (paper)" for each in paper.POOLING),
    ]  # fmt: skip
    assert rows[4][1] == "92.7"
    assert "±" in rows[0][1]
    assert size_rows(results)[1][:2] == ["SST-2, probe", "66"]
    compression = compression_rows(results)
    assert compression[2][0] == "full"
    assert compression[2][3] == "100.0%"
    assert ["BERTVision (paper)", "209×", "–", "100%"] in compression
    alone = [{**results[0], "methods": {"probe": results[0]["methods"]["probe"]}}]
    assert compression_rows(alone)[0][0].startswith("BERT-base"), "none of ours without full"


def test_the_papers_rows_are_all_there() -> None:
    assert [len(row.scores) for row in paper.POOLING] == [9] * 4
    means = [sum(v for t, v in row.scores.items() if t != "SQuAD") / 8 for row in paper.POOLING]
    assert [round(mean, 2) for mean in means] == [80.1, 82.08, 74.35, 79.08]
    assert len(paper.COMPRESSION) == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "adapters"], "did you mean adapter"),
        (["--choose-share", "1"], "--choose-share 1"),
        (["--layers", "0:7"], "--layers 0:7"),
    ],
)
def test_bad_input_is_one_message(
    encoder: Path, glue: list[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(MsltError, match=said):
        command("search", encoder, "--task", "SST-2", "--out", tmp_path / "out", *arguments, *glue)
    assert not (tmp_path / "out").exists()
