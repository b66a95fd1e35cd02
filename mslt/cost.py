"""What a stage costs: parameters and bytes of gradient, from its shape; a step, from what its parts cost.

With hidden width H, intermediate width I, vocabulary V, positions P and token types Y, a BERT slot has
  embeddings  (V + P + Y)·H + 2H          word, position, type, LayerNorm; the MLM decoder's weight is tied to it
  layer       4(H² + H) + 2HI + I + H + 4H  Q, K, V and output; the two dense layers; two LayerNorms
  pooler      H² + H
  mlm_head    H² + H + 2H + V             transform, its LayerNorm, the decoder's bias
  nsp_head    2H + 2
A sample of T tokens, M of them predicted, takes these floating-point operations, a multiplication with its addition
counted as two
  layer       T·(2·(4H² + 2HI) + 4TH)     forward; its backward pass twice that, for inputs and for weights
  heads       M·(2H² + 2HV) + 2H²         forward; backward twice that, but for the decoder's weight, M·2HV, only where
                                          embeddings train
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mslt.config import ModelConfig
from mslt.plan import HEAD_SLOTS, NEXT_SENTENCE_SLOTS, Plan, Stage, all_slots, layer_slots, lowest_graph_layer


def slot_parameters(model: ModelConfig, slot: str) -> int:
    """Number of parameters in one slot; the formulas are at the top of this file."""
    width, inner = model.hidden_size, model.intermediate_size
    if slot == "embeddings":
        return (model.vocab_size + model.max_position_embeddings + model.type_vocab_size) * width + 2 * width
    if slot.startswith("layer."):
        return 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    return {
        "pooler": width * width + width,
        "mlm_head": width * width + width + 2 * width + model.vocab_size,
        "nsp_head": 2 * width + 2,
    }[slot]


@dataclass(frozen=True)
class StageCost:
    """Gradient bytes are what one worker hands to the all-reduce in a step: trainable parameters times 4 or 2."""

    total_parameters: int
    trainable_parameters: int
    fp32_gradient_bytes: int
    half_gradient_bytes: int


def stage_cost(model: ModelConfig, stage: Stage) -> StageCost:
    total = sum(slot_parameters(model, slot) for slot in all_slots(stage.depth))
    trainable = sum(slot_parameters(model, slot) for slot in stage.trainable)
    return StageCost(total, trainable, 4 * trainable, 2 * trainable)


def run_bytes(plan: Plan, kept_checkpoints: int) -> int:
    """What the weights of a run directory take in the end, and one more checkpoint, which is written before an old one
    goes. All in fp32: of each stage its base, its model and checkpoints of weight and two moments of what trains."""
    costs = [stage_cost(plan.model, stage) for stage in plan.stages]
    checkpoints = [3 * 4 * cost.trainable_parameters for cost in costs]
    return sum(2 * 4 * cost.total_parameters for cost in costs) + kept_checkpoints * sum(checkpoints) + max(checkpoints)


PARTS = ("forward", "backward", "reduce", "optimizer", "data")


@dataclass(frozen=True)
class StepCosts:
    """What the parts of a step take, in seconds (or floating-point operations) of one worker; a step is their sum.

    A layer that trains costs its forward and its backward pass, a frozen one below them only its (cheaper) forward.
    `rest_forward` is what every stage has: embeddings, heads, loss; `heads_backward` too, and `embeddings_backward` on
    top where they train. Reducing and updating cost something once and something for each trainable parameter; a step
    waits for what does not travel beside `overlap` of its layers' backward pass and of the next step's frozen layers,
    which is 0 where the costs of reducing are what is waited for, as timed. Gradients of the embeddings are ready last,
    and travel after it. `data` is loading a batch, beside the steps where there are `num_loaders` processes for it.
    """

    layer_forward: float
    frozen_layer_forward: float
    layer_backward: float
    rest_forward: float = 0.0
    heads_backward: float = 0.0
    embeddings_backward: float = 0.0
    reduce_once: float = 0.0
    reduce_parameter: float = 0.0
    optimizer_once: float = 0.0
    optimizer_parameter: float = 0.0
    data: float = 0.0
    num_loaders: int = 0
    overlap: float = 0.0


def scaled(costs: StepCosts, share: float) -> StepCosts:
    """The same for `share` of the samples a worker has: what updating costs stays."""
    kept = ("reduce_once", "reduce_parameter", "optimizer_once", "optimizer_parameter", "num_loaders", "overlap")
    return replace(costs, **{name: value * share for name, value in vars(costs).items() if name not in kept})


def waiting_for_data(loading: float, rest_of_step: float, num_loaders: int) -> float:
    """What a step waits for its data: all of the loading, or, where so many processes load beside the steps, what the
    rest of the step is too short for."""
    return max(loading / num_loaders - rest_of_step, 0.0) if num_loaders else loading


def layers_only(backward: float, frozen_forward: float = 1.0) -> StepCosts:
    """Nothing but layers, a forward pass taking 1: the model of speed that needs one number."""
    return StepCosts(layer_forward=1.0, frozen_layer_forward=frozen_forward, layer_backward=backward)


def operations(model: ModelConfig, sequence_length: int, num_predictions: int) -> StepCosts:
    """Floating-point operations of one sample; the formulas are at the top of this file. The lowest layer with a graph
    needs no gradient of its input, which is not taken off."""
    width, inner, tokens = model.hidden_size, model.intermediate_size, sequence_length
    layer = tokens * (2 * (4 * width**2 + 2 * width * inner) + 4 * tokens * width)
    decoder = num_predictions * 2 * width * model.vocab_size
    transforms = num_predictions * 2 * width**2 + 2 * width**2
    return StepCosts(
        layer_forward=layer,
        frozen_layer_forward=layer,
        layer_backward=2 * layer,
        rest_forward=transforms + decoder,
        heads_backward=2 * transforms + decoder,
        embeddings_backward=decoder,
    )


def layers_with_graph(stage: Stage) -> int:
    """How many of its layers the backward pass goes through."""
    return stage.depth - max(lowest_graph_layer(stage.trainable, stage.depth), 0)


def step_parts(costs: StepCosts, model: ModelConfig, stage: Stage) -> dict[str, float]:
    """What forward, backward, reducing, updating and the data of a step of the stage take."""
    with_graph = layers_with_graph(stage)
    trainable = stage_cost(model, stage).trainable_parameters
    last = slot_parameters(model, "embeddings") if "embeddings" in stage.trainable else 0
    parts = {
        "forward": (
            costs.rest_forward
            + with_graph * costs.layer_forward
            + (stage.depth - with_graph) * costs.frozen_layer_forward
        ),
        "backward": (
            costs.heads_backward
            + with_graph * costs.layer_backward
            + (costs.embeddings_backward if "embeddings" in stage.trainable else 0.0)
        ),
        "reduce": costs.reduce_once + trainable * costs.reduce_parameter,
        "optimizer": costs.optimizer_once + trainable * costs.optimizer_parameter,
    }
    beside = with_graph * costs.layer_backward + (stage.depth - with_graph) * costs.frozen_layer_forward
    parts["reduce"] = max(parts["reduce"] - costs.overlap * beside, last * costs.reduce_parameter)
    return {**parts, "data": waiting_for_data(costs.data, sum(parts.values()), costs.num_loaders)}


def step_total(costs: StepCosts, model: ModelConfig, stage: Stage) -> float:
    return sum(step_parts(costs, model, stage).values())


def plan_total(costs: StepCosts, plan: Plan) -> float:
    """All steps of all stages."""
    return sum(stage.steps * step_total(costs, plan.model, stage) for stage in plan.stages)


def for_timing(stage: Stage) -> Stage:
    """The stage from random layers, long enough for any number of steps: its step costs the same."""
    free = {"sources": ("random",) * stage.depth, "optimizer_state": "reset", "first_sample": 0, "steps": 10**6}
    return stage.model_copy(update=free)


def probes(plan: Plan) -> Plan:
    """Three stages whose steps, timed, tell every number of StepCosts: the whole model; the same with its top frozen
    below; and a shallow one. They are no schedule."""
    depth = plan.model.num_hidden_layers
    top = max(depth // 4, 1)
    unused = () if plan.data.next_sentence_prediction else NEXT_SENTENCE_SLOTS
    shapes = (
        (depth, all_slots(depth)),
        (depth, (*layer_slots(depth - top, depth), *HEAD_SLOTS)),
        (top, all_slots(top)),
    )
    stages = []
    for stage_depth, trainable in shapes:
        used = tuple(slot for slot in trainable if slot not in unused)
        stages.append(for_timing(plan.stages[-1].model_copy(update={"depth": stage_depth, "trainable": used})))
    return plan.model_copy(update={"stages": tuple(stages)})


def medians(timed: Sequence[Mapping[str, Sequence[float]]]) -> list[dict[str, float]]:
    """The median of every part of every stage that was timed."""
    return [{part: statistics.median(values) for part, values in parts.items()} for parts in timed]


def fit(plan: Plan, timed: Sequence[dict[str, float]]) -> StepCosts:
    """The costs that explain the parts of the three stages of `probes(plan)`, timed; never below 0."""
    whole, frozen, shallow = timed
    depth, top = plan.stages[0].depth, plan.stages[2].depth
    parameters = [stage_cost(plan.model, stage).trainable_parameters for stage in plan.stages]

    def line(part: str) -> tuple[float, float]:
        """What the part costs once, and for each parameter: from the stages that train most and least."""
        low, high = (f(range(3), key=lambda index: parameters[index]) for f in (min, max))
        rise = timed[high][part] - timed[low][part]
        slope = max(rise, 0.0) / max(parameters[high] - parameters[low], 1)
        return max(timed[low][part] - slope * parameters[low], 0.0), slope

    layer_forward = max(whole["forward"] - shallow["forward"], 0.0) / max(depth - top, 1)
    layer_backward = max(whole["backward"] - shallow["backward"], 0.0) / max(depth - top, 1)
    rest_forward = max(whole["forward"] - depth * layer_forward, 0.0)
    still = max(frozen["forward"] - rest_forward - top * layer_forward, 0.0) / max(depth - top, 1)
    heads_backward = max(frozen["backward"] - top * layer_backward, 0.0)
    (reduce_once, reduce_parameter), (optimizer_once, optimizer_parameter) = line("reduce"), line("optimizer")
    return StepCosts(
        layer_forward=layer_forward,
        frozen_layer_forward=still,
        layer_backward=layer_backward,
        rest_forward=rest_forward,
        heads_backward=heads_backward,
        embeddings_backward=max(whole["backward"] - depth * layer_backward - heads_backward, 0.0),
        reduce_once=reduce_once,
        reduce_parameter=reduce_parameter,
        optimizer_once=optimizer_once,
        optimizer_parameter=optimizer_parameter,
        data=max(sum(parts["data"] for parts in timed) / len(timed), 0.0),
    )
