"""What a step costs: three timed shapes tell every number of it, and the operations are those that torch counts."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mslt.config import Recipe, parse_recipe
from mslt.cost import (
    PARTS,
    StepCosts,
    fit,
    for_timing,
    layers_with_graph,
    medians,
    operations,
    probes,
    scaled,
    slot_parameters,
    stage_cost,
    step_parts,
    step_total,
)
from mslt.forecast import alternatives
from mslt.models import factory
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.freezing import freeze
from mslt.plan import Plan, Stage, layer_slots, lowest_graph_layer
from mslt.schedule import make_plan

DEPTHS = [1, 2, 3, 4, 6, 12]
B, T, M = 2, 32, 5  # samples, tokens of one, predicted ones

seconds = st.floats(0, 10)
seconds_a_parameter = st.floats(0, 1e-6)
step_costs = st.builds(
    StepCosts,
    **dict.fromkeys(
        ("layer_forward", "frozen_layer_forward", "layer_backward", "rest_forward", "heads_backward",
         "embeddings_backward", "reduce_once", "optimizer_once", "data"),
        seconds,
    ),
    **dict.fromkeys(("reduce_parameter", "optimizer_parameter"), seconds_a_parameter),
)  # fmt: skip


def recipe_of(sections: dict[str, Any], depth: int, pairs: bool, **schedule: Any) -> Recipe:
    model, data = ({**sections[name]} for name in ("model", "data"))
    model["num_hidden_layers"], data["next_sentence_prediction"] = depth, pairs
    schedule = schedule or {"name": "full"}
    return parse_recipe({**sections, "model": model, "data": data, "schedule": {"steps": 120, **schedule}}, "recipe")


def test_a_step_waits_for_gradients_that_do_not_travel_beside_its_layers_or_the_next_steps_frozen_ones(
    tiny_plan: Plan,
) -> None:
    first, top, whole = tiny_plan.stages[0], tiny_plan.stages[1], tiny_plan.stages[-1]
    embeddings = slot_parameters(tiny_plan.model, "embeddings")
    for stage in (first, top, whole):
        trainable = stage_cost(tiny_plan.model, stage).trainable_parameters
        for a_parameter in (1e-9, 1e-3):
            alone = StepCosts(1.0, 0.5, 2.0, heads_backward=1.0, reduce_parameter=a_parameter)
            parts = step_parts(alone, tiny_plan.model, stage)
            assert parts["reduce"] == trainable * a_parameter
            beside = step_parts(replace(alone, overlap=0.5), tiny_plan.model, stage)
            last = embeddings * a_parameter if stage is not top else 0.0
            with_graph = layers_with_graph(stage)
            hides = 0.5 * (2.0 * with_graph + 0.5 * (stage.depth - with_graph))
            assert beside == {**parts, "reduce": max(trainable * a_parameter - hides, last)}
    assert scaled(replace(alone, overlap=0.5), 0.25).overlap == 0.5


def timings(costs: StepCosts, plan: Plan) -> list[dict[str, float]]:
    """What a clock without error would say of the plan's stages."""
    return [step_parts(costs, plan.model, stage) for stage in plan.stages]


def every_plan(recipe: Recipe) -> list[Plan]:
    return [make_plan(alternative, {}) for alternative in alternatives(recipe).values()]


@pytest.fixture(scope="module", params=[(depth, pairs) for depth in DEPTHS for pairs in (True, False)], ids=str)
def plans(request: pytest.FixtureRequest, tiny_sections: dict[str, Any]) -> list[Plan]:
    """Full training of so many layers, with next-sentence prediction or without, and every schedule that grows them."""
    found = every_plan(recipe_of(tiny_sections, *request.param))
    assert len(found[0].stages) == 1
    return found


def assert_same_steps(found: StepCosts, true: StepCosts, plans: list[Plan]) -> None:
    for plan in plans:
        for stage in plan.stages:
            expected = step_parts(true, plan.model, stage)
            assert step_parts(found, plan.model, stage) == pytest.approx(expected, rel=1e-9, abs=1e-11), stage


