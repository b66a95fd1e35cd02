"""A study's runs, with a stand-in that trains nothing: what is run and not run again, found, and refused."""

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import mslt.launcher
import mslt.study
from benchmarks import schedules
from mslt.cli.main import app
from mslt.config import load_recipe
from mslt.cost import for_timing
from mslt.errors import MsltError
from mslt.plan import Plan
from mslt.report.study import Finding, Spread, as_json, findings, share_to_reach, table, verdict
from mslt.rundir import RunDir, read_plan
from mslt.schedule import make_plan
from mslt.study import TIMING_ROUNDS, Arm, Study, heldout_loss, kind_of, open_study, run_study, tuning_arms
from tests import stand_in
from tests.stand_in import loss_of

SHARDS = Path("shards")
# A layer's forward pass takes 1 s, its backward pass 2; see tests/stand_in.py. A step of the whole takes 12 s; of 2
# layers 6 s, and with 2 more on top 8 s. Of 60 steps grown in two, 12 retrain: 24·6 + 24·8 + 12·12 = 480 s, two thirds
# of 720 s; 90 take that.
STEP_S = {
    "4 layers, frozen: none": 12.0,
    "2 layers, frozen: none": 6.0,
    "4 layers, frozen: embeddings, layer.0, layer.1": 8.0,
}
FULL_AND_GROWN = {"full": {"name": "full"}, "mslt k=2": {"name": "mslt", "k": 2}}


