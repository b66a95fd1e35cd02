"""From a recipe to a plan, and the learning rate inside a stage."""

from typing import Any

from mslt.config import Recipe
from mslt.errors import MsltError
from mslt.growth import Growth, find_schedule, stages_of
from mslt.plan import HEAD_SLOTS, NEXT_SENTENCE_SLOTS, LearningRate, Plan, Stage, all_slots, layer_slots


def refuse_apex_where_it_is_wrong(recipe: Recipe, engine: dict[str, Any]) -> None:
    """MsltError for NVIDIA's LAMB with ZeRO's partitions, whose norms it would take for parameters', and with moments
    carried over growth, which come with a step count each."""
    zero_stage = engine.get("zero_optimization", {}).get("stage", 0)
    carries = recipe.schedule.optimizer_state == "carry"
    if recipe.optimizer.implementation == "apex" and (zero_stage or carries):
        why = "schedule.optimizer_state carry" if carries else f"engine {recipe.engine} (ZeRO-{zero_stage})"
        raise MsltError(f"optimizer.implementation apex: makes another update with {why}; write foreach")


def _refuse_what_partitions_forbid(recipe: Recipe, engine: dict[str, Any]) -> None:
    """MsltError for what needs a layer's weights whole, or several stages in a process, under ZeRO-3."""
    if engine.get("zero_optimization", {}).get("stage", 0) < 3:
        return
    training, found = recipe.training, []
    if recipe.schedule.frozen_precision == "int8":
        found.append("schedule.frozen_precision int8: write exact")
    if training.compile != "none":
        found.append(f"training.compile {training.compile}: write none")
    if training.micro_batch_size == "auto":
        found.append("training.micro_batch_size auto: write a number")
    if found:
        raise MsltError(
            f"engine {recipe.engine} (ZeRO-3) cuts weights into pieces and takes a launch for every stage, which does "
            f"not go with {'; '.join(found)}, or take an engine of zero0 to zero2"
        )


def make_plan(recipe: Recipe, engine: dict[str, Any], shards_sha256: str | None = None) -> Plan:
    """The recipe's schedule as a plan: one global learning-rate schedule over all stages unless it says per stage. A
    micro-batch that is yet to be measured is the whole batch."""
    refuse_apex_where_it_is_wrong(recipe, engine)
    _refuse_what_partitions_forbid(recipe, engine)
    schedule, training, optimizer = recipe.schedule, recipe.training, recipe.optimizer
    per_stage = schedule.learning_rate == "per_stage"
    growths = stages_of(find_schedule(schedule.name), recipe.model.num_hidden_layers, schedule.steps, schedule.options)
    unused = () if recipe.data.next_sentence_prediction else NEXT_SENTENCE_SLOTS
    at_once = training.batch_size if training.micro_batch_size == "auto" else training.micro_batch_size
    stages: list[Stage] = []
    first_step = 0
    for growth in growths:
        total = growth.steps if per_stage else schedule.steps
        warmup = min(optimizer.warmup_steps, total - 1)
        rate = LearningRate(
            peak=optimizer.learning_rate,
            warmup_steps=warmup,
            decay_steps=min(max(round(total * optimizer.decay_share), 1), total - warmup),
            total_steps=total,
            first_step=0 if per_stage else first_step,
            rewarmup_steps=schedule.rewarmup_steps if stages else 0,
        )
        stages.append(
            Stage(
                depth=len(growth.sources),
                sources=growth.sources,
                trainable=tuple(slot for slot in trainable_slots(growth) if slot not in unused),
                frozen_dropout=schedule.frozen_dropout,
                frozen_precision=schedule.frozen_precision,
                optimizer_state=schedule.optimizer_state if stages else "reset",
                steps=growth.steps,
                learning_rate=rate,
                batch_size=training.batch_size,
                micro_batch_size=at_once,
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
        optimizer=optimizer,
        clip_norm=training.clip_norm,
        skip_bad_batches=training.skip_bad_batches,
        compile=training.compile,
        engine=engine,
        stages=tuple(stages),
        card=recipe.card,
    )


def trainable_slots(growth: Growth) -> tuple[str, ...]:
    """What trains under the stage's `freeze`; see Growth."""
    depth = len(growth.sources)
    if growth.freeze == "none":
        return all_slots(depth)
    lowest = 0
    if growth.freeze == "below":
        lowest = next((index for index, source in enumerate(growth.sources) if source != index), depth)
    return (*layer_slots(lowest, depth), *HEAD_SLOTS)


def lr_at(stage: Stage, step: int) -> float:
    """Learning rate of the stage's step (from 0): peak * (t+1)/warmup, then peak, then peak * (total-t)/decay.

    t counts in the schedule the stage takes part in. The warm-up ends at the peak, no step is taken at rate 0. Where
    the stage warms up anew, its first steps take (step+1)/rewarmup of that.
    """
    rate = stage.learning_rate
    t = rate.first_step + step
    if t < rate.warmup_steps:
        value = rate.peak * (t + 1) / rate.warmup_steps
    else:
        value = rate.peak * min(rate.total_steps - t, rate.decay_steps) / rate.decay_steps
    return value * (step + 1) / rate.rewarmup_steps if step < rate.rewarmup_steps else value
