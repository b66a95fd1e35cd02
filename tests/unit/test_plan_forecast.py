"""`mslt plan` for a cluster that is described: tables, a proposal, JSON; and what it refuses to guess."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import mslt.launcher
import mslt.preflight
from mslt.cli.main import app
from mslt.config import load_recipe
from mslt.cost import StepCosts, probes, scaled, step_parts
from mslt.engine.ds_config import read_engine_config
from mslt.errors import MsltError
from mslt.forecast import forecasts
from mslt.hardware import Cluster, cluster_costs
from mslt.plan import Plan
from mslt.preflight import Checked
from mslt.schedule import make_plan

V100S = ["--gpus", "32", "--gpu", "v100", "--link-gbps", "100"]
A100S = ["--gpus", "32", "--gpu", "a100", "--link-gbps", "100"]
ONE_A100 = ["--gpus", "1", "--gpu", "a100"]

PLAN_AND_TELL = """
import sys
from mslt.cli.main import main
sys.argv = ["mslt", "plan", "bert-base", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "numpy", "transformers", "deepspeed", "pyarrow", "tokenizers", "datasets", "matplotlib"}
    print("heavy:", sorted(heavy & sys.modules.keys()), file=sys.stderr)
"""


def planned(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def as_json(*arguments: str) -> dict[str, Any]:
    return json.loads(planned(*arguments, "--json").stdout)["forecast"]


@pytest.fixture
def fp32(tmp_path: Path) -> str:
    """BERT-Base in fp32, as the paper's hours look like."""
    path = tmp_path / "fp32.yaml"
    path.write_text("extends: bert-base\nengine: zero0_fp32\n")
    return str(path)


def written(folder: Path, sections: dict[str, Any], **changes: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**sections, **changes}))
    return str(path)


def row(output: str, name: str) -> list[str]:
    """The cells of the only table row of that name."""
    (line,) = (line for line in output.splitlines() if line.startswith("│") and line.split("│")[1].strip() == name)
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_tables_and_a_proposal_for_a_described_cluster(fp32: str) -> None:
    said = planned(fp32, *V100S, "--hours", "40").stdout
    # 81.5 h (see test_forecast.py) less 53.5 ms a step, in which gradients of layers and heads travel.
    assert row(said, "full") == ["66.6 h", "1.00×", "1,000,000", "600,177"]
    assert row(said, "mslt, k=4 (this recipe)")[:2] == ["33.5 h", "1.99×"]
    for name in ("mslt, k=2", "mslt, k=3", "mslt, k=6", "mslt, k=12", "stacking", "interleave", "one_shot"):
        assert len(row(said, name)) == 4
    _, timed = said.split("A step of each stage, milliseconds")
    stages = [row(timed, str(number)) for number in range(1, 6)]
    assert [len(cells) for cells in stages] == [6] * 5
    for cells in stages:
        *parts, step = (float(cell) for cell in cells)
        assert sum(parts) == pytest.approx(step, abs=0.3)
    advice = said.splitlines()[-1]
    assert advice.startswith("Proposed: schedule: {name: mslt, steps: 1193031, k: 4, retrain_share: 0.2}")
    assert "238,607 + 238,606 + 238,606 + 238,606 + 238,606 steps and 40.0 h" in advice


def test_without_hours_the_recipes_steps_are_proposed(fp32: str) -> None:
    said = planned(fp32, *V100S).stdout
    assert len(row(said, "full")) == 3
    assert "Proposed: schedule: {name: mslt, steps: 1000000, k: 4, retrain_share: 0.2}" in said
    assert "200,000 + 200,000 + 200,000 + 200,000 + 200,000 steps and 33.5 h" in said


def test_a_card_without_bf16_is_told_of(fp32: str) -> None:
    bf16 = planned("bert-base", *V100S).stdout
    assert "v100 has no bf16: these are hours of fp16; train there with an engine of fp16 or fp32." in bf16
    assert "has no bf16" not in planned(fp32, *V100S).stdout
    assert "has no bf16" not in planned("bert-base", "--gpus", "32", "--gpu", "a100", "--link-gbps", "100").stdout