def write_study(folder: Path, sections: dict[str, Any], **changes: Any) -> Path:
    """FOLDER/study.yaml, with the tiny recipe beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections))
    study: dict[str, Any] = {
        "recipe": "tiny.yaml", "steps": 60, "schedules": FULL_AND_GROWN, "learning_rates": [0.02, 0.01, 0.04],
        "seeds": [0, 3],
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    return folder / "study.yaml"


def never(plan: Plan) -> list[dict[str, list[float]]]:
    raise AssertionError(f"{len(plan.stages)} stages were timed")


def opened(folder: Path, sections: dict[str, Any], **changes: Any) -> Study:
    return open_study(write_study(folder, sections, **changes), folder / "out", SHARDS, 1, stand_in.measure)


def calls(folder: Path) -> Counter[str]:
    return Counter((folder / "calls.txt").read_text().split())


@pytest.fixture(scope="module", autouse=True)
def no_shards() -> Iterator[None]:
    """Runs of the stand-in read none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mslt.study, "read_manifest", lambda folder: SimpleNamespace(hash=f"of {folder}"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def study(folder: Path, tiny_sections: dict[str, Any]) -> Study:
    return opened(folder, tiny_sections)


@pytest.fixture(scope="module")
def chosen(study: Study, folder: Path) -> dict[str, list[Arm]]:
    return run_study(study, stand_in.trainer(folder), 2)


def test_rates_are_tuned_with_one_seed_and_the_best_takes_the_others(
    study: Study, chosen: dict[str, list[Arm]], folder: Path
) -> None:
    tuned = [f"{arm}-{rate}-0-{steps}" for arm, steps in (("full", 60), ("mslt", 90)) for rate in (0.01, 0.02, 0.04)]
    beyond = ["mslt-0.005-0-90"]  # its best was the lowest
    best = ["full-0.02-3-60", "mslt-0.01-3-90", "mslt-0.01-0-60", "mslt-0.01-3-60"]
    assert calls(folder) == Counter([*tuned, *beyond, *best]), "each once"
    found = {name: [(a.equal, a.learning_rate, a.seed, a.steps) for a in arms] for name, arms in chosen.items()}
    assert found == {
        "full": [("time", 0.02, 0, 60), ("time", 0.02, 3, 60)],
        "mslt k=2": [("time", 0.01, 0, 90), ("time", 0.01, 3, 90), ("steps", 0.01, 0, 60), ("steps", 0.01, 3, 60)],
    }
    shares = {(arm.name, arm.equal): arm.share for arms in chosen.values() for arm in arms}
    assert shares == pytest.approx({("full", "time"): 1.0, ("mslt k=2", "time"): 1.0, ("mslt k=2", "steps"): 480 / 720})
    for arm in (arm for arms in chosen.values() for arm in arms):
        assert heldout_loss(arm) == pytest.approx(
            loss_of("full" if arm.name == "full" else "mslt", arm.learning_rate, arm.seed, arm.steps)
        )
        assert read_plan(RunDir(arm.run)).stages[0].seed == arm.seed


def test_an_arm_has_the_studys_recipe_with_its_own_schedule_rate_and_seed(
    study: Study, chosen: dict[str, list[Arm]], folder: Path
) -> None:
    base, arm = load_recipe(str(folder / "tiny.yaml")), chosen["mslt k=2"][1]
    recipe = load_recipe(str(arm.run.with_name(f"{arm.run.name}.yaml")))
    assert recipe == study.recipe(arm)
    assert recipe.schedule.model_dump() | {"options": recipe.schedule.options} == {
        "name": "mslt", "k": 2, "steps": 90, "learning_rate": "global", "rewarmup_steps": 0, "frozen_dropout": True,
        "frozen_precision": "exact", "optimizer_state": "reset", "options": {"k": 2},
    }  # fmt: skip
    assert recipe.optimizer == base.optimizer.model_copy(update={"learning_rate": 0.01, "warmup_steps": 8})  # 5·90/60
    assert recipe.training == base.training.model_copy(update={"seed": 3})
    assert (recipe.model, recipe.data, recipe.engine, recipe.watch) == (base.model, base.data, base.engine, base.watch)


def test_nothing_is_run_or_timed_twice(chosen: dict[str, list[Arm]], folder: Path) -> None:
    before = calls(folder)
    again = open_study(folder / "study.yaml", folder / "out", SHARDS, 1, never)
    assert again.step_s == STEP_S
    assert run_study(again, stand_in.trainer(folder), 1) == chosen
    assert calls(folder) == before


def near(*values: float) -> Any:
    return Spread(pytest.approx(values))


def test_findings_by_hand(study: Study, chosen: dict[str, list[Arm]]) -> None:
    """Losses fall in a line over the logarithm of time: 0.1 of 0.203 nats lie between full's loss and that of mslt at
    equal steps. A step of any stage took the stand-in as long, so by the clock mslt's 90 took half as much again."""
    late = 5 - 0.5 * math.log(90 / 60)
    reached = (2 / 3) ** (1 - 0.1 / (0.5 * math.log(1.5)))
    full, grown = findings(study, chosen)
    assert full == Finding(
        name="full", learning_rate=0.02, decay_share=1.0, tuned=True, steps_at_equal_time=60,
        steps_range=(60, 60), clock_share=1.0, at_equal_time=near(4.9, 4.93),
        at_equal_time_minus_baseline=Spread((0.0, 0.0)), share_of_time=1.0,
        at_equal_steps=near(4.9, 4.93), at_equal_steps_minus_baseline=Spread((0.0, 0.0)),
        at_parts={}, share_to_baseline=Spread((1.0, 1.0)), at_most=False,
    )  # fmt: skip
    assert grown == Finding(
        name="mslt k=2", learning_rate=0.01, decay_share=1.0, tuned=True,
        steps_at_equal_time=90, steps_range=(90, 90), clock_share=pytest.approx(1.5),  # type: ignore[arg-type]
        at_equal_time=near(late, late + 0.03), at_equal_time_minus_baseline=near(late - 4.9, late - 4.9),
        share_of_time=pytest.approx(2 / 3),  # type: ignore[arg-type]
        at_equal_steps=near(5.0, 5.03), at_equal_steps_minus_baseline=near(0.1, 0.1),
        at_parts={}, share_to_baseline=near(reached, reached), at_most=False,
    )  # fmt: skip
    assert grown.at_equal_time.deviation == pytest.approx(statistics.stdev([0.0, 0.03]))
    assert grown.at_equal_time_minus_baseline.deviation == pytest.approx(0.0, abs=1e-12), "the seeds' luck is shared"


def test_a_loss_reached_before_equal_steps_in_one_seed_is_reached_at_most_then(
    tmp_path: Path, tiny_sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 3 of full is bad luck: mslt's equal steps have its loss already."""
    lucky = stand_in.loss_of
    monkeypatch.setattr(
        stand_in, "loss_of", lambda name, *more: lucky(name, *more) + 0.5 * (name == "full" and more[1] == 3)
    )
    study = opened(tmp_path, tiny_sections)
    _, grown = findings(study, run_study(study, stand_in.trainer(tmp_path), 1))
    reached = (2 / 3) ** (1 - 0.1 / (0.5 * math.log(1.5)))
    assert grown.share_to_baseline == near(reached, 2 / 3)
    assert grown.at_most
    monkeypatch.setattr(
        stand_in, "loss_of", lambda name, *more: lucky(name, *more) + 0.5 * (name == "full") * (1 if more[1] else -1)
    )
    study = opened(tmp_path / "apart", tiny_sections, learning_rates=[0.01])
    _, grown = findings(study, run_study(study, stand_in.trainer(tmp_path / "apart"), 1))
    assert (grown.share_to_baseline, grown.at_most) == (None, False), "seed 0 of full was good luck"


def test_what_won_trains_for_parts_of_the_time_too(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    """Half of full training's 720 s are 45 steps of mslt, whose loss then is 5 - ln(45/60)/2; at 0.7 of it, 63."""
    study = opened(tmp_path, tiny_sections, time_shares=[0.7, 0.5])
    chosen = run_study(study, stand_in.trainer(tmp_path), 2)
    parts = {name: [(a.share, a.seed, a.steps) for a in arms if a.equal == "part"] for name, arms in chosen.items()}
    assert parts == {
        "full": [(0.7, 0, 42), (0.7, 3, 42), (0.5, 0, 30), (0.5, 3, 30)],
        "mslt k=2": [(0.7, 0, 63), (0.7, 3, 63), (0.5, 0, 45), (0.5, 3, 45)],
    }
    assert calls(tmp_path)["mslt-0.01-3-45"] == 1
    found = findings(study, chosen)
    full, grown = found
    at_half, later = (loss_of("mslt", 0.01, 0, steps) for steps in (45, 63))
    assert grown.at_parts == {0.7: near(later, later + 0.03), 0.5: near(at_half, at_half + 0.03)}
    assert (full.share_to_baseline, full.at_most) == (Spread((1.0, 1.0)), False)
    late, reached = loss_of("mslt", 0.01, 0, 90), grown.share_to_baseline
    assert reached == near(*[0.7 ** ((4.9 - late) / (later - late))] * 2), "between the two around it"
    header, first, second = table(found)
    assert header[-2:] == ["MLM at 0.5 of the time", "MLM at 0.7 of the time"]
    assert first[-2:] == [str(full.at_parts[0.5]), str(full.at_parts[0.7])]
    assert second[-2:] == [str(grown.at_parts[0.5]), str(grown.at_parts[0.7])]
    assert json.loads(as_json(found))[1]["at_parts"]["0.5"]["mean"] == pytest.approx(at_half + 0.015)
    before = calls(tmp_path)
    more = opened(tmp_path, tiny_sections, time_shares=[0.7, 0.5, 0.9])
    run_study(more, stand_in.trainer(tmp_path), 2)
    assert sum((calls(tmp_path) - before).values()) == 4, "one share more is the same study"
    with pytest.raises(MsltError, match=r"study: mslt k=2: (.|\n)*steps: "):
        opened(tmp_path, tiny_sections, time_shares=[0.02])


def test_what_equal_time_may_be_is_drawn_from_the_timed_blocks(study: Study) -> None:
    """Of two blocks the second finds growing's steps half as dear: by it alone 180 steps are 60 of full training."""
    whole = {"forward": [12.0, 12.0], "data": [0.0, 0.0]}
    kinds = {kind: {"forward": [s, s if s == 12.0 else s / 2], "data": [0.0, 0.0]} for kind, s in STEP_S.items()}
    drawn = replace(study, times=kinds)
    assert kinds["4 layers, frozen: none"] == whole
    assert drawn.equal_time_range("full") == (60, 60)
    total_s = [24 * 6.0 + 24 * 8.0 + 12 * 12.0, 24 * 3.0 + 24 * 4.0 + 12 * 12.0]
    assert drawn.equal_time_range("mslt k=2") == tuple(round(60 * 720 / s) for s in total_s)
    assert study.equal_time_range("mslt k=2") == (90, 90), "what disturbs all alike"
    row = table([replace(BASELINE, steps_range=(58, 63))])[1]
    assert row[3] == "60 (58 to 63)"


def test_a_step_of_each_kind_of_stage_is_timed_once(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    schedules = {
        **FULL_AND_GROWN,
        "later": {"name": "mslt", "k": 2, "retrain_share": 0.5, "rewarmup_steps": 3, "optimizer_state": "carry"},
        "still": {"name": "mslt", "k": 2, "frozen_dropout": False},
    }
    timed: list[Plan] = []

    def measure(plan: Plan) -> list[dict[str, list[float]]]:
        timed.append(plan)
        return stand_in.measure(plan)

    path = write_study(tmp_path, tiny_sections, schedules=schedules)
    study = open_study(path, tmp_path / "out", SHARDS, 1, measure)
    assert timed == [timed[0]] * TIMING_ROUNDS
    plan = timed[0]
    dropout_off = "4 layers, frozen: embeddings, layer.0, layer.1, their dropout off"
    assert [kind_of(stage) for stage in plan.stages] == [*STEP_S, dropout_off]
    assert plan.stages == tuple(for_timing(stage) for stage in plan.stages)
    Plan.model_validate(plan.model_dump())
    assert study.step_s == {**STEP_S, dropout_off: 8.0}
    kept = json.loads((tmp_path / "out" / "step-times.json").read_text())
    assert kept["stages"].keys() == study.step_s.keys()
    assert kept["stages"]["2 layers, frozen: none"]["forward"] == [18.0, 2.0, 1.0] * TIMING_ROUNDS, "every block"
    assert kept["provenance"]
    for name in schedules:
        arm = study.arm(name, "time", 0.01, 0)
        stages = make_plan(study.recipe(arm), {}).stages
        assert sum(stage.steps * study.step_seconds(stage) for stage in stages) == pytest.approx(720, abs=12), name


def test_a_schedule_with_another_optimizer_is_timed_with_it(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    """Or refused."""
    timed: list[Plan] = []

    def measure(plan: Plan) -> list[dict[str, list[float]]]:
        timed.append(plan)
        return stand_in.measure(plan)

    path = write_study(tmp_path, tiny_sections, optimizers={"mslt k=2": {"name": "adamw"}})
    with suppress(MsltError):
        open_study(path, tmp_path / "out", SHARDS, 1, measure)
    assert {plan.optimizer.name for plan in timed} in (set(), {"lamb", "adamw"})


def test_what_is_done_and_what_it_will_take_is_said(
    tmp_path: Path, tiny_sections: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    study = opened(tmp_path, tiny_sections)
    run_study(study, stand_in.trainer(tmp_path), 2)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "", "stdout is the report's"
    # Six of 720 s, two at once; one more; then two are done and two of 720 s are not; then two of 480 s.
    assert lines[0] == "learning rates: 6 runs, 0 done; the others take about 0.6 h of training"
    assert lines[2] == "2 of 6, full/time-0.02-0: 60 steps, held-out MLM 4.9000"
    assert lines[6] == f"6 of 6, mslt-k=2/time-0.04-0: 90 steps, held-out MLM {loss_of('mslt', 0.04, 0, 90):.4f}"
    assert lines[7] == "learning rates: 7 runs, 6 done; the others take about 0.1 h of training"
    assert lines[9] == "equal time: 4 runs, 2 done; the others take about 0.2 h of training"
    assert lines[10] == "1 of 2, full/time-0.02-3: 60 steps, held-out MLM 4.9300"
    assert lines[12] == "equal steps: 2 runs, 0 done; the others take about 0.1 h of training"
    assert len(lines) == 15
    run_study(study, stand_in.trainer(tmp_path), 2)
    assert [line.split(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        "learning rates: 7 runs, 7 done",
        "equal time: 4 runs, 4 done",
        "equal steps: 2 runs, 2 done",
    ]


def test_rates_are_tried_until_the_best_lies_between_others(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    """From rates four and eight times too low, and four times too high."""
    study = opened(tmp_path, tiny_sections, learning_rates=[0.0025, 0.005], seeds=[0])
    chosen = run_study(study, stand_in.trainer(tmp_path), 2)
    assert {name: arms[0].learning_rate for name, arms in chosen.items()} == {"full": 0.02, "mslt k=2": 0.01}
    rates = {name: [arm.learning_rate for arm in tuning_arms(study, name)] for name in chosen}
    assert rates == {"full": [0.0025, 0.005, 0.01, 0.02, 0.04], "mslt k=2": [0.0025, 0.005, 0.01, 0.02]}
    high = opened(tmp_path / "high", tiny_sections, learning_rates=[0.08, 0.04], seeds=[0])
    chosen = run_study(high, stand_in.trainer(tmp_path / "high"), 2)
    assert [arm.learning_rate for arm in tuning_arms(high, "mslt k=2")] == [0.005, 0.01, 0.02, 0.04, 0.08]
    assert chosen["mslt k=2"][0].learning_rate == 0.01


def test_every_rate_is_tried_with_every_decay_share(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    schedules = {**FULL_AND_GROWN, "late": {"name": "mslt", "k": 2}}
    more = {"schedules": schedules, "decay_shares": [1.0, 0.1], "optimizers": {"late": {"decay_share": 0.1}}}
    study = opened(tmp_path, tiny_sections, **more)
    chosen = run_study(study, stand_in.trainer(tmp_path), 2)
    tried = {name: [(arm.learning_rate, arm.decay_share) for arm in tuning_arms(study, name)] for name in chosen}
    rates = (0.01, 0.02, 0.04)
    assert tried == {
        "full": [(rate, share) for share in (None, 0.1) for rate in rates],
        "mslt k=2": [(rate, share) for share in (None, 0.1) for rate in (0.005, *rates)],
        "late": [(rate, share) for share in (None, 1.0) for rate in (0.005, *rates)],
    }
    won = {name: {(arm.learning_rate, arm.decay_share) for arm in arms} for name, arms in chosen.items()}
    assert won == {"full": {(0.02, None)}, "mslt k=2": {(0.01, 0.1)}, "late": {(0.01, None)}}
    assert [one.decay_share for one in findings(study, chosen)] == [1.0, 0.1, 0.1]
    assert calls(tmp_path)["mslt-0.01-3-60-0.1"] == 2, "once with its name, once as its schedule's own"
    assert calls(tmp_path)["full-0.02-0-60-0.1"] == 1
    before = calls(tmp_path)
    run_study(opened(tmp_path, tiny_sections, seeds=[0, 3, 4], **more), stand_in.trainer(tmp_path), 2)
    assert sum((calls(tmp_path) - before).values()) == 5, "a seed more is the same study"


def test_the_record_of_a_study(tmp_path: Path, tiny_sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(tmp_path, tiny_sections, decay_shares=[1.0, 0.1])
    chosen = run_study(study, stand_in.trainer(tmp_path), 2)
    split = SimpleNamespace(tokens=1000)
    manifest = SimpleNamespace(splits={"train": split, "validation": split}, unigram_entropy_nats=6.9)
    monkeypatch.setattr(schedules, "read_manifest", lambda folder: manifest)
    lines = schedules.report(study, chosen, SHARDS, 1)
    found = findings(study, chosen)
    assert [line.removeprefix("- ") for line in lines if line.startswith("- ")][:-2] == verdict(found)
    grew = "growing changes the loss by +0.000 to +0.000 nats; every stage lowers the loss."
    assert f"- mslt k=2, equal time, all seeds: {grew}" in lines
    (commits,) = (line for line in lines if "of the commits" in line)
    commit = json.loads((chosen["full"][0].run / "provenance.json").read_text())["commit"]
    assert commits == f"- The runs are of the commits {commit}."
    # The best rates are 0.02 and 0.01, a rate that falls late adds a fifth to full training and takes it off others.
    full, grown = loss_of("full", 0.02, 0, 60), loss_of("mslt", 0.01, 0, 90)
    for beginning, loss in (("| full | 1 |", full), ("| full | 0.1 |", full + 0.2), ("| mslt k=2 | 1 |", grown),
                            ("| mslt k=2 | 0.1 |", grown - 0.2)):  # fmt: skip
        (row,) = (line for line in lines if line.startswith(beginning))
        chosen_one = loss in (full, grown - 0.2)
        assert (f"| {loss + 0.015:.3f} ± 0.021 |" if chosen_one else f"| {loss:.3f} |") in row, "of both seeds, or one"


def test_how_far_growing_throws_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two seeds: over the border of two stages by +0.5 and -0.1; the second seed's first stage unlearnt."""
    losses = {0: [(7.0, 6.0), (6.5, 5.5)], 1: [(7.0, 7.25), (7.15, 6.0)]}
    arms = [Arm("grown", "time", 0.01, None, seed, 10, 0.8, Path(str(seed))) for seed in losses]

    def stages(arm: Arm) -> tuple[list[dict[str, Any]], None]:
        both = losses[arm.seed]
        return [{f"evaluation_{when}": {"mlm_loss": loss} for when, loss in zip(("before", "after"), each, strict=True)}
                for each in both], None  # fmt: skip

    monkeypatch.setattr(schedules, "_stages", stages)
    monkeypatch.setattr(schedules, "heldout_loss", lambda arm: losses[arm.seed][-1][1])
    said = (
        "grown, equal time, all seeds: growing changes the loss by -0.100 to +0.500 nats; a stage raises the loss by "
    )
    assert schedules.growth_lines("grown", arms) == [f"{said}0.250."]
    assert schedules.growth_lines("grown", [replace(arm, equal="steps") for arm in arms]) == []


def test_a_run_that_diverges_is_no_candidate(
    tmp_path: Path, tiny_sections: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    study = opened(tmp_path, tiny_sections, learning_rates=[0.01, 0.02], seeds=[0])
    (tmp_path / "fails.json").write_text(json.dumps({"full-0.02-0-60": "diverges"}))  # the best
    chosen = run_study(study, stand_in.trainer(tmp_path), 1)
    assert [arm.learning_rate for arm in chosen["full"]] == [0.01]
    said = capsys.readouterr().err
    assert "full/time-0.02-0: 60 steps, held-out MLM inf" in said
    assert "mslt-k=2/time-0.01-0: 90 steps, held-out MLM 4.7973" in said
    first = calls(tmp_path)
    assert run_study(study, stand_in.trainer(tmp_path), 1) == chosen
    assert calls(tmp_path) == first, "it would diverge again"


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_run_that_stops_ends_the_study_and_is_tried_again(
    tmp_path: Path, tiny_sections: dict[str, Any], at_once: int
) -> None:
    study = opened(tmp_path, tiny_sections, learning_rates=[0.01, 0.02], seeds=[0])
    (tmp_path / "fails.json").write_text(json.dumps({"full-0.01-0-60": "stops"}))
    with pytest.raises(MsltError, match=r"full/time-0.01-0: stopped before its end; .*.log says why. The same command"):
        run_study(study, stand_in.trainer(tmp_path), at_once)
    first = calls(tmp_path)
    assert sum(first.values()) <= 2 * at_once, "what waited did not start"
    (tmp_path / "fails.json").unlink()
    chosen = run_study(study, stand_in.trainer(tmp_path), at_once)
    assert [arm.learning_rate for arm in chosen["full"]] == [0.02]
    assert calls(tmp_path)["full-0.01-0-60"] == 2
    assert all(count == 1 for name, count in calls(tmp_path).items() if name != "full-0.01-0-60")


def test_a_loss_is_asked_of_what_is_done_alone(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    study = opened(tmp_path, tiny_sections, learning_rates=[0.01], seeds=[0])
    with pytest.raises(MsltError, match=r"time-0.01-0: is not done"):
        heldout_loss(study.arm("full", "time", 0.01, 0))


def test_a_run_of_other_steps_is_not_taken_for_the_studys(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    study = opened(tmp_path, tiny_sections, learning_rates=[0.01], seeds=[0])
    run_study(study, stand_in.trainer(tmp_path), 1)
    longer = replace(study.arm("full", "time", 0.01, 0), steps=61)
    with pytest.raises(MsltError, match=r"full/time-0.01-0: is of 60 steps, and the study's is of 61; take another"):
        heldout_loss(longer)


def test_where_every_rate_diverges_lower_ones_are_asked_for(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    study = opened(tmp_path, tiny_sections, learning_rates=[0.01, 0.02], seeds=[0])
    failing = dict.fromkeys(["mslt-0.01-0-90", "mslt-0.02-0-90"], "diverges")
    (tmp_path / "fails.json").write_text(json.dumps(failing))
    with pytest.raises(MsltError, match=r"mslt k=2 diverges at every learning rate; add lower ones"):
        run_study(study, stand_in.trainer(tmp_path), 2)
    assert sum(name.startswith("mslt") for name in calls(tmp_path)) == 2, "the tuning and no more"


def test_a_rate_that_one_seed_cannot_bear_is_not_chosen(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    study = opened(tmp_path, tiny_sections)
    (tmp_path / "fails.json").write_text(json.dumps({"full-0.02-3-60": "diverges"}))  # the first seed's best
    chosen = run_study(study, stand_in.trainer(tmp_path), 2)
    assert {(arm.learning_rate, arm.seed) for arm in chosen["full"]} == {(0.01, 0), (0.01, 3)}
    assert calls(tmp_path)["mslt-0.02-3-90"] == 0, "what never leads costs one seed"
    assert [one.learning_rate for one in findings(study, chosen)] == [0.01, 0.01]


def test_a_seed_that_diverges_at_the_chosen_rate_is_reported(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    study = opened(tmp_path, tiny_sections, learning_rates=[0.01])
    (tmp_path / "fails.json").write_text(json.dumps({"mslt-0.01-3-90": "diverges"}))
    chosen = run_study(study, stand_in.trainer(tmp_path), 1)
    found = findings(study, chosen)
    _, grown = found
    assert grown.at_equal_time.values == (pytest.approx(5 - 0.5 * math.log(1.5)), math.inf)
    assert (grown.at_equal_time.mean, grown.at_equal_time.deviation) == (math.inf, None)
    assert grown.at_equal_time_minus_baseline.mean == math.inf
    assert grown.at_equal_steps.mean == pytest.approx(5.015)
    assert grown.share_to_baseline is None, "not in every seed"
    assert table(found)[2][4:7] == [f"{grown.clock_share:.2f}", "inf", "+inf"]
    text = as_json(found)
    assert "Infinity" not in text
    assert "NaN" not in text
    printed = json.loads(text)[1]
    assert printed["at_equal_time"] == {
        "mean": None,
        "deviation": None,
        "values": [pytest.approx(4.7973, abs=1e-4), None],
    }
    assert printed["at_equal_steps"]["deviation"] == pytest.approx(statistics.stdev([0.0, 0.03]))
    assert (printed["name"], printed["share_to_baseline"]) == ("mslt k=2", None)


def test_what_costs_the_same_runs_for_equal_time_alone(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    schedules = {"full": {"name": "full"}, "full, less decay": {"name": "full"}}
    optimizers = {"full, less decay": {"weight_decay": 0.005}}
    study = opened(tmp_path, tiny_sections, learning_rates=[0.02], schedules=schedules, optimizers=optimizers)
    chosen = run_study(study, stand_in.trainer(tmp_path), 1)
    assert [(arm.equal, arm.steps, arm.share) for arm in chosen["full, less decay"]] == [("time", 60, 1.0)] * 2
    assert study.recipe(chosen["full, less decay"][0]).optimizer.weight_decay == 0.005
    assert study.recipe(chosen["full"][0]).optimizer.weight_decay == 0.01
    _, stable = findings(study, chosen)
    assert stable.at_equal_steps == stable.at_equal_time
    assert stable.share_of_time == 1.0
    assert stable.share_to_baseline == Spread((1.0, 1.0))
    assert not stable.tuned


def test_a_folder_holds_one_study(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    opened(tmp_path, tiny_sections)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = {**tiny_sections, "training": {**tiny_sections["training"], "clip_norm": 0.5}}
    deeper = {"schedules": {"full": {"name": "full"}, "mslt k=2": {"name": "mslt", "k": 4}}}
    turned = {"schedules": dict(reversed(FULL_AND_GROWN.items()))}  # another baseline
    for sections, changes in (
        (tiny_sections, {"steps": 61}),
        (tiny_sections, deeper),
        (tiny_sections, turned),
        (other, {}),
    ):
        with pytest.raises(MsltError, match=r"out: holds another study \(its .* differ\); take another --out"):
            open_study(write_study(tmp_path, sections, **changes), tmp_path / "out", SHARDS, 1, never)
    path = write_study(tmp_path, tiny_sections)
    for shards, workers, what in ((Path("others"), 1, "shards_sha256"), (SHARDS, 2, "workers")):
        with pytest.raises(MsltError, match=f"its {what} differ"):
            open_study(path, tmp_path / "out", shards, workers, never)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    open_study(write_study(tmp_path, tiny_sections), tmp_path / "out", SHARDS, 1, never)


def test_a_schedule_more_is_the_same_study_where_its_stages_have_been_timed(
    tmp_path: Path, tiny_sections: dict[str, Any]
) -> None:
    study = opened(tmp_path, tiny_sections)
    before = run_study(study, stand_in.trainer(tmp_path), 2)
    again = {**FULL_AND_GROWN, "full again": {"name": "full"}}
    warmer = {"full again": {"warmup_steps": 20}}
    more = open_study(
        write_study(tmp_path, tiny_sections, schedules=again, optimizers=warmer), tmp_path / "out", SHARDS, 1, never
    )
    first = calls(tmp_path)
    chosen = run_study(more, stand_in.trainer(tmp_path), 2)
    assert {name: chosen[name] for name in before} == before
    assert sum((calls(tmp_path) - first).values()) == 4, "three rates and a seed"
    assert more.recipe(chosen["full again"][0]).optimizer.warmup_steps == 20
    kept = (tmp_path / "out" / "study.json").read_bytes()
    deeper = write_study(
        tmp_path, tiny_sections, schedules={**again, "four": {"name": "mslt", "k": 4}}, optimizers=warmer
    )
    with pytest.raises(
        MsltError, match=r"out: holds no times of 1 layers, .*; 2 layers, frozen: .*; take another --out"
    ):
        open_study(deeper, tmp_path / "out", SHARDS, 1, never)
    assert (tmp_path / "out" / "study.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedules": {**FULL_AND_GROWN, "new": {"name": "grow"}}}, r"new: .*\n  schedule.name: 'grow' is none"),
        ({"schedules": {**FULL_AND_GROWN, "odd": {"name": "mslt", "k": 3}}}, r"odd: .*\n  schedule.k: 3 does not"),
        ({"schedules": {**FULL_AND_GROWN, "odd": {"name": "full", "kk": 2}}}, r"odd: .*\n  schedule.kk: unknown key"),
        ({"schedules": {**FULL_AND_GROWN, "odd": {"k": 2}}}, r"odd: .*\n  schedule.name: missing"),
        ({"schedules": {"full": {"name": "full"}}}, r"study.yaml: .*\n  schedules: "),
        ({"optimizers": {"mslt k=2": {"warmth": 1}}}, r"mslt k=2: .*\n  optimizer.warmth: unknown key"),
        ({"optimizers": {"mslt": {"eps": 1e-6}}}, r"optimizers: mslt is no name under schedules"),
        ({"schedules": {**FULL_AND_GROWN, "odd": {"name": "full", "steps": 9}}}, r"schedules.odd.steps: follow from"),
        ({"schedules": {**FULL_AND_GROWN, "a/b": {"name": "full"}}}, r"schedules.a/b: names a folder; begin with"),
        ({"schedules": {**FULL_AND_GROWN, "../b": {"name": "full"}}}, r"schedules.../b: names a folder; .* no slash"),
        ({"schedules": {**FULL_AND_GROWN, ".b": {"name": "full"}}}, r"schedules..b: names a folder; begin with a let"),
        ({"schedules": {**FULL_AND_GROWN, "mslt-k=2": {"name": "full"}}}, r"two names that differ in spaces alone"),
        ({"optimizers": {"full": {"learning_rate": 0.1}}}, r"optimizers.full.learning_rate: is one of learning_rates"),
        ({"learning_rates": []}, r"learning_rates: "),
        ({"learning_rates": [0.0]}, r"learning_rates.0: "),
        ({"seeds": []}, r"seeds: "),
        ({"seeds": [0, 1, 0]}, r"seeds: one stands there twice"),
        ({"learning_rates": [0.01, 0.02, 1e-2]}, r"learning_rates: one stands there twice"),
        ({"schedules": {**FULL_AND_GROWN, "warm": {"name": "mslt", "k": 2, "rewarmup_steps": 12}}},
         r"warm: .*\n  schedule.rewarmup_steps: 12 is not below"),
        ({"rates": [0.1]}, r"rates: unknown key"),
        ({"recipe": "none.yaml"}, r"none.yaml: no such file"),
        ({"steps": 3}, r"optimizer.warmup_steps: 5 is not below schedule.steps 3"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)  # fmt: skip
def test_a_study_that_cannot_be_run_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_sections: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(MsltError, match=message):
        open_study(write_study(tmp_path, tiny_sections, **changes), tmp_path / "out", SHARDS, 1, never)
    assert not (tmp_path / "out").exists()


def test_mistakes_of_several_schedules_are_listed_at_once(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    schedules = {
        **FULL_AND_GROWN,
        "odd": {"name": "mslt", "k": 3, "kk": 1},
        "new": {"name": "grow"},
        "thin": {"name": "one_shot", "start_depth": 4},
    }
    with pytest.raises(MsltError) as refused:
        open_study(write_study(tmp_path, tiny_sections, schedules=schedules), tmp_path / "out", SHARDS, 1, never)
    said = str(refused.value)
    assert [line.split(":")[1].strip() for line in said.splitlines() if line.startswith("study:")] == [
        "odd", "new", "thin",
    ]  # fmt: skip
    assert "schedule.kk: unknown key" in said
    assert "schedule.name: 'grow' is none of" in said
    assert "schedule.start_depth: 4 is not below" in said


def test_mistakes_of_a_study_itself_are_listed_at_once(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    changes = {"seeds": [1, 1], "learning_rates": [0.1, 0.1], "optimizers": {"other": {}}}
    with pytest.raises(MsltError) as refused:
        open_study(write_study(tmp_path, tiny_sections, **changes), tmp_path / "out", SHARDS, 1, never)
    for what in ("seeds: one stands there twice", "learning_rates: one", "optimizers: other is no name"):
        assert what in str(refused.value)


def test_a_study_whose_timing_failed_is_timed_again(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    def fails(plan: Plan) -> list[dict[str, list[float]]]:
        raise MsltError("timing steps: the workers stopped")

    path = write_study(tmp_path, tiny_sections)
    with pytest.raises(MsltError, match="workers stopped"):
        open_study(path, tmp_path / "out", SHARDS, 1, fails)
    assert not (tmp_path / "out" / "step-times.json").exists()
    assert open_study(path, tmp_path / "out", SHARDS, 1, stand_in.measure).step_s == STEP_S


def test_a_schedules_own_warm_up_is_kept(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    study = opened(tmp_path, tiny_sections, optimizers={"mslt k=2": {"warmup_steps": 20, "beta2": 0.98}})
    grown, full = (study.recipe(study.arm(name, "time", 0.01, 0)).optimizer for name in ("mslt k=2", "full"))
    assert (grown.beta2, full.beta2) == (0.98, 0.999)
    assert full.warmup_steps == 5
    assert grown.warmup_steps == 30  # the same share of 90 steps


def test_an_anew_warm_up_takes_the_same_share_of_a_longer_run(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    schedules = {**FULL_AND_GROWN, "mslt k=2": {"name": "mslt", "k": 2, "rewarmup_steps": 4}}
    study = opened(tmp_path, tiny_sections, schedules=schedules)
    for equal, steps, rewarmup in (("time", 90, 6), ("steps", 60, 4)):
        schedule = study.recipe(study.arm("mslt k=2", equal, 0.01, 0)).schedule  # type: ignore[arg-type]
        assert (schedule.steps, schedule.rewarmup_steps) == (steps, rewarmup)


def test_no_two_arms_share_a_run_directory(tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    schedules = {"full": {"name": "full"}, "k 2": {"name": "mslt", "k": 2}, "k-2": {"name": "mslt", "k": 2,
                 "retrain_share": 0.5}}  # fmt: skip
    try:
        study = opened(tmp_path, tiny_sections, schedules=schedules)
    except MsltError:
        return  # refused is as good
    assert len({study.arm(name, "steps", 0.01, 0).run for name in schedules}) == 3


def test_the_command_runs_and_reports_a_study(
    tmp_path: Path, tiny_sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def time_stages_here(plan: Plan, shards: Path, num_workers: int) -> list[dict[str, list[float]]]:
        asked.append(([kind_of(stage) for stage in plan.stages], shards, num_workers, os.environ["OMP_NUM_THREADS"]))
        return stand_in.measure(plan)

    @contextmanager
    def training_apart(options: list[str], num_workers: int, num_at_once: int) -> Iterator[Any]:
        asked.append((options, num_workers, num_at_once))
        yield stand_in.trainer(tmp_path)

    monkeypatch.setattr(mslt.launcher, "time_stages_here", time_stages_here)
    monkeypatch.setattr(mslt.launcher, "training_apart", training_apart)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is put back as it was
    monkeypatch.delenv("OMP_NUM_THREADS")
    path = write_study(tmp_path, tiny_sections, learning_rates=[0.01], seeds=[0])
    out, picture = tmp_path / "there", tmp_path / "curves.png"
    command = ["compare", str(path), "--out", str(out), "--shards", "here", "--workers", "3", "--at-once", "2"]
    printed = CliRunner().invoke(app, [*command, "--json", "--picture", str(picture)], catch_exceptions=False)
    full, grown = json.loads(printed.stdout)
    # Timed with the cores that each of 3 workers of 2 runs has.
    assert asked == [(["--shards", "here"], 3, 2), *[(list(STEP_S), Path("here"), 3, "2")] * TIMING_ROUNDS]
    assert (full["name"], full["steps_at_equal_time"], full["tuned"]) == ("full", 60, False)
    assert full["share_to_baseline"] == {"mean": 1.0, "deviation": None, "values": [1.0]}
    assert (grown["name"], grown["steps_at_equal_time"]) == ("mslt k=2", 90)
    assert grown["at_equal_steps"] == {"mean": pytest.approx(5.0), "deviation": None, "values": [pytest.approx(5.0)]}
    assert grown["at_equal_steps_minus_baseline"]["mean"] == pytest.approx(5.0 - loss_of("full", 0.01, 0, 60))
    assert picture.read_bytes().startswith(b"\x89PNG")
    times = json.loads((out / "step-times.json").read_text())["stages"]
    assert times.keys() == STEP_S.keys()
    assert json.loads((out / "study.json").read_text())["workers"] == 3
    said = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "At equal time mslt k=2 is best with 4.797, " in said
    assert "The learning rate was not tuned." in said
    assert len(asked) == 2 + TIMING_ROUNDS, "not timed again"
    assert sum(calls(tmp_path).values()) == 3, "and nothing run again"


def test_a_study_reads_the_shards_of_its_recipe_where_no_others_are_given(
    tmp_path: Path, tiny_sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*arguments: Any) -> Any:
        raise MsltError(f"asked: {arguments[0]}")

    monkeypatch.setattr(mslt.launcher, "training_apart", stops)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    path = write_study(tmp_path, tiny_sections)
    with pytest.raises(MsltError, match=r"asked: \['--shards', 'given on the command line'\]"):
        CliRunner().invoke(app, ["compare", str(path)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("share", "at_share", "at_end", "found"),
    [
        (0.5, 2.0, 1.0, 0.5),  # equal steps are as good already: at most their time
        (0.5, 1.9, 1.0, 0.5),
        (0.25, 3.0, 1.0, 0.5),  # halfway between the losses is halfway between the logarithms: sqrt(1/4)
        (0.25, 2.5, 1.5, 0.5),
        (0.5, 3.0, 2.0, 1.0),
        (0.5, 3.0, 2.1, None),
        (1.0, 2.0, 2.0, 1.0),
        (1.0, 2.1, 2.1, None),
        # Equal steps may take longer than the baseline did: a line through both ends, all the same.
        (4.0, 1.0, 3.0, 2.0),
        (4.0, 2.0, 3.0, 4.0),
        (4.0, 1.0, 1.9, 1.0),
    ],
)
def test_share_of_time_to_a_loss_of_2(share: float, at_share: float, at_end: float, found: float | None) -> None:
    losses = {1.0: at_end, share: at_share}
    assert share_to_reach(2.0, losses) == (found if found is None else pytest.approx(found))


def test_a_loss_is_first_reached_between_the_two_shares_around_it() -> None:
    losses = {1.0: 1.0, 0.25: 3.0, 0.5: 1.5, 0.75: 2.5}
    assert share_to_reach(2.0, losses) == pytest.approx(0.5 * 0.5 ** (0.5 / 1.5))
    assert share_to_reach(1.0, losses) == 1.0
    assert share_to_reach(0.9, losses) is None
    assert share_to_reach(3.0, losses) == 0.25


def test_a_spread_is_mean_and_deviation() -> None:
    assert (Spread((3.0,)).mean, Spread((3.0,)).deviation, str(Spread((3.0,)))) == (3.0, None, "3.000")
    spread = Spread((1.0, 2.0, 6.0))
    assert (spread.mean, spread.deviation) == (3.0, pytest.approx(math.sqrt(7)))
    assert str(Spread((3.14159, 3.16159))) == "3.152 ± 0.014"
    assert str(Spread((2.0, 2.0))) == "2.000 ± 0.000"


def test_a_spread_over_a_run_that_diverged_is_infinite() -> None:
    spread = Spread((3.0, math.inf))
    assert (spread.mean, spread.deviation, str(spread)) == (math.inf, None, "inf")


def finding(
    name: str, at_time: tuple[float, ...], at_steps: tuple[float, ...], share: float, reached: Any, **more: Any
) -> Finding:
    """Of three seeds, against BASELINE_LOSSES."""
    minus = [Spread(tuple(a - b for a, b in zip(each, BASELINE_LOSSES, strict=True))) for each in (at_time, at_steps)]
    usual: dict[str, Any] = {
        "learning_rate": 0.02, "decay_share": 1.0, "tuned": True, "steps_at_equal_time": round(60 / share),
        "steps_range": (60, 60), "clock_share": 1.0, "at_parts": {}, "at_most": False,
    }  # fmt: skip
    return Finding(
        name=name, share_of_time=share, share_to_baseline=reached, at_equal_time=Spread(at_time),
        at_equal_time_minus_baseline=minus[0], at_equal_steps=Spread(at_steps), at_equal_steps_minus_baseline=minus[1],
        **{**usual, **more},
    )  # fmt: skip


BASELINE_LOSSES = (2.98, 3.0, 3.02)
BASELINE = finding("full", BASELINE_LOSSES, BASELINE_LOSSES, 1.0, Spread((1.0, 1.0, 1.0)))
# At equal time 0.11, 0.1 and 0.09 nats before full, at equal steps 0.05 and 0.01 behind and 0.03 before.
FASTER = finding(
    "mslt k=2", (2.87, 2.9, 2.93), (3.03, 3.01, 2.99), 2 / 3, Spread((0.7, 0.75, 0.8)), learning_rate=0.01,
    decay_share=0.1, clock_share=1.13,
)  # fmt: skip
NEVER = finding("late", (3.19, 3.2, 3.21), (3.4, 3.4, 3.4), 0.5, None)
AT_ONCE = finding("early", (2.8, 2.8, 2.8), (2.95, 2.95, 2.95), 0.5, Spread((0.5, 0.5, 0.5)), at_most=True)


def test_the_table_by_hand() -> None:
    header, *rows = table([BASELINE, FASTER, NEVER, AT_ONCE])
    assert header[4:7] == ["by the clock", "MLM at equal time", "minus full"]
    assert header[-1] == "time to full's loss"
    assert [len(row) for row in rows] == [len(header)] * 4
    assert rows == [
        ["full", "0.02", "1", "60", "1.00", "3.000 ± 0.020", "–", "1.00", "3.000 ± 0.020", "–", "–"],
        ["mslt k=2", "0.01", "0.1", "90", "1.13", "2.900 ± 0.030", "-0.100 ± 0.010", "0.67", "3.010 ± 0.020",
         "+0.010 ± 0.040", "0.750 ± 0.050"],
        ["late", "0.02", "1", "120", "1.00", "3.200 ± 0.010", "+0.200 ± 0.010", "0.50", "3.400 ± 0.000",
         "+0.400 ± 0.020", "not reached"],
        ["early", "0.02", "1", "120", "1.00", "2.800 ± 0.000", "-0.200 ± 0.020", "0.50", "2.950 ± 0.000",
         "-0.050 ± 0.020", "at most 0.500 ± 0.000"],
    ]  # fmt: skip


def test_the_verdict_by_hand() -> None:
    assert verdict([BASELINE, FASTER, NEVER]) == [
        "At equal time mslt k=2 is best with 2.900 ± 0.030, 0.100 ± 0.010 nats before full (seed by seed). full has "
        "3.000 ± 0.020. Told from full by 95 % intervals for 2 at once: mslt k=2 (better), late (worse). Intervals are "
        "of seeds; how well equal time is measured is not in them.",
        "At equal steps full is best with 3.000 ± 0.020, 0.010 ± 0.040 nats before mslt k=2 (seed by seed); the 95 % "
        "interval, ± 0.099, holds 0. full has 3.000 ± 0.020. The learning rates were tuned at equal time.",
        "mslt k=2 comes to the final loss of full first, in 0.750 ± 0.050 of its time.",
    ]
    lines = verdict([BASELINE, FASTER, AT_ONCE])
    assert lines[0].startswith("At equal time early is best with 2.800 ± 0.000, 0.100 ± 0.030 nats before mslt k=2 (")
    assert lines[2] == "early comes to the final loss of full first, in at most 0.500 ± 0.000 of its time."
    assert verdict([BASELINE, NEVER])[2:] == [
        "No schedule comes to the final loss of full in every seed within its time."
    ]
    untuned = [replace(one, tuned=False) for one in (BASELINE, FASTER)]
    assert verdict(untuned)[1].endswith("full has 3.000 ± 0.020. The learning rate was not tuned.")


def test_a_lead_counts_by_its_spread_and_not_by_the_losses() -> None:
    """Seeds lie 0.2 nats apart, and in each the one is 0.1 before the other: chance is in both alike."""
    apart = (2.8, 3.0, 3.2)
    full = replace(BASELINE, at_equal_time=Spread(apart))
    ahead = replace(FASTER, at_equal_time=Spread(tuple(loss - 0.1 for loss in apart)))
    (first, *_) = verdict([full, ahead])
    assert "is best with 2.900 ± 0.200, 0.100 ± 0.000 nats before full (seed by seed). full" in first
    crossed = replace(ahead, at_equal_time=Spread((3.1, 2.9, 2.7)),
                      at_equal_time_minus_baseline=Spread((0.3, -0.1, -0.5)))  # fmt: skip
    assert "the 95 % interval, ± 0.994, holds 0" in verdict([full, crossed])[0]
    assert "Told from full by 95 % intervals for 1 at once: none." in verdict([full, crossed])[0]


def test_an_interval_by_the_table_of_students_t() -> None:
    """4.303 of 2 degrees of freedom, 12.706 of one."""
    spread = Spread((0.9, 1.0, 1.1))
    assert spread.half_width() == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-4)
    assert Spread((0.0, 0.2)).half_width() == pytest.approx(12.706 * math.sqrt(0.02) / math.sqrt(2), rel=1e-4)
    assert (Spread((3.0,)).half_width(), Spread((3.0,)).is_from_zero()) == (None, False)
    assert spread.half_width(2) == pytest.approx(6.205 * 0.1 / math.sqrt(3), rel=1e-3)
    assert spread.is_from_zero()
    assert not Spread((-0.1, 0.3, 0.1)).is_from_zero()


def test_of_one_seed_no_lead_is_told_from_chance() -> None:
    alone = [
        replace(one, at_equal_time=Spread(one.at_equal_time.values[:1]), at_equal_steps=Spread((3.0,)))
        for one in (BASELINE, FASTER)
    ]
    assert verdict(alone)[0] == (
        "At equal time mslt k=2 is best with 2.870, 0.110 nats before full (seed by seed); with one seed nothing is "
        "known of chance. full has 2.980."
    )


@pytest.mark.parametrize("best", [(2.98, 3.0, 3.02), (2.98, 3.0, math.inf)], ids=["one diverged", "both diverged"])
def test_a_seed_that_diverged_is_no_single_seed(best: tuple[float, ...]) -> None:
    full = replace(BASELINE, at_equal_time=Spread(best))
    (first, *_) = verdict([full, replace(FASTER, at_equal_time=Spread((2.8, 2.9, math.inf)))])
    assert "with one seed" not in first
    assert "nan" not in first
