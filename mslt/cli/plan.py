"""`mslt plan`: what a recipe will do, stage by stage. Never imports torch."""

import json
from typing import Annotated

import typer

from mslt.config import load_recipe
from mslt.cost import StageCost, stage_cost
from mslt.engine.ds_config import read_engine_config
from mslt.plan import HEAD_SLOTS, Plan, Stage, layer_slots
from mslt.schedule import lr_at, make_plan


def plan(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe (*.yaml), or the name of one shipped with mslt.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan and its costs as JSON.")] = False,
) -> None:
    """Show the stages: layers, where they are copied from, what trains, how many bytes are all-reduced."""
    loaded = load_recipe(recipe)
    made = make_plan(loaded, read_engine_config(loaded.engine))
    costs = [stage_cost(made.model, stage) for stage in made.stages]
    if as_json:
        stages = [
            {**stage.model_dump(mode="json"), **vars(cost)} for stage, cost in zip(made.stages, costs, strict=True)
        ]
        typer.echo(json.dumps({**made.model_dump(mode="json"), "stages": stages}, indent=2))
    else:
        _print(recipe, made, costs)


def _print(recipe: str, made: Plan, costs: list[StageCost]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{recipe}: {made.steps:,} steps of {made.stages[0].batch_size:,} samples")
    for heading, justify in (
        ("stage", "right"), ("layers", "right"), ("from", "left"), ("trains", "left"), ("steps", "right"),
        ("learning rate", "left"), ("parameters", "right"), ("trainable", "right"),
        ("gradients, fp32", "right"), ("bf16/fp16", "right"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for number, (stage, cost) in enumerate(zip(made.stages, costs, strict=True), 1):
        table.add_row(
            str(number), str(stage.depth), _sources(stage), _trainable(stage), f"{stage.steps:,}",
            f"{lr_at(stage, 0):.3g} to {lr_at(stage, stage.steps - 1):.3g}",
            f"{cost.total_parameters:,}", f"{cost.trainable_parameters:,}",
            f"{cost.fp32_gradient_bytes / 1e6:.2f} MB", f"{cost.half_gradient_bytes / 1e6:.2f} MB",
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    full = costs[-1].trainable_parameters
    mean = sum(c.trainable_parameters * s.steps for c, s in zip(costs, made.stages, strict=True)) / made.steps
    trained = max(stage.sequence_length for stage in made.stages)
    if trained < made.model.max_position_embeddings:
        print(
            f"Positions {trained} to {made.model.max_position_embeddings - 1} are never trained: fine-tune on longer "
            f"sequences only after a phase at that length, or set model.max_position_embeddings to {trained}."
        )
    print(f"Mean gradient of a step: {mean:,.0f} parameters, {mean / full:.1%} of the whole model's {full:,}.")


def _runs(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 0, 1) as `0-2,0-1`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _sources(stage: Stage) -> str:
    copied = tuple(source for source in stage.sources if source != "random")
    if len(copied) == stage.depth:
        return _runs(copied)
    return ",".join(map(str, stage.sources)) if copied else "random"


def _trainable(stage: Stage) -> str:
    if not stage.frozen:
        return "all"
    layers = tuple(index for index in range(stage.depth) if layer_slots(index, index + 1)[0] in stage.trainable)
    others = [slot for slot in ("embeddings", *HEAD_SLOTS) if slot in stage.trainable]
    heads = ["heads" if set(HEAD_SLOTS) <= set(others) else ", ".join(others)]
    return f"layers {_runs(layers)}, {heads[0]}"