def test_json_has_the_forecast(fp32: str) -> None:
    found = as_json(fp32, *V100S, "--hours", "40")
    recipe = load_recipe(fp32)
    costs = cluster_costs(make_plan(recipe, {}), Cluster(32, "v100", 100), None, None, 4)
    assert found["step_costs"] == asdict(costs)
    assert len(found["stage_step_s"]) == 5
    embeddings = (30522 + 512 + 2) * 768 + 2 * 768  # all else travels beside the backward pass
    assert found["stage_step_s"][4]["reduce"] == pytest.approx(embeddings * 2 * 31 / 32 * 4 / 12.5e9)
    assert found["stage_step_s"][3]["reduce"] == 0.0
    for one, said in zip(forecasts(recipe, costs), found["schedules"], strict=True):
        assert (said["name"], said["total_s"], said["speedup"]) == (one.name, one.total_s, one.speedup)
        assert said["steps_in_time"] == one.steps_in(40 * 3600)
        assert said["schedule"]["steps"] == 1_000_000
        assert said["is_own"] == (one.name == "mslt, k=4")
    assert found["proposal"] in found["schedules"]
    assert found["proposal"]["schedule"]["k"] == 4
    assert "steps_in_time" not in as_json(fp32, *V100S)["proposal"]


def test_a_plan_alone_has_no_forecast() -> None:
    result = planned("bert-base", "--json")
    assert "forecast" not in json.loads(result.stdout)
    assert "Proposed" not in planned("bert-base").stdout


@pytest.mark.parametrize(("kind", "num_bytes"), [("fp32", 4), ("bf16", 2), ("fp16", 2), (None, 4)])
def test_bytes_of_a_gradient_are_those_that_the_engine_sends(
    tmp_path: Path, tiny_recipe: dict[str, Any], kind: str | None, num_bytes: int
) -> None:
    engine = tmp_path / "engine.json"
    engine.write_text(json.dumps({} if kind is None else {"communication_data_type": kind}))
    found = as_json(written(tmp_path, tiny_recipe, engine=str(engine)), "--gpus", "4", "--gpu", "a100",
                    "--link-gbps", "8")  # fmt: skip
    assert found["step_costs"]["reduce_parameter"] == pytest.approx(2 * 3 / 4 * num_bytes / 1e9)


def test_one_gpu_reduces_nothing_and_needs_no_link() -> None:
    costs = as_json("bert-base", *ONE_A100)["step_costs"]
    assert as_json("bert-base", *ONE_A100, "--link-gbps", "5")["step_costs"] == costs, "nor does it use one"
    assert costs["reduce_once"] == costs["reduce_parameter"] == 0
    assert costs["layer_forward"] == pytest.approx(32 * as_json("bert-base", *A100S)["step_costs"]["layer_forward"])


def test_where_growing_will_not_pay_it_says_so(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    """Predicting words is nearly all there is to do; of two layers k 2 freezes the words' share for a third of it."""
    tiny_recipe["model"] |= {"num_hidden_layers": 2, "vocab_size": 100_000}
    tiny_recipe["training"]["batch_size"] = 512
    recipe = written(tmp_path, tiny_recipe)
    said = planned(recipe, *ONE_A100).stdout
    assert "Freezing will not pay here: `mslt` is at most 1." in said
    assert "Train with `schedule: {name: full}`." in said
    assert "Proposed" not in said
    assert as_json(recipe, *ONE_A100, "--hours", "1")["proposal"] is None


def test_of_one_layer_growing_is_not_possible(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["model"]["num_hidden_layers"] = 1
    said = planned(written(tmp_path, tiny_recipe, schedule={"name": "full", "steps": 60}), *ONE_A100).stdout
    assert row(said, "full (this recipe)")[1] == "1.00×"
    assert "No k divides 1 layers into stages of 1 or more. The fastest at equal steps is full (1.00 times)." in said


def test_where_no_k_makes_deep_stages_the_fastest_is_named(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["model"] |= {"num_hidden_layers": 7, "vocab_size": 64}
    recipe = written(tmp_path, tiny_recipe, schedule={"name": "full", "steps": 60})
    said = planned(recipe, *ONE_A100).stdout
    assert "No k divides 7 layers into stages of 3 or more. " in said
    assert "The fastest at equal steps is one_shot (" in said
    assert as_json(recipe, *ONE_A100)["proposal"] is None


def test_a_card_is_found_however_its_name_is_written() -> None:
    assert as_json("bert-base", "--gpus", "32", "--gpu", "A100", "--link-gbps", "100") == as_json("bert-base", *A100S)


def test_a_bf16_recipe_is_foretold_on_cards_without_bf16() -> None:
    """As fast as their tensor cores are in fp16: of 125 to 312 TFLOP/s."""
    costs, on_a100 = (as_json("bert-base", *where)["step_costs"] for where in (
        ["--gpus", "32", "--gpu", "V100", "--link-gbps", "100"], A100S))  # fmt: skip
    assert costs["layer_forward"] == pytest.approx(on_a100["layer_forward"] * 312 / 125)
    assert costs["reduce_parameter"] == on_a100["reduce_parameter"]


@pytest.mark.parametrize("engine", ["zero1_bf16", "zero2_fp32", "zero3_fp32"])
@pytest.mark.parametrize("arguments", [ONE_A100, A100S, ["--gpus", "8", "--link-gbps", "10", "--measure"]], ids=str)
def test_only_zero_0_is_foretold(
    tmp_path: Path, engine: str, arguments: list[str], timed: list[tuple[Any, ...]]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"extends: bert-base\nengine: {engine}\n")
    with pytest.raises(MsltError, match=rf"--gpus {arguments[1]}: communication is foretold for ZeRO-0 alone; .*zero0"):
        planned(str(path), *arguments)
    assert not timed


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "mslt", "k": 2},
        {"name": "mslt", "k": 2, "new_layers": "random"},
        {"name": "mslt", "k": 2, "freeze": "below"},
        {"name": "mslt", "k": 4, "freeze": "none"},
        {"name": "stacking"},
        {"name": "stacking", "shares": [50, 70, 280]},
        {"name": "one_shot", "start_depth": 2},
        {"name": "stages", "stages": [{"sources": "random", "share": 1}, {"sources": "0,0,0,0", "share": 2}]},
    ],
    ids=str,
)
def test_a_proposal_comes_whatever_the_recipe_leaves_to_defaults(
    tmp_path: Path, tiny_recipe: dict[str, Any], schedule: dict[str, Any]
) -> None:
    tiny_recipe["model"]["vocab_size"] = 64  # layers are what costs
    tiny_recipe["optimizer"]["warmup_steps"] = 1
    said = planned(written(tmp_path, tiny_recipe, schedule={"steps": 60, **schedule}), *ONE_A100).stdout
    assert "Proposed: schedule: {name: mslt, steps: 60, k: 2, retrain_share: 0.2}" in said


