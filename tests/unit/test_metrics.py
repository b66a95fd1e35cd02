"""metrics.jsonl through kills and resumes."""

from pathlib import Path

from mslt import metrics


def record(stage: int, step: int, kind: str = "train") -> dict[str, object]:
    return {"kind": kind, "stage": stage, "step": step, "mlm_loss": 0.1 * step}


def written(path: Path, *records: dict[str, object]) -> Path:
    for line in records:
        metrics.append(path, line)
    return path


def test_records_come_back_in_order(tmp_path: Path) -> None:
    lines = [record(1, 0, "evaluation"), record(1, 1), record(1, 2)]
    assert list(metrics.read(written(tmp_path / "m.jsonl", *lines))) == lines
    assert list(metrics.read(tmp_path / "none.jsonl")) == []


def test_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", record(1, 1), record(1, 2))
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[1]) + 1):
        path.write_text(whole[:-cut])
        assert list(metrics.read(path)) == [record(1, 1)], cut


def test_rewind_drops_later_steps_and_later_stages(tmp_path: Path) -> None:
    lines = [record(1, 10), record(1, 20), record(2, 20, "evaluation"), record(2, 30), record(2, 40), record(3, 50)]
    for stage, step, kept in ((2, 30, 4), (2, 29, 3), (2, 20, 3), (2, -1, 2), (3, -1, 5), (1, 10, 1), (3, 50, 6)):
        path = written(tmp_path / f"{stage}-{step}.jsonl", *lines)
        metrics.rewind(path, stage, step)
        assert list(metrics.read(path)) == lines[:kept], (stage, step)


def test_rewound_file_without_its_cut_line_takes_new_records(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", record(1, 1), record(1, 2), record(1, 3))
    path.write_text(path.read_text()[:-5])
    metrics.rewind(path, 1, 2)
    written(path, record(1, 3))
    assert list(metrics.read(path)) == [record(1, 1), record(1, 2), record(1, 3)]
    assert list(tmp_path.iterdir()) == [path]


def test_rewinding_nothing_makes_no_file(tmp_path: Path) -> None:
    metrics.rewind(tmp_path / "m.jsonl", 1, 0)
    assert not list(tmp_path.iterdir())
