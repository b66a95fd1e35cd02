"""What every schedule would take, on described machines too, worked by hand and against the paper's hours."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from mslt.config import Recipe, ScheduleConfig, load_recipe, parse_recipe
from mslt.cost import StepCosts, layers_only, operations
from mslt.errors import MsltError
from mslt.forecast import (
    OWN,
    Forecast,
    advice,
    alternatives,
    block_layers,
    duration,
    forecasts,
    pays_from,
    proposal,
    unshrinking_share,
)
from mslt.hardware import GPUS, Cluster, cluster_costs, tabled
from mslt.schedule import make_plan

HOURS = {"full": 85.4, "mslt, k=4": 40.0}  # Yang et al. 2020: BERT-Base, 32 V100, 1,000,000 steps


def recipe_of(sections: dict[str, Any], depth: int, steps: int = 400, **schedule: Any) -> Recipe:
    model = {**sections["model"], "num_hidden_layers": depth}
    schedule = {"steps": steps, **(schedule or {"name": "full"})}
    return parse_recipe({**sections, "model": model, "schedule": schedule}, "recipe")


def fp32_base() -> Recipe:
    return load_recipe("bert-base").model_copy(update={"engine": "zero0_fp32"})


def proposed(recipe: Recipe, costs: StepCosts) -> Forecast | None:
    return proposal(forecasts(recipe, costs), recipe.model.num_hidden_layers)


def test_alternatives_are_all_that_the_depth_allows() -> None:
    recipe = load_recipe("bert-base")
    found = alternatives(recipe)
    assert list(found) == [
        "full", "mslt, k=2", "mslt, k=3", "mslt, k=4", "mslt, k=6", "mslt, k=12", "stacking",
        "interleave", "one_shot",
    ]  # fmt: skip
    assert {each.schedule.steps for each in found.values()} == {1_000_000}
    assert found["mslt, k=4"] == recipe
    assert [stage.depth for stage in make_plan(found["stacking"], {}).stages] == [3, 6, 12]
    assert [stage.depth for stage in make_plan(found["mslt, k=6"], {}).stages] == [2, 4, 6, 8, 10, 12, 12]


@pytest.mark.parametrize(
    ("depth", "ks", "doubles"),
    [(1, [], False), (2, [2], True), (5, [5], False), (6, [2, 3, 6], True), (8, [2, 4, 8], True)],
)
def test_what_does_not_divide_the_depth_is_left_out(
    tiny_sections: dict[str, Any], depth: int, ks: list[int], doubles: bool
) -> None:
    found = alternatives(recipe_of(tiny_sections, depth))
    expected = ["full", *(f"mslt, k={k}" for k in ks)]
    expected += ["stacking", "interleave"] * doubles + ["one_shot"] * (depth > 1)
    assert list(found) == expected
    for each in found.values():
        plan = make_plan(each, {})
        assert plan.steps == 400
        assert plan.stages[-1].depth == depth


@pytest.mark.parametrize(("depth", "steps"), [(6, [120, 280]), (8, [50, 70, 280])])
def test_stacking_doubles_as_often_as_its_authors_where_the_depth_allows(
    tiny_sections: dict[str, Any], depth: int, steps: list[int]
) -> None:
    found = alternatives(recipe_of(tiny_sections, depth))
    for name in ("stacking", "interleave"):
        assert [stage.steps for stage in make_plan(found[name], {}).stages] == steps


def test_a_schedule_with_more_stages_than_steps_is_left_out(tiny_sections: dict[str, Any]) -> None:
    found = alternatives(recipe_of(tiny_sections, 12, steps=6))
    assert list(found) == ["full", "mslt, k=2", "mslt, k=3", "mslt, k=4", "stacking", "interleave",
                           "one_shot"]  # fmt: skip


def test_alternatives_keep_what_all_schedules_have(tiny_sections: dict[str, Any]) -> None:
    own = recipe_of(
        tiny_sections, 4, name="mslt", k=2, retrain_share=0.5, freeze="none", rewarmup_steps=3, frozen_dropout=False,
        optimizer_state="carry",
    )  # fmt: skip
    found = alternatives(own)
    assert list(found)[:3] == ["full", OWN, "mslt, k=2"]
    assert found[OWN] == own
    assert found["mslt, k=2"].schedule.options == {"k": 2, "retrain_share": 0.5}
    for each in found.values():
        schedule = each.schedule
        assert (schedule.steps, schedule.rewarmup_steps, schedule.frozen_dropout) == (400, 3, False)
        assert schedule.optimizer_state == "carry"


@pytest.mark.parametrize(
    ("backward", "speedups"),
    [
        # A step by hand, a layer's forward pass taking 1: 3 layers 9, 6 of which 3 train 12, then 15, 18; 12 layers 36.
        (2, {"full": 1, "mslt, k=2": 36 / 24, "mslt, k=3": 36 / 20, "mslt, k=4": 36 / 18, "mslt, k=6": 36 / 16,
             "mslt, k=12": 36 / 14, "stacking": 36 * 400 / (9 * 50 + 18 * 70 + 36 * 280), "one_shot": 36 / 9.6}),
        # 3 layers 21, then 24, 27, 30; 12 layers 84: (21 + 24 + 27 + 30 + 84) / 5.
        (6, {"full": 1, "mslt, k=4": 84 / 37.2, "stacking": 84 * 400 / (21 * 50 + 42 * 70 + 84 * 280),
             "one_shot": 84 / (0.8 * 7 + 0.2 * 84)}),
    ],
)  # fmt: skip
def test_speedups_of_layers_alone_worked_by_hand(backward: float, speedups: dict[str, float]) -> None:
    found = forecasts(load_recipe("bert-base"), layers_only(backward))
    by_name = {one.name: one for one in found}
    for name, speedup in speedups.items():
        assert by_name[name].speedup == pytest.approx(speedup, rel=1e-5), name  # 1/3 of 800,000 steps is no whole one
        assert by_name[name].total_s == pytest.approx(1e6 * 12 * (1 + backward) / speedup, rel=1e-5), name
    assert by_name["interleave"].speedup == by_name["stacking"].speedup


def test_proposal_takes_the_largest_k_with_stages_of_three_layers_or_more(tiny_sections: dict[str, Any]) -> None:
    best = proposed(load_recipe("bert-base"), layers_only(2))
    assert best is not None
    assert best.schedule.options == {"k": 4, "retrain_share": 0.2}
    assert (best.name, best.is_own) == ("mslt, k=4", True)
    ks = {}
    for depth in (1, 2, 3, 4, 5, 6, 7, 24):
        best = proposed(recipe_of(tiny_sections, depth), layers_only(2))
        ks[depth] = best and best.schedule.options["k"]
    # 3 layers halve to none, and 5 and 7 are prime: a stage of 1 layer each is under what the paper has tried.
    assert ks == {1: None, 2: 2, 3: 3, 4: 2, 5: None, 6: 2, 7: None, 24: 4}


@pytest.mark.parametrize(
    "costs",
    [
        StepCosts(1.0, 1.0, 2.0, rest_forward=1000.0),
        StepCosts(1.0, 1.0, 2.0, heads_backward=1000.0),
        StepCosts(1.0, 1.0, 2.0, data=1000.0),
        StepCosts(1.0, 1.0, 2.0, reduce_once=1000.0),
        StepCosts(1.0, 1.0, 2.0, optimizer_once=1000.0),
    ],
    ids=["rest", "heads", "data", "reduce", "optimizer"],
)
def test_growing_will_not_pay_where_layers_are_a_small_part(costs: StepCosts) -> None:
    recipe = load_recipe("bert-base")
    found = forecasts(recipe, costs)
    assert max(one.speedup for one in found) < pays_from(2)
    assert proposal(found, 12) is None
    # 1000 of 1036, and all of it in every stage.
    assert unshrinking_share(recipe, costs) == pytest.approx(1000 / 1036)


def test_growing_pays_from_the_speedup_that_makes_up_for_more_steps() -> None:
    recipe = load_recipe("bert-base")
    # k=4 is 18 of 36, 3 is 20 and 2 is 24: (36 + x) / (18 + x) is 1.65 at x = 9.69.
    for rest, k in ((9.6, 4), (9.8, None)):
        best = proposed(recipe, StepCosts(1.0, 1.0, 2.0, rest_forward=rest))
        assert (best and best.schedule.options["k"]) == k


def test_steps_in_a_time_are_whole_and_fit() -> None:
    one = Forecast("full", None, True, ScheduleConfig(name="full", steps=100), total_s=50.0, speedup=1.0)
    assert [one.steps_in(s) for s in (50.0, 25.0, 0.99, 0.4, 100.0)] == [100, 50, 1, 0, 200]


@pytest.mark.parametrize(
    ("schedule", "own"),
    [
        ({"name": "full"}, ["full"]),
        ({"name": "mslt", "k": 2}, ["mslt, k=2"]),
        ({"name": "mslt", "k": 2, "retrain_share": 0.5}, ["mslt, k=2"]),
        ({"name": "mslt", "k": 2, "freeze": "none"}, [OWN]),
        ({"name": "mslt", "k": 1}, [OWN]),
        ({"name": "stacking"}, ["stacking"]),
        ({"name": "stacking", "shares": [1, 1]}, [OWN]),
        ({"name": "one_shot", "start_depth": 2}, [OWN]),
        # Written out, it is the same: 3/10, then 7/10 doubled. Its name in the table is the schedule's that it is.
        ({"name": "stages", "stages": [
            {"sources": "random", "share": 50}, {"sources": "0,0", "share": 70}, {"sources": "0-1,0-1", "share": 280}
        ]}, ["stacking"]),
    ],
    ids=str,
)  # fmt: skip
def test_the_recipes_own_schedule_is_marked_where_it_stands(
    tiny_sections: dict[str, Any], schedule: dict[str, Any], own: list[str]
) -> None:
    recipe = recipe_of(tiny_sections, 4, **schedule)
    found = forecasts(recipe, layers_only(2))
    assert [one.name for one in found if one.is_own] == own
    assert all(one.schedule is recipe.schedule for one in found if one.is_own)
    assert [one.name for one in found] == list(alternatives(recipe))
    assert found[0].name == "full"


def test_the_largest_k_is_proposed_where_a_smaller_one_is_faster() -> None:
    """A step of 12 layers 36 s, of stages of k=2: 18, 24, 36 s; of k=3: 12, 16, 20, 36; of k=4: 9, 12, 15, 18, 36."""
    recipe = load_recipe("bert-base")
    found = [
        replace(one, speedup={"mslt, k=3": 9.0}.get(one.name, one.speedup)) for one in forecasts(recipe, layers_only(2))
    ]
    best = proposal(found, 12)
    assert best is not None
    assert best.name == "mslt, k=4"
    for slow, k in (({4: 1.64}, 3), ({4: 1.64, 3: 1.64, 2: 1.45}, 2), ({4: 1.64, 3: 1.64, 2: 1.43}, None)):
        best = proposal([replace(one, speedup=slow.get(one.k or 0, one.speedup)) for one in found], 12)
        assert (best and best.k) == k, "the largest that pays"


@pytest.mark.parametrize(
    ("depth", "fewest"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3), (7, 3), (12, 3), (24, 6)]
)
def test_a_proposal_adds_a_quarter_and_three_layers_or_half_the_model(depth: int, fewest: int) -> None:
    assert block_layers(depth) == fewest


def advised(recipe: Recipe, costs: StepCosts, hours: float | None = None) -> str:
    return advice(recipe, forecasts(recipe, costs), costs, hours)


def test_advice_proposes_a_schedule_and_says_why() -> None:
    recipe = load_recipe("bert-base")
    said = advised(recipe, layers_only(2))
    # 800,000 steps of 13.5 s and 200,000 of 36 s, 18,000,000 s.
    assert said.startswith(
        "Proposed: schedule: {name: mslt, steps: 1000000, k: 4, retrain_share: 0.2}, which is 200,000 + 200,000 + "
        "200,000 + 200,000 + 200,000 steps and 5,000.0 h: the largest k that pays with stages of 3 layers or more. "
        "At equal steps it learned less than full training in a study of a small encoder; full training's time is "
        "enough for 2,000,000. "
    )
    said = advised(recipe, layers_only(2), hours=500)  # 100,000 steps of 18 s
    assert "steps: 100000, k: 4, retrain_share: 0.2}, which is 20,000 + 20,000 + 20,000 + 20,000 + 20,000" in said
    assert "steps and 500.0 h:" in said


def test_what_is_proposed_is_a_recipe(tiny_sections: dict[str, Any]) -> None:
    """With a retraining share of its own, which stays."""
    recipe = recipe_of(tiny_sections, 4, name="mslt", k=2, retrain_share=0.25)
    said = advised(recipe, layers_only(2))
    section = yaml.safe_load(said.split("schedule: ", 1)[1].split(", which is")[0])
    assert section == {"name": "mslt", "steps": 400, "k": 2, "retrain_share": 0.25}
    assert recipe_of(tiny_sections, 4, **section) == recipe
    assert "150 + 150 + 100 steps" in said
    assert "stages of 2 layers or more" in said


def test_advice_against_growing_says_what_does_not_shrink() -> None:
    costs = StepCosts(1.0, 1.0, 2.0, rest_forward=500.0, data=500.0)
    said = advised(load_recipe("bert-base"), costs)
    # Of mslt k=4 is the fastest: 1036 / 1018.
    assert said.startswith(
        "Freezing will not pay here: `mslt` is at most 1.02 times as fast at equal steps (in a study"
    )
    assert (
        "it took 1.44 to 1.65 times the steps to the same loss), and 97% of a full step is what every stage has: "
        in said
    )
    assert said.endswith("Train with `schedule: {name: full}`.")


@pytest.mark.parametrize("schedule", [{"name": "full"}, {"name": "mslt", "k": 7}], ids=str)
def test_of_seven_layers_no_stages_are_deep_enough_and_the_fastest_is_named(
    tiny_sections: dict[str, Any], schedule: dict[str, Any]
) -> None:
    """Of one_shot 320 steps take 3 s and 80 take 21 s: 8400 / 2640."""
    assert advised(recipe_of(tiny_sections, 7, **schedule), layers_only(2)) == (
        "No k divides 7 layers into stages of 3 or more. The fastest at equal steps is one_shot (3.18 times)."
    )


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (0.001, "schedule.steps: Input should be greater than 0, not 0"),  # 3.6 s, and a step takes 18 s at the mean
        (0.016, "schedule.steps: 3 steps with retrain_share 0.2"),
        (5.0, "optimizer.warmup_steps: 10000 is not below schedule.steps 1000"),
    ],
)
def test_a_time_too_short_to_grow_in_is_refused(hours: float, said: str) -> None:
    with pytest.raises(MsltError, match=f"--hours {hours}: too short to grow in: the proposal: ") as refused:
        advised(load_recipe("bert-base"), layers_only(2), hours)
    assert said in str(refused.value)


def test_a_recipe_that_writes_its_stages_out_is_proposed_the_same_k() -> None:
    recipe = load_recipe("bert-base")
    grown = [(f"0-{n - 1},{n - 3}-{n - 1}", "below") for n in (3, 6, 9)]
    listed = [{"sources": sources, "freeze": freeze, "share": 1} for sources, freeze in
              [("random,random,random", "none"), *grown, ("0-11", "none")]]  # fmt: skip
    schedule = ScheduleConfig(name="stages", steps=1_000_000, stages=listed)  # type: ignore[call-arg]
    same = recipe.model_copy(update={"schedule": schedule})
    assert [one.name for one in forecasts(same, layers_only(2)) if one.is_own] == ["mslt, k=4"]
    assert "name: mslt, steps: 1000000, k: 4," in advised(same, layers_only(2))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (119.94, "119.9 s"),
        (120, "2.0 min"),
        (7199, "120.0 min"),
        (7200, "2.0 h"),
        (1.8e7, "5,000.0 h"),
    ],
)
def test_times_are_said_in_a_unit_that_fits(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA A40", None),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("Tesla T4", "t4"),
        ("", None),
    ],
)
def test_a_card_is_known_by_the_name_its_driver_gives(device: str, name: str | None) -> None:
    assert tabled(device) is (None if name is None else GPUS[name])


@pytest.mark.parametrize(
    "device",
    ["NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA H100 NVL",
     "NVIDIA A100-SXM4-80GB MIG 1g.10gb"],
)  # fmt: skip
def test_a_card_of_another_speed_is_not_taken_for_a_tabled_one(device: str) -> None:
    assert tabled(device) is None


def described(recipe: Recipe, gpu: str, num_gpus: int, autocast: str | None, gbps: float | None = None) -> StepCosts:
    return cluster_costs(make_plan(recipe, {}), Cluster(num_gpus, gpu, gbps), None, autocast, 4)


def test_costs_of_a_described_gpu_by_hand() -> None:
    recipe = load_recipe("bert-base")
    # Per token of a layer 24·768² in matrices and 4·128·768 in attention; 32 samples on each of 32 GPUs, or all on one.
    layer = 128 * (24 * 768**2 + 4 * 128 * 768)
    decoder, transforms = 20 * 2 * 768 * 30522, 20 * 2 * 768**2 + 2 * 768**2
    for gpu, num_gpus, samples, autocast, reached in (
        ("v100", 32, 32, None, 15.7e12 * 0.65),
        ("v100", 32, 32, "float16", 125e12 * 0.35),
        ("v100", 32, 32, "bfloat16", 125e12 * 0.35),  # which it lacks; what is told is what its tensor cores would do
        ("a100", 32, 32, "bfloat16", 312e12 * 0.35),
        ("a100", 1, 1024, "bfloat16", 312e12 * 0.35),
    ):
        costs = described(recipe, gpu, num_gpus, autocast)
        assert costs.layer_forward == costs.frozen_layer_forward == pytest.approx(samples * layer / reached)
        assert costs.layer_backward == pytest.approx(samples * 2 * layer / reached)
        assert costs.rest_forward == pytest.approx(samples * (transforms + decoder) / reached)
        assert costs.heads_backward == pytest.approx(samples * (2 * transforms + decoder) / reached)
        assert costs.embeddings_backward == pytest.approx(samples * decoder / reached)
        assert costs.optimizer_parameter == pytest.approx(48 / {"v100": 900e9, "a100": 2039e9}[gpu])
        assert costs.reduce_once == costs.reduce_parameter == costs.optimizer_once == costs.data == 0


MEASURED = StepCosts(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0)


@pytest.mark.parametrize(
    ("num_gpus", "gradient_bytes", "gbps", "seconds"),
    [
        # A worker sends 2(n-1)/n of the gradient; a gigabit a second is 1.25e8 bytes.
        (2, 2, 8, 2e-9),
        (32, 4, 100, 2 * 31 / 32 * 4 / 12.5e9),
        (4, 2, 10, 2 * 3 / 4 * 2 / 1.25e9),
        (1, 4, 8, 0.0),
        (1, 4, None, 0.0),
    ],
)
def test_a_ring_sends_nearly_twice_the_gradient(
    num_gpus: int, gradient_bytes: int, gbps: float | None, seconds: float
) -> None:
    """Measured on as many workers, all else stays as it was. Of 1,024 samples the last micro-batch has 32 a GPU."""
    plan = make_plan(load_recipe("bert-base"), {})
    found = cluster_costs(plan, Cluster(num_gpus, None, gbps), (MEASURED, num_gpus), None, gradient_bytes)
    assert found.reduce_parameter == pytest.approx(seconds)
    assert found == replace(
        MEASURED, reduce_once=0.0, reduce_parameter=found.reduce_parameter, overlap=num_gpus * 32 / 1024
    )
    told = cluster_costs(plan, Cluster(num_gpus, "a100", gbps), None, None, gradient_bytes)
    assert (told.reduce_once, told.reduce_parameter) == (0.0, found.reduce_parameter)


def test_measured_on_two_and_said_of_eight_by_hand() -> None:
    """A quarter of the samples on each; updating costs what it did, and all-reducing what the link says."""
    plan = make_plan(load_recipe("bert-base"), {})
    found = cluster_costs(plan, Cluster(8, None, 8.0), (MEASURED, 2), None, 2)
    sent = pytest.approx(3.5e-9)
    assert found == StepCosts(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 0.0, sent, 9.0, 10.0, 2.75, overlap=0.25)  # type: ignore[arg-type]
    onto_one = cluster_costs(plan, Cluster(1, None, None), (MEASURED, 2), None, 2)
    assert onto_one == StepCosts(2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 0.0, 0.0, 9.0, 10.0, 22.0, overlap=1 / 32)


def test_what_no_table_knows_is_refused() -> None:
    recipe = load_recipe("bert-base")
    with pytest.raises(MsltError, match=r"GPU gtx480: no figures of it; take one of v100, .*h200, or measure on one"):
        described(recipe, "gtx480", 8, None)
    for gpu in GPUS:
        for autocast in (None, "float16", "bfloat16"):
            assert described(recipe, gpu, 8, autocast).layer_forward > 0


def one_after_the_other(recipe: Recipe) -> StepCosts:
    """Of 32 V100s, gradients after the backward pass, as DeepSpeed sends them without ZeRO."""
    return replace(described(recipe, "v100", 32, None, 100), overlap=0.0)


def test_the_papers_cluster_takes_the_papers_hours() -> None:
    found = forecasts(fp32_base(), one_after_the_other(fp32_base()))
    hours = {one.name: one.total_s / 3600 for one in found}
    for name, said in HOURS.items():
        assert hours[name] == pytest.approx(said, rel=0.1), name
    best = proposal(found, 12)
    assert best is not None
    assert best.schedule.options["k"] == 4
    assert best.speedup == pytest.approx(85.4 / 40, rel=0.05)


def test_what_fits_the_papers_small_model_is_half_too_slow_for_its_large_one() -> None:
    """The limit that docs/schedules.md tells of: 42 h are 230,000 steps in full, and 500,000 in stages."""
    recipe = load_recipe("bert-large").model_copy(update={"engine": "zero0_fp32"})
    found = forecasts(recipe, one_after_the_other(recipe))
    hours = {one.name: one.total_s / 3600 for one in found}
    assert hours["full"] / (42 / 0.23) == pytest.approx(1.49, abs=0.01)
    assert hours["mslt, k=4"] / (42 / 0.5) == pytest.approx(1.56, abs=0.01)


def test_operations_leave_the_same_speedup_on_any_gpu_without_a_link() -> None:
    """One GPU adds only the optimizer to what operations say."""
    recipe = fp32_base()
    by_operations, by_seconds = (
        {one.name: one.speedup for one in forecasts(recipe, each)}
        for each in (operations(recipe.model, 128, 20), described(recipe, "h100", 1, None))
    )
    for name, speedup in by_operations.items():
        assert by_seconds[name] == pytest.approx(speedup, rel=0.01), name