def test_a_proposal_keeps_what_the_recipe_says_of_every_schedule(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["model"]["vocab_size"] = 64
    tiny_recipe["optimizer"]["warmup_steps"] = 1
    schedule = {"name": "full", "steps": 60, "optimizer_state": "carry", "rewarmup_steps": 2}
    said = planned(written(tmp_path, tiny_recipe, schedule=schedule), *ONE_A100).stdout
    assert "k: 2, retrain_share: 0.2, rewarmup_steps: 2, optimizer_state: carry}" in said


def test_the_reason_for_a_proposal_holds_for_a_shallow_model(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["model"]["vocab_size"] = 64
    tiny_recipe["schedule"]["retrain_share"] = 0.2
    said = planned(written(tmp_path, tiny_recipe), *ONE_A100).stdout
    assert "{name: mslt, steps: 60, k: 2," in said
    assert "the largest k that pays with stages of 2 layers or more" in said, "and not of 3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8"], "--gpus 8: of which kind.*--gpu .*--measure"),
        (["--gpus", "8", "--link-gbps", "10"], "--gpus 8: of which kind.*--gpu .*--measure"),
        (["--gpus", "8", "--gpu", "a100"], "--gpus 8: add --link-gbps"),
        (["--gpus", "8", "--measure"], "--gpus 8: add --link-gbps"),
        (["--gpu", "a100"], "--gpu and --link-gbps .*--gpus"),
        (["--link-gbps", "10"], "--gpu and --link-gbps .*--gpus"),
        (["--link-gbps", "10", "--measure"], "--gpu and --link-gbps .*--gpus"),
        ([*A100S, "--measure"], "--gpu a100 and --measure: .*drop one"),
        (["--gpu", "a100", "--measure"], "--gpus"),
        (["--hours", "5"], "--hours 5: on which machine.*--measure, or --gpus, --gpu and --link-gbps"),
        (["--workers", "2"], "--shards and --workers say what to measure with; add --measure"),
        (["--shards", "here", *ONE_A100], "--shards and --workers say what to measure with; add --measure"),
        (["--gpus", "7", "--gpu", "a100", "--link-gbps", "10"],
         "--gpus 7: training.batch_size 1024 is not a multiple of it"),
        (["--gpus", "7", "--measure", "--link-gbps", "10"],
         "--gpus 7: training.batch_size 1024 is not a multiple of it"),
        (["--gpus", "8", "--gpu", "gtx480", "--link-gbps", "10"], "GPU gtx480: no figures of it"),
        (["--gpus", "8", "--gpu", "GTX480", "--link-gbps", "10"], "GPU gtx480: no figures of it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_half_a_description_is_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_timed(*_: object) -> None:
        raise AssertionError("was timed")

    monkeypatch.setattr(mslt.launcher, "time_stages_here", nothing_is_timed)
    for more in ([], ["--json"]):
        with pytest.raises(MsltError, match=message):
            CliRunner().invoke(app, ["plan", "bert-base", *arguments, *more], catch_exceptions=False)


@pytest.mark.parametrize("option", ["--gpus", "--link-gbps", "--hours", "--workers"])
def test_numbers_that_are_none_are_refused(option: str) -> None:
    result = CliRunner().invoke(app, ["plan", "bert-base", option, "0"])
    assert result.exit_code == 2
    assert option in result.output


def test_a_time_too_short_to_grow_in_is_said_in_words(fp32: str) -> None:
    """Words or a refusal, and no traceback: 3.6 seconds are no step of the whole batch on one T4."""
    arguments = ["plan", fp32, "--gpus", "1", "--gpu", "t4", "--hours", "0.001"]
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, MsltError), repr(result.exception)


