"""Growth schedules: each a function from a recipe's numbers to stages, and the learning rate inside a stage."""

from dataclasses import dataclass
from typing import Any, Literal

from mslt.config import FullSchedule, MsltSchedule, Recipe
from mslt.errors import MsltError
from mslt.plan import HEAD_SLOTS, NEXT_SENTENCE_SLOTS, LearningRate, Plan, Stage, all_slots, layer_slots

Source = int | Literal["random"]
Sources = tuple[Source, ...]


def random_layers(count: int) -> Sources:
    layer: Source = "random"
    return (layer,) * count


@dataclass(frozen=True)
class Growth:
    """What a schedule decides about one stage; the rest is the same for all of them."""

    sources: Sources
    trainable: tuple[str, ...]
    steps: int


def full(depth: int, steps: int) -> list[Growth]:
    """All layers, all parameters, from the first step to the last."""
    return [Growth(random_layers(depth), all_slots(depth), steps)]


def mslt(depth: int, k: int, steps: int, retrain_steps: int) -> list[Growth]:
    """Multi-stage layerwise training (Yang et al. 2020, arXiv:2011.13635, section 3).

    Stage 1 trains depth/k layers and everything else. Each of the next k-1 stages copies the top depth/k layers onto
    the top and trains the copies with the heads (`the output layer`: pooler, MLM transform and bias, NSP), all below
    frozen. The last stage retrains everything for `retrain_steps`, the others share what is left of `steps`.
    """
    block = depth // k
    shared, rest = divmod(steps - retrain_steps, k)
    stages = [Growth(random_layers(block), all_slots(block), shared + (rest > 0))]
    for index in range(1, k):
        below = block * index
        sources = (*range(below), *range(below - block, below))
        trainable = (*layer_slots(below, below + block), *HEAD_SLOTS)
        stages.append(Growth(sources, trainable, shared + (index < rest)))
    stages.append(Growth(tuple(range(depth)), all_slots(depth), retrain_steps))
    return stages


def refuse_apex_where_it_is_wrong(recipe: Recipe, engine: dict[str, Any]) -> None:
    """MsltError for NVIDIA's LAMB with ZeRO's partitions, whose norms it would take for parameters', and with moments
    carried over growth, which come with a step count each."""
    zero_stage = engine.get("zero_optimization", {}).get("stage", 0)
    carries = isinstance(recipe.schedule, MsltSchedule) and recipe.schedule.optimizer_state == "carry"
    if recipe.optimizer.implementation == "apex" and (zero_stage or carries):
        why = "schedule.optimizer_state carry" if carries else f"engine {recipe.engine} (ZeRO-{zero_stage})"
        raise MsltError(f"optimizer.implementation apex: makes another update with {why}; write foreach")


def make_plan(recipe: Recipe, engine: dict[str, Any], shards_sha256: str | None = None) -> Plan:
    """The recipe's schedule as a plan: one global learning-rate schedule over all stages unless it says per stage."""
    refuse_apex_where_it_is_wrong(recipe, engine)
    schedule, training = recipe.schedule, recipe.training
    depth = recipe.model.num_hidden_layers
    if isinstance(schedule, MsltSchedule):
        growths = mslt(depth, schedule.k, schedule.steps, schedule.retrain_steps)
        per_stage, frozen_dropout = schedule.learning_rate == "per_stage", schedule.frozen_dropout
        optimizer_state = schedule.optimizer_state
    else:
        assert isinstance(schedule, FullSchedule)
        growths, per_stage, frozen_dropout, optimizer_state = full(depth, schedule.steps), False, True, "reset"

    unused = () if recipe.data.next_sentence_prediction else NEXT_SENTENCE_SLOTS
    stages: list[Stage] = []
    first_step = 0
    for growth in growths:
        rate = LearningRate(
            peak=recipe.optimizer.learning_rate,
            warmup_steps=min(recipe.optimizer.warmup_steps, growth.steps - 1 if per_stage else schedule.steps),
            total_steps=growth.steps if per_stage else schedule.steps,
            first_step=0 if per_stage else first_step,
        )
        stages.append(
            Stage(
                depth=len(growth.sources),
                sources=growth.sources,
                trainable=tuple(slot for slot in growth.trainable if slot not in unused),
                frozen_dropout=frozen_dropout,
                optimizer_state=optimizer_state if stages else "reset",
                steps=growth.steps,
                learning_rate=rate,
                batch_size=training.batch_size,
                micro_batch_size=training.micro_batch_size,
                sequence_length=training.sequence_length,
                first_sample=first_step * training.batch_size,
                seed=training.seed,
            )
        )
        first_step += growth.steps
    return Plan(
        model=recipe.model,
        data=recipe.data,
        shards_sha256=shards_sha256,
        optimizer=recipe.optimizer,
        clip_norm=training.clip_norm,
        skip_bad_batches=training.skip_bad_batches,
        engine=engine,
        stages=tuple(stages),
    )


def lr_at(stage: Stage, step: int) -> float:
    """Learning rate of the stage's step (from 0): peak * (t+1)/warmup, then peak * (total-t)/(total-warmup).

    t counts in the schedule the stage takes part in. The warm-up ends at the peak, no step is taken at rate 0.
    """
    rate = stage.learning_rate
    t = rate.first_step + step
    if t < rate.warmup_steps:
        return rate.peak * (t + 1) / rate.warmup_steps
    return rate.peak * (rate.total_steps - t) / (rate.total_steps - rate.warmup_steps)
