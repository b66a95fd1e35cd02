"""Early exit of a model that mslt itself pretrained in stages: the pooler of each gives the ramps of its own layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from mslt.errors import MsltError
from mslt.evaluate.exits import open_exits, poolers_of
from mslt.heads.early_exit import EarlyExitModel
from mslt.heads.off_ramp import RampOptions
from mslt.rundir import RunDir
from tests.distributed.runs import train, write_recipe
from tests.glue_files import write_glue
from tests.unit.test_exit_commands import QUICK, command, printed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_sections: dict[str, Any]) -> RunDir:
    """Stages of 2 and 4 layers, then all 4, 2 steps each, on one worker."""
    folder = tmp_path_factory.mktemp("staged")
    changed = {
        "schedule": {"name": "mslt", "k": 2, "steps": 6, "retrain_share": 1 / 3},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
    }
    recipe = write_recipe(folder / "recipe.yaml", {**tiny_sections, **changed})
    train(recipe, shards, folder / "run", workers=1)
    return RunDir(folder / "run")


def test_ramps_begin_from_the_stage_whose_own_layers_they_stand_on(finished: RunDir) -> None:
    sources = poolers_of("stages", str(finished.path), depth=4)
    folders = [Path(source.name_or_path).parent.name for source in sources]
    assert folders == ["stage-1", "stage-1", "stage-2"]
    with pytest.raises(MsltError, match=r"have up to 4 layers, the ramps stand behind 11"):
        poolers_of("stages", str(finished.path), depth=12)
    first, second = (AutoModel.from_pretrained(finished.stage(index).model) for index in (0, 1))
    assert not torch.equal(first.pooler.dense.weight, second.pooler.dense.weight)
    assert torch.equal(sources[1].pooler.dense.weight, first.pooler.dense.weight)


def test_a_sweep_of_a_run_that_was_finetuned(finished: RunDir, tmp_path: Path) -> None:
    glue = ["--data-dir", str(write_glue(tmp_path / "glue", num_dev=64)), "--subset"]
    command("train", finished.path, "--task", "SST-2", "--out", tmp_path / "exits", "--ramp-init", "stages",
            "--ramp-init-from", finished.path, *QUICK, *glue)  # fmt: skip
    opened = open_exits(tmp_path / "exits", None, "cpu")
    assert opened.exits.options == RampOptions("stages")
    assert isinstance(opened.exits, EarlyExitModel)
    (swept,) = printed("sweep", tmp_path / "exits", "--out", tmp_path / "report", *glue)
    assert (swept["num_exits"], swept["rows"]) == (4, 64)
    assert (tmp_path / "report" / "figure-2.png").stat().st_size > 10_000
    ends = [point["saving"] for point in swept["points"]["entropy"]]
    assert (ends[0], ends[-1]) == (0.0, 0.75)