def test_a_described_cluster_needs_no_torch() -> None:
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", PLAN_AND_TELL, *A100S, "--hours", "40", *more],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == "heavy: []\n"


# A clock without error on these: each part is told back by its median, whatever one disturbed block says.
MEASURED = StepCosts(1e-3, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 0.5, 6e-9, 7e-4, 8e-12, 9e-4)
DISTURBED_S = 99.0


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked to be timed; the answer is always MEASURED, with one block disturbed."""
    asked: list[tuple[Any, ...]] = []

    def time_stages_here(plan: Plan, shards: Path, num_workers: int) -> list[dict[str, list[float]]]:
        asked.append((plan, shards, num_workers))
        parts = [step_parts(MEASURED, plan.model, stage) for stage in plan.stages]
        return [{part: [value, DISTURBED_S, value] for part, value in each.items()} for each in parts]

    def check_recipe(recipe: str, shards: Path | None, num_workers: int) -> Checked:
        """Looks at no shards."""
        loaded = load_recipe(recipe)
        plan = make_plan(loaded, read_engine_config(loaded.engine), "a hash")
        return Checked(loaded, plan, shards or Path(loaded.data.shards))

    monkeypatch.setattr(mslt.launcher, "time_stages_here", time_stages_here)
    monkeypatch.setattr(mslt.preflight, "check_recipe", check_recipe)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    return asked


@pytest.fixture
def without_loaders(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("extends: bert-base\nwatch: {loader_workers: 0}\n")
    return str(path)


def test_what_is_measured_is_what_is_forecast(timed: list[tuple[Any, ...]], without_loaders: str) -> None:
    found = as_json(without_loaders, "--measure", "--shards", "here", "--workers", "2")
    assert found["step_costs"] == pytest.approx(asdict(MEASURED))
    recipe = load_recipe(without_loaders)
    plan = make_plan(recipe, read_engine_config(recipe.engine), "a hash")
    assert timed == [(probes(plan), Path("here"), 2)]
    as_json(without_loaders, "--measure")
    assert timed[1] == (probes(plan), Path(recipe.data.shards), 1)
    assert "Freezing will not pay here: " in planned(without_loaders, "--measure").stdout


@pytest.mark.parametrize("loader_workers", [1, 3])
def test_loaders_that_keep_up_cost_nothing(
    tmp_path: Path, timed: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, loader_workers: int
) -> None:
    """A step of the whole computes for about 1.21 s, and a batch takes 2 s to load."""
    loading = replace(MEASURED, data=2.0)
    monkeypatch.setitem(globals(), "MEASURED", loading)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"extends: bert-base\nwatch: {{loader_workers: {loader_workers}}}\n")
    found = as_json(str(path), "--measure")["step_costs"]
    assert found == pytest.approx(asdict(replace(loading, num_loaders=loader_workers)))


def test_measured_on_few_and_said_of_many(timed: list[tuple[Any, ...]], without_loaders: str) -> None:
    """Two workers have 512 samples each, eight have 128; the gradient goes over the link that is said."""
    found = as_json(without_loaders, "--measure", "--workers", "2", "--gpus", "8", "--link-gbps", "10")
    expected = replace(scaled(MEASURED, 1 / 4), reduce_once=0.0, reduce_parameter=2 * 7 / 8 * 2 / 1.25e9, overlap=0.25)
    assert found["step_costs"] == pytest.approx(asdict(expected))
    assert len(timed) == 1


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(mslt.launcher, "time_stages_here", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(MsltError, match="nowhere"):
        planned("bert-base", "--measure", "--shards", str(tmp_path / "nowhere"))
    assert not asked
