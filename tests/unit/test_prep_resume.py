"""Killed at any moment and started again, preparation makes the same bytes."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.test_prep_prepare import contents, make_text

SEED = 11
# Pieces so small that there are dozens of them.
SCRIPT = """
import sys
from pathlib import Path
from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe

if __name__ == "__main__":
    sources = [{"kind": "text", "path": "text"}, {"kind": "lines", "path": "lines"}]
    values = {"sources": sources, "vocabulary": {"size": 400}, "validation_share": 0.2, "min_document_tokens": 5}
    prepare(DataRecipe.model_validate(values), Path(sys.argv[1]), num_workers=2, piece_bytes=3000)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "lines").mkdir()
    for index in range(60):
        (tmp_path / f"text/{index:03d}.txt").write_text(make_text(index))
    for index in range(4):
        documents = [" ".join(make_text(i).split()) for i in range(100 * index, 100 * index + 30)]
        (tmp_path / f"lines/{index}.txt").write_text("\n".join(documents))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def start(corpus: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "script.py", "shards"], cwd=corpus)


@pytest.mark.parametrize(
    "kills", [3, pytest.param(10, marks=pytest.mark.slow(reason="half a minute, and the shorter one runs always"))]
)
def test_killed_at_random_moments(corpus: Path, kills: int) -> None:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    began = time.monotonic()
    assert start(corpus).wait() == 0
    whole_s = time.monotonic() - began
    undisturbed = contents(corpus / "shards")
    assert sum(name.endswith(".arrow") for name in undisturbed) > 10
    while kills:
        shutil.rmtree(corpus / "shards")
        while kills:
            process = start(corpus)
            workers: list[psutil.Process] = []
            try:
                process.wait(timeout=draw.uniform(0.3, 1.0) * whole_s)
                break  # finished before the blow: once more from the beginning
            except subprocess.TimeoutExpired:
                workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            kills -= 1
            _, alive = psutil.wait_procs(workers, timeout=5)
            assert not alive, "workers end with their parent"
            assert not (corpus / "shards").exists() or contents(corpus / "shards") == undisturbed
        assert start(corpus).wait() == 0
        assert contents(corpus / "shards") == undisturbed
        assert not (corpus / "shards.work").exists()


def test_a_source_that_changes_in_between_is_read_anew(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep import prepare as module
    from data_prep.recipe import DataRecipe

    monkeypatch.chdir(corpus)
    recipe = DataRecipe.model_validate(
        {"sources": [{"kind": "lines", "path": "lines"}], "vocabulary": {"size": 400}, "min_document_tokens": 5}
    )
    tokenize, calls = module.tokenize_piece, 0

    def killed_at_the_second(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        tokenize(*arguments)

    monkeypatch.setattr(module, "tokenize_piece", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        module.prepare(recipe, Path("shards"), piece_bytes=3000)
    monkeypatch.setattr(module, "tokenize_piece", tokenize)
    for path in Path("lines").iterdir():  # as many bytes as before, other documents
        path.write_text(path.read_text().replace("\n", " ", 10).replace("river", "house"))
    manifest, _ = module.prepare(recipe, Path("shards"), piece_bytes=3000)
    assert manifest.sources[0].read.documents == 4 * 20
    module.prepare(recipe, Path("afresh"), piece_bytes=3000)
    assert {k: v for k, v in contents(Path("shards")).items() if k != "manifest.json"} == {
        k: v for k, v in contents(Path("afresh")).items() if k != "manifest.json"
    }


def test_what_is_done_is_not_done_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep import prepare as module
    from data_prep.recipe import DataRecipe

    monkeypatch.chdir(corpus)
    sources = [{"kind": "text", "path": "text"}, {"kind": "lines", "path": "lines"}]
    recipe = DataRecipe.model_validate({"sources": sources, "vocabulary": {"size": 400}, "validation_share": 0.2})

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "tokenize_piece", full)
    with pytest.raises(OSError, match="No space"):
        module.prepare(recipe, Path("shards"), piece_bytes=3000)
    assert not Path("shards").exists()
    monkeypatch.undo()
    monkeypatch.chdir(corpus)
    for name in ("clean_piece", "train_vocabulary", "near_duplicates"):
        monkeypatch.setattr(module, name, None)  # to call it again would be an error
    assert module.prepare(recipe, Path("shards"), piece_bytes=3000)[1]
