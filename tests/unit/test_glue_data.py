"""GLUE's rows, as its files have them and as copies in circulation break them."""

import os
from pathlib import Path

import datasets
import pytest

from mslt.errors import MsltError
from mslt.evaluate import glue_data
from mslt.evaluate.glue_data import Row, read_split
from mslt.evaluate.glue_scores import scores
from mslt.evaluate.glue_tasks import TASKS
from tests.glue_files import write_glue

REAL = Path(os.environ.get("MSLT_TEST_DATA", "/nonexistent")) / "glue"
needs_glue = pytest.mark.skipif(not REAL.is_dir(), reason="GLUE's files are not there: set MSLT_TEST_DATA")


@needs_glue
@pytest.mark.parametrize("name", ["CoLA", "MRPC", "RTE", "SST-2", "STS-B", "WNLI"])
def test_real_files_have_the_official_rows(name):
    task = TASKS[name]
    lines = (REAL / task.folder / "train.tsv").read_bytes().count(b"\n")
    for split in ("train", "validation"):
        if (name, split, lines) == ("MRPC", "train", 3668):  # a copy that goes round: with its header a row short
            with pytest.raises(MsltError, match="has 3,667 rows, GLUE's has 3,668"):
                read_split(task, split, REAL)
            continue
        rows = read_split(task, split, REAL)
        assert len(rows) == task.rows[task.splits.index(split)]
        assert all(row.text.strip() and (row.pair is None) == (len(task.columns) == 1) for row in rows)


@needs_glue
@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("CoLA", 1, {"accuracy": 721 / 1043, "matthews": 0.0}),
        ("MRPC", 1, {"accuracy": 279 / 408, "f1": 2 * 279 / (2 * 279 + 129)}),
        ("RTE", 0, {"accuracy": 146 / 277}),
        ("SST-2", 1, {"accuracy": 444 / 872}),
        ("WNLI", 0, {"accuracy": 40 / 71}),
        ("STS-B", 2.5, {"pearson": 0.0, "spearman": 0.0}),
    ],
)
def test_constant_answers_score_what_the_labels_say(name, answer, expected):
    rows = read_split(TASKS[name], "validation", REAL)
    found = scores(TASKS[name], [answer] * len(rows), [row.label for row in rows])
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected, abs=1e-12)


@needs_glue
def test_figures_of_constant_answers_as_papers_round_them():
    def percent(name, answer, metric):
        rows = read_split(TASKS[name], "validation", REAL)
        return round(100 * scores(TASKS[name], [answer] * len(rows), [row.label for row in rows])[metric], 2)

    assert percent("MRPC", 1, "accuracy") == 68.38
    assert percent("MRPC", 1, "f1") == 81.22
    assert percent("RTE", 0, "accuracy") == 52.71
    assert round(percent("CoLA", 1, "accuracy"), 1) == 69.1
    assert round(percent("SST-2", 1, "accuracy"), 1) == 50.9


def test_rows_labels_and_pairs(tmp_path):
    folder = write_glue(tmp_path / "glue", num_train=3, num_dev=2)
    (folder / "SST-2" / "train.tsv").write_text('sentence\tlabel\na "quoted" film \t1\n"never\tclosed\t0\r\n')
    with pytest.raises(MsltError, match="line 3"):
        read_split(TASKS["SST-2"], "train", folder, is_subset=True)
    (folder / "SST-2" / "train.tsv").write_text('sentence\tlabel\na "quoted" film \t1\r\n"never closed\t0\r\n')
    assert read_split(TASKS["SST-2"], "train", folder, is_subset=True) == [
        Row('a "quoted" film ', None, 1),
        Row('"never closed', None, 0),
    ]
    assert {row.label for row in read_split(TASKS["SST-2"], "test", folder)} == {None}
    pair = read_split(TASKS["STS-B"], "train", folder, is_subset=True)[0]
    assert pair.pair is not None
    assert pair.label in (0.0, 5.0)


@pytest.mark.parametrize(
    ("task", "file", "text", "message"),
    [
        ("CoLA", "train", "source\tlabel\toriginal_label\tsentence\nsrc\t1\t\tfine\n", "line 1: the label is 'label'"),
        ("CoLA", "train", "src\t1\n", "line 1: 2 columns, column 4 is needed"),
        ("SST-2", "train", "sentence,label\ngood film,1\n", "has no column sentence, label"),
        ("SST-2", "dev", "index\tsentence\n0\tgood film\n", "has no column label"),
        ("SST-2", "train", "sentence\tlabel\n", "has no rows"),
        ("STS-B", "train", "index\tsentence1\tsentence2\tscore\n0\ta\tb\tgood\n", "the score is 'good'"),
        ("RTE", "train", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", "none of entailment, not_entailment"),
        ("WNLI", "train", None, "not there"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, task, file, text, message):
    folder = write_glue(tmp_path / "glue")
    if text is not None:
        path = folder / TASKS[task].folder / f"{file}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    split = {"train": "train", "dev": "validation"}[file]
    with pytest.raises(MsltError, match=message):
        read_split(TASKS[task], split, folder, is_subset=True)


def test_other_encodings_are_refused(tmp_path):
    folder = write_glue(tmp_path / "glue")
    (folder / "SST-2" / "train.tsv").write_bytes("sentence\tlabel\ncafé\t1\n".encode("latin-1"))
    with pytest.raises(MsltError, match="not readable as UTF-8"):
        read_split(TASKS["SST-2"], "train", folder, is_subset=True)


def test_a_split_of_another_size_is_refused_unless_said(tmp_path):
    folder = write_glue(tmp_path / "glue", num_train=5)
    assert len(read_split(TASKS["CoLA"], "train", folder, is_subset=True)) == 5
    with pytest.raises(MsltError, match=r"has 5 rows, GLUE's has 8,551.*--subset"):
        read_split(TASKS["CoLA"], "train", folder)


def test_qqp_torn_rows_are_left_out_as_in_the_official_count(tmp_path):
    path = tmp_path / "QQP" / "train.tsv"
    path.parent.mkdir()
    path.write_text("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\ta\tb\t1\n2\ttorn\n3\t1\t2\tc\td\t0\n")
    rows = read_split(TASKS["QQP"], "train", tmp_path, is_subset=True)
    assert rows == [Row("a", "b", 1), Row("c", "d", 0)]


def test_rows_of_the_hub_are_those_of_the_files(tmp_path, monkeypatch):
    """A folder in the hub's layout stands for it: the same rows, the same labels."""
    folder = write_glue(tmp_path / "glue")
    hub = tmp_path / "hub"
    for config, task in (("sst2", TASKS["SST-2"]), ("stsb", TASKS["STS-B"])):
        for split in ("train", "validation", "test"):
            rows = read_split(task, split, folder, is_subset=True)
            columns = {name: [(row.text, row.pair)[i] for row in rows] for i, name in enumerate(task.hub_columns)}
            labels = [-1 if row.label is None else row.label for row in rows]
            path = hub / config / f"{split}.parquet"
            datasets.Dataset.from_dict({**columns, "label": labels}).to_parquet(path)
    (hub / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {config}/{s}.parquet\n" for s in ("train", "validation", "test"))
            for config in ("sst2", "stsb")
        )
        + "---\n"
    )
    monkeypatch.setattr(glue_data, "HUB", str(hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("SST-2", "STS-B"):
        for split in ("train", "validation", "test"):
            from_hub = read_split(TASKS[name], split, None, is_subset=True)
            assert from_hub == read_split(TASKS[name], split, folder, is_subset=True)
