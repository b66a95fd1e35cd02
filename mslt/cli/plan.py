"""`mslt plan`: what a recipe will do, stage by stage. Never imports torch."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mslt.config import load_recipe
from mslt.cost import StageCost, StepCosts, fit, medians, probes, stage_cost, step_parts
from mslt.engine.ds_config import read_engine_config, reduced_bytes, zero_stage
from mslt.errors import MsltError
from mslt.forecast import OWN, Forecast, advice, duration, forecasts, proposal
from mslt.hardware import GPUS, WITHOUT_BF16, Cluster, cluster_costs
from mslt.plan import Plan, autocast_dtype, sources_in_words, trainable_in_words
from mslt.schedule import lr_at, make_plan


def plan(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe (*.yaml), or the name of one shipped with mslt.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan and its costs as JSON.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time some thirty steps here, and say what each schedule would take.")
    ] = False,
    shards: Annotated[
        Path | None, typer.Option(help="Shard folder to measure with, instead of data.shards.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes to measure with. Default: one a GPU, or one.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a cluster to say it for.")] = None,
    gpu: Annotated[str | None, typer.Option(help=f"Their kind: {', '.join(GPUS)}. Without: as measured here.")] = None,
    link_gbps: Annotated[
        float | None, typer.Option(min=0.001, help="Gigabits a second of the slowest link between them.")
    ] = None,
    hours: Annotated[float | None, typer.Option(min=0.001, help="Propose a schedule for this time.")] = None,
) -> None:
    """Show the stages: layers, where they are copied from, what trains, how many bytes are all-reduced. With --measure
    or a described cluster, also hours and speedups of every schedule."""
    loaded = load_recipe(recipe)
    made = make_plan(loaded, read_engine_config(loaded.engine))
    cluster = None if gpus is None else Cluster(gpus, None if gpu is None else gpu.lower(), link_gbps)
    _refuse_half_descriptions(made, cluster, measure, bool(gpu or link_gbps), bool(shards or workers), hours)
    measured = _measured(recipe, shards, workers) if measure else None
    step_costs = measured[0] if measured else None
    if cluster is not None:
        step_costs = cluster_costs(made, cluster, measured, autocast_dtype(made.engine), reduced_bytes(made.engine))
    costs = [stage_cost(made.model, stage) for stage in made.stages]
    found = forecasts(loaded, step_costs) if step_costs is not None else []
    if as_json:
        stages = [
            {**stage.model_dump(mode="json"), **vars(cost)} for stage, cost in zip(made.stages, costs, strict=True)
        ]
        printed: dict[str, Any] = {**made.model_dump(mode="json"), "stages": stages}
        if step_costs is not None:
            best = proposal(found, made.model.num_hidden_layers)
            printed["forecast"] = {
                "step_costs": asdict(step_costs),
                "stage_step_s": [step_parts(step_costs, made.model, stage) for stage in made.stages],
                "schedules": [_described(one, hours) for one in found],
                "proposal": best and _described(best, hours),
            }
        typer.echo(json.dumps(printed, indent=2))
        return
    _print(recipe, made, costs)
    if step_costs is not None:
        _print_forecast(made, step_costs, found, hours, measured is not None)
        if cluster is not None and cluster.gpu in WITHOUT_BF16 and autocast_dtype(made.engine) == "bfloat16":
            print(f"{cluster.gpu} has no bf16: these are hours of fp16; train there with an engine of fp16 or fp32.")
        print(advice(loaded, found, step_costs, hours))


def _refuse_half_descriptions(
    made: Plan, cluster: Cluster | None, measure: bool, describes: bool, measures: bool, hours: float | None
) -> None:
    if measures and not measure:
        raise MsltError("--shards and --workers say what to measure with; add --measure")
    if cluster is None:
        if describes:
            raise MsltError("--gpu and --link-gbps describe a cluster; say with --gpus how many there are")
        if hours is not None and not measure:
            raise MsltError(f"--hours {hours:g}: on which machine? Add --measure, or --gpus, --gpu and --link-gbps")
        return
    where = f"--gpus {cluster.num_gpus}"
    if cluster.gpu is None and not measure:
        raise MsltError(f"{where}: of which kind? Add --gpu ({', '.join(GPUS)}), or --measure on one of them")
    if cluster.gpu is not None and measure:
        raise MsltError(
            f"--gpu {cluster.gpu} and --measure: the one takes figures from a table, the other from here; drop one"
        )
    if cluster.num_gpus > 1 and cluster.link_gbps is None:
        raise MsltError(f"{where}: add --link-gbps, what the slowest link between them carries")
    if made.stages[-1].batch_size % cluster.num_gpus:
        raise MsltError(f"{where}: training.batch_size {made.stages[-1].batch_size} is not a multiple of it")
    if zero_stage(made.engine):
        raise MsltError(f"{where}: communication is foretold for ZeRO-0 alone; take a recipe with a zero0 engine")


def _measured(recipe: str, shards: Path | None, workers: int | None) -> tuple[StepCosts, int]:
    """Costs timed on this machine, and the number of workers they are of."""
    from mslt.launcher import num_workers_here, time_stages_here, with_fastest_micro_batches
    from mslt.preflight import check_recipe

    num_workers = num_workers_here(workers)
    checked = check_recipe(recipe, shards, num_workers)
    probing = probes(checked.plan)
    if checked.recipe.training.micro_batch_size == "auto":
        probing = with_fastest_micro_batches(probing, checked.shards, num_workers)
    costs = fit(probing, medians(time_stages_here(probing, checked.shards, num_workers)))
    return replace(costs, num_loaders=checked.recipe.watch.loader_workers), num_workers


def _described(one: Forecast, hours: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {**vars(one), "schedule": one.schedule.model_dump(mode="json")}
    return found if hours is None else {**found, "steps_in_time": one.steps_in(hours * 3600)}


def _print_forecast(
    made: Plan, costs: StepCosts, found: list[Forecast], hours: float | None, was_measured: bool
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 120)
    stages = Table(title="A step of each stage, milliseconds")
    parts = [step_parts(costs, made.model, stage) for stage in made.stages]
    for heading in ("stage", *parts[0], "step"):
        stages.add_column(heading, justify="right")
    for number, each in enumerate(parts, 1):
        cells = [f"{1000 * value:,.1f}" for value in (*each.values(), sum(each.values()))]
        stages.add_row(str(number), *cells)
    console.print(stages)
    if was_measured and costs.layer_forward:
        console.print(f"A layer's backward pass takes {costs.layer_backward / costs.layer_forward:.2f} forward passes.")
    schedules = Table(title=f"{made.steps:,} steps by each schedule, and what fits into the time of the full one")
    schedules.add_column("schedule")
    headings = ["time", "speedup", "steps in full's time"] + ([f"steps in {hours:g} h"] if hours is not None else [])
    for heading in headings:
        schedules.add_column(heading, justify="right")
    for one in found:
        times = [found[0].total_s] + ([hours * 3600] if hours is not None else [])
        fitting = [f"{one.steps_in(seconds):,}" for seconds in times]
        name = f"{one.name} ({OWN})" if one.is_own and one.name != OWN else one.name
        schedules.add_row(name, duration(one.total_s), f"{one.speedup:.2f}×", *fitting)
    console.print(schedules)


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
            str(number), str(stage.depth), sources_in_words(stage.sources), trainable_in_words(stage),
            f"{stage.steps:,}",
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