@settings(deadline=None, max_examples=15, derandomize=True, print_blob=True)
@given(true=step_costs, alone=st.booleans())
def test_three_timed_shapes_tell_every_cost(plans: list[Plan], true: StepCosts, alone: bool) -> None:
    if alone:  # one worker reduces nothing
        true = replace(true, reduce_once=0.0, reduce_parameter=0.0)
    probing = probes(plans[0])
    found = fit(probing, timings(true, probing))
    if plans[0].stages[0].depth > 1:  # no timing tells one layer from the rest: of one, the steps alone are told
        for name, value in vars(true).items():
            tolerance = 1e-14 if name.endswith("_parameter") else 1e-10
            assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=tolerance), name
    assert_same_steps(found, true, plans)


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "one_shot", "freeze": "below"},
        {"name": "stacking", "freeze": "embeddings"},
        {"name": "stages", "stages": [{"sources": "random", "share": 1}, {"sources": "0,random,random,random",
         "share": 1, "freeze": "below"}]},
    ],
    ids=lambda schedule: schedule["name"],
)  # fmt: skip
@pytest.mark.parametrize("pairs", [True, False])
def test_a_recipe_that_ends_frozen_tells_what_embeddings_cost(
    tiny_sections: dict[str, Any], schedule: dict[str, Any], pairs: bool
) -> None:
    true = StepCosts(1.0, 0.5, 2.0, rest_forward=3.0, heads_backward=4.0, embeddings_backward=5.0)
    recipe = recipe_of(tiny_sections, 4, pairs, **schedule)
    probing = probes(make_plan(recipe, {}))
    assert_same_steps(fit(probing, timings(true, probing)), true, every_plan(recipe))


