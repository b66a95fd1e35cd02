"""What `mslt compare` says of runs that were held out on different samples."""

from pathlib import Path
from typing import Any

from mslt.plan import Plan
from mslt.report.comparison import differences


def written(folder: Path, plan: Plan, **data: Any) -> Path:
    folder.mkdir()
    changed = plan.model_copy(update={"data": plan.data.model_copy(update=data)})
    (folder / "plan.json").write_text(changed.model_dump_json())
    return folder


def test_other_samples_are_named(tmp_path: Path, tiny_plan: Plan) -> None:
    first = written(tmp_path / "first", tiny_plan)
    moved = written(tmp_path / "moved", tiny_plan, shards="elsewhere")
    assert differences([first, moved]) == []
    words = written(tmp_path / "words", tiny_plan, whole_word_masking=True, max_predictions=7)
    (line,) = differences([first, moved, words])
    assert line.startswith(f"{words} is held out on other samples than {first}: ")
    assert "max_predictions 5 → 7, whole_word_masking False → True" in line