def test_the_timed_shapes_are_whole_frozen_and_shallow(plans: list[Plan]) -> None:
    depth, pairs = plans[0].stages[0].depth, plans[0].data.next_sentence_prediction
    whole, frozen, shallow = probes(plans[0]).stages
    heads = {"mlm_head", "pooler", "nsp_head"} if pairs else {"mlm_head"}
    assert (whole.depth, frozen.depth, shallow.depth) == (depth, depth, max(depth // 4, 1))
    assert set(whole.trainable) == heads | {"embeddings", *layer_slots(0, depth)}
    assert set(frozen.trainable) == heads | set(layer_slots(depth - shallow.depth, depth))
    assert set(shallow.trainable) == heads | {"embeddings", *layer_slots(0, shallow.depth)}
    Plan.model_validate(probes(plans[0]).model_dump())  # copies are not checked when they are made


def test_stages_to_be_timed_stand_alone_and_step_as_before(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["schedule"]["optimizer_state"] = "carry"
    tiny_recipe["schedule"]["frozen_dropout"] = False
    plan = make_plan(parse_recipe(tiny_recipe, "recipe"), {})
    assert plan.stages[1].optimizer_state == "carry"
    for stage in plan.stages:
        found = for_timing(stage)
        Plan.model_validate({**plan.model_dump(), "stages": [found.model_dump()]})  # copies nothing from before
        assert (found.optimizer_state, found.first_sample) == ("reset", 0)
        assert found.steps >= 10**6, "an iterator over its batches does not end"
        free = {"sources", "optimizer_state", "first_sample", "steps"}
        assert found.model_dump(exclude=free) == stage.model_dump(exclude=free)
    for stage in probes(plan).stages:
        assert stage == for_timing(stage)
        assert not stage.frozen_dropout


def test_medians_are_of_each_part_of_each_stage() -> None:
    timed = [{"forward": [3.0, 1.0, 100.0], "data": [0.0, 0.5]}, {"forward": [2.0], "data": [4.0, 9.0, 8.0]}]
    assert medians(timed) == [{"forward": 3.0, "data": 0.25}, {"forward": 2.0, "data": 8.0}]


def test_layers_with_a_graph_by_hand(tiny_plan: Plan) -> None:
    shallow, frozen, whole = tiny_plan.stages
    assert [layers_with_graph(stage) for stage in (shallow, frozen, whole)] == [2, 2, 4]
    for trainable, count in (
        (("embeddings", "mlm_head"), 4),  # the gradient comes through all layers
        (("layer.3", "mlm_head"), 1),
        (("layer.0", "layer.3", "mlm_head"), 4),
        (("mlm_head",), 0),
    ):
        assert layers_with_graph(whole.model_copy(update={"trainable": trainable})) == count, trainable


def test_loaders_load_beside_the_steps(tiny_plan: Plan) -> None:
    """4 layers of 1 s forward and 2 s backward: 12 s, which a batch of 30 s outlasts with one loader or two."""
    whole = tiny_plan.stages[2]
    costs = StepCosts(1.0, 1.0, 2.0, data=30.0)
    for num_loaders, left in ((0, 30.0), (1, 18.0), (2, 3.0), (3, 0.0), (16, 0.0)):
        found = replace(costs, num_loaders=num_loaders)
        assert step_parts(found, tiny_plan.model, whole)["data"] == left, num_loaders
    reducing = replace(costs, reduce_once=2.0, optimizer_once=0.5, num_loaders=2)  # loading goes on beside these too
    assert step_parts(reducing, tiny_plan.model, whole)["data"] == 0.5


def test_a_shallow_stage_waits_for_loaders_that_keep_up_with_the_whole(tiny_plan: Plan) -> None:
    costs = StepCosts(1.0, 1.0, 2.0, data=24.0, num_loaders=2)  # 12 s a batch: what the whole takes
    whole, shallow = tiny_plan.stages[2], tiny_plan.stages[0]
    assert step_parts(costs, tiny_plan.model, whole)["data"] == 0.0
    assert step_total(costs, tiny_plan.model, shallow) == 12.0, "2 layers compute for 6 s"


@settings(deadline=None, max_examples=15, derandomize=True, print_blob=True)
@given(true=step_costs, seed=st.integers(0, 2**32))
def test_noise_makes_no_cost_negative(plans: list[Plan], true: StepCosts, seed: int) -> None:
    probing, draw = probes(plans[0]), random.Random(seed)
    noisy = [{part: s * draw.uniform(0, 2) for part, s in parts.items()} for parts in timings(true, probing)]
    found = fit(probing, noisy)
    assert min(vars(found).values()) >= 0, found
    for plan in plans:
        assert min(min(parts.values()) for parts in timings(found, plan)) >= 0


def test_loading_that_is_timed_below_nothing_costs_nothing(tiny_sections: dict[str, Any]) -> None:
    """`data` is what is left of a step, a difference of two clocks on a GPU."""
    probing = probes(make_plan(recipe_of(tiny_sections, 4, pairs=True), {}))
    timed = [parts | {"data": -1e-5} for parts in timings(StepCosts(1.0, 1.0, 2.0), probing)]
    assert fit(probing, timed).data >= 0


def test_fewer_samples_cost_less_and_updating_costs_the_same() -> None:
    costs = StepCosts(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0)
    assert scaled(costs, 0.5) == StepCosts(0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 7.0, 8.0, 9.0, 10.0, 5.5)
    assert scaled(costs, 1) == costs


def test_a_step_is_the_sum_of_its_parts_by_hand(tiny_plan: Plan) -> None:
    costs = StepCosts(1.0, 0.5, 2.0, 10.0, 20.0, 30.0, 7.0, 1e-3, 9.0, 1e-4, 11.0)
    shallow, frozen, whole = tiny_plan.stages  # 2 of 2 layers, the upper 2 of 4, 4 of 4
    trained = [stage_cost(tiny_plan.model, stage).trainable_parameters for stage in tiny_plan.stages]
    assert timings(costs, tiny_plan) == [
        dict(zip(PARTS, (10 + 2, 20 + 4 + 30, 7 + trained[0] / 1e3, 9 + trained[0] / 1e4, 11), strict=True)),
        dict(zip(PARTS, (10 + 2 + 1, 20 + 4, 7 + trained[1] / 1e3, 9 + trained[1] / 1e4, 11), strict=True)),
        dict(zip(PARTS, (10 + 4, 20 + 8 + 30, 7 + trained[2] / 1e3, 9 + trained[2] / 1e4, 11), strict=True)),
    ]
    assert step_total(costs, tiny_plan.model, frozen) == sum(step_parts(costs, tiny_plan.model, frozen).values())
    assert shallow.depth == 2
    assert whole.frozen == ()


def counted_operations(plan: Plan, stage: Stage) -> tuple[float, float]:
    """Floating-point operations of a sample's forward and backward pass through a built model, as torch counts them."""
    model = factory.build(plan.model, stage.depth, factory.initial_state(plan.model, stage.depth, seed=0))
    freeze(model, stage.trainable)
    pairs = plan.data.next_sentence_prediction
    module = PretrainingLoss(model, lowest_graph_layer(stage.trainable, stage.depth), next_sentence_prediction=pairs)
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(plan.model.vocab_size, (B, T), generator=draw)
    positions_BM = torch.arange(M).expand(B, M)
    batch = {
        "input_ids": ids_BT,
        "token_type_ids": torch.zeros_like(ids_BT),
        "attention_mask": torch.ones_like(ids_BT),
        "mlm_positions": positions_BM,
        "mlm_labels": ids_BT.gather(1, positions_BM),
        "nsp_labels": torch.zeros(B, dtype=torch.long),
    }
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # torch has no count for the CPU's fused attention
        sums = module(**batch)
        forward = counter.get_total_flops()
        (sums[SUMS.index("mlm_loss")] + sums[SUMS.index("nsp_loss")]).backward()
    return forward / B, (counter.get_total_flops() - forward) / B


@pytest.mark.parametrize("stage_index", [0, 1, 2], ids=["shallow", "frozen", "whole"])
def test_operations_are_those_that_torch_counts(tiny_plan: Plan, stage_index: int) -> None:
    plan, stage = tiny_plan, tiny_plan.stages[stage_index]
    parts = step_parts(operations(plan.model, T, M), plan.model, stage)
    forward, backward = counted_operations(plan, stage)
    assert forward == pytest.approx(parts["forward"], rel=0.002)  # the NSP head's 2 outputs are left out
    # The input of the lowest layer with a graph wants no gradient, so its Q, K and V give none to it.
    saved = 3 * 2 * T * plan.model.hidden_size**2 if stage.frozen else 0
    assert backward == pytest.approx(parts["backward"] - saved, rel=0.002)
    assert forward + backward == pytest.approx(parts["forward"] + parts["backward"], rel=0.05)


def test_operations_without_pairs_leave_out_pooler_and_nsp_head(tiny_sections: dict[str, Any]) -> None:
    plan = make_plan(recipe_of(tiny_sections, 4, pairs=False), {})
    forward, backward = counted_operations(plan, plan.stages[-1])
    parts = step_parts(operations(plan.model, T, M), plan.model, plan.stages[-1])
    assert forward + backward == pytest.approx(parts["forward"] + parts["backward"], rel=0.05)


def test_trainable_embeddings_would_pull_the_gradient_through_frozen_layers(tiny_plan: Plan) -> None:
    frozen = tiny_plan.stages[1]
    with_embeddings = frozen.model_copy(update={"trainable": ("embeddings", *frozen.trainable)})
    costs = operations(tiny_plan.model, T, M)
    _, backward = counted_operations(tiny_plan, frozen)
    _, pulled = counted_operations(tiny_plan, with_embeddings)
    assert pulled > backward + 2 * costs.layer_forward  # at the least the gradient for the inputs of two layers
    assert pulled > 1.3 * step_parts(costs, tiny_plan.model, frozen)["backward"]
