"""Does the engine take the optimizer's step exactly, in every ZeRO stage and on any number of workers?

    python -m benchmarks.engine_exactness OUT [--record FILE] [--worlds 1,2,4] [--zero 0,1,2,3]
                                              [--precisions fp32,bf16,fp16] [--seed 0]

Two stages of a small model, dropout off, in batches that workers share and micro-batches that accumulate, are trained
through the engine with the shipped ds_configs, gradients reduced in fp32. The error of a matrix is that of its update:
|found - expected| over |expected - start|. In fp32 it is held against LAMB in plain torch in one process, in bf16 and
fp16 against the same precision under ZeRO-0 on as many workers. Beside them go: bf16 and fp16 reduced as such, which is
what is shipped (ZeRO-2 and 3 then round in every micro-batch, and workers add up in another order); plain torch, its
sums in another order, which no engine can beat; and a library's LAMB under DeepSpeed's ZeRO-1, which the table must be
able to see. Exit status 1 where an aim is missed. Text and shards are made in OUT; nothing is downloaded.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.record import hardware, heading, table, this_command, write_record
from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from mslt.config import parse_recipe
from mslt.data.loader import Samples
from mslt.data.shards import open_shards
from mslt.engine.ds_config import read_engine_config
from mslt.engine.engine import step_bytes
from mslt.models import factory
from mslt.models.families import FAMILIES, slot_of
from mslt.models.surgery import State
from mslt.plan import Plan, micro_batch_size
from mslt.provenance import provenance
from mslt.schedule import make_plan
from mslt.validation import validate
from tests.distributed.oracle import train_plainly
from tests.distributed.probe import Case, Job, launch, told, weights

STAGES = {"full": 2, "frozen": 1}  # of the plan: all layers train, or the upper two of four with the heads
STEPS = (1, 5)
BATCH_SIZE, MICRO_BATCH_SIZE = 24, 4
FP32_AIM = 2e-5
LOW_PRECISION_AIMS = {0: None, 1: 5e-3, 2: 5e-3, 3: 1e-2}  # by ZeRO stage
VECTORS_AIM = 1e-3  # fp32: Adam's direction without a ratio, over few elements, some of which have next to no gradient
LIBRARY_ERROR = 0.05  # what a library's LAMB under ZeRO-1 must be off by, or the table is blind
# What low precision loses in the reduction.
VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {"reduced_in": None},
    "as shipped, one micro-batch": {"reduced_in": None, "micro_batch_size": BATCH_SIZE},
}


@dataclass(frozen=True)
class Cell:
    """A case of a launch, and what it is held against: another case of it, or plain torch where that is None."""

    table: str
    label: str
    case: Case
    against: str | None = None
    aim: float | None = None
    least: float = 0.0


@dataclass(frozen=True)
class Row:
    """`worst` is the largest error of a matrix's update, and whose, after each of STEPS; `vectors` that of vectors and
    `from_fp32` that from plain LAMB in fp32, both after the last. `faults` are other promises that were broken."""

    cell: Cell
    worst: tuple[tuple[float, str], ...]
    vectors: float
    from_fp32: float
    handed: dict[str, int]
    formula: dict[str, int]
    faults: tuple[str, ...]

    @property
    def missed(self) -> list[str]:
        largest, matrix = max(self.worst)
        missed = list(self.faults)
        if self.cell.aim is not None and not largest < self.cell.aim:
            missed.append(f"{largest:.1e} is over {self.cell.aim:g} ({matrix})")
        if largest < self.cell.least:
            missed.append(f"a known fault shows as no more than {largest:.1e}")
        return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, help="Markdown file to write, beside printing it")
    parser.add_argument("--worlds", default="1,2,4")
    parser.add_argument("--zero", default="0,1,2,3", help="0 always comes along")
    parser.add_argument("--precisions", default="fp32,bf16,fp16")
    parser.add_argument("--seed", type=int, default=0, help="of the weights to start from")
    options = parser.parse_args()
    worlds = [int(world_size) for world_size in options.worlds.split(",")]
    zero_stages = sorted({0, *map(int, options.zero.split(","))})
    precisions = options.precisions.split(",")
    shards = options.out / "shards"
    if not shards.exists():
        sections = {"sources": [{"kind": "python_docs"}], "vocabulary": {"size": 2048}, "validation_share": 0.1}
        prepare(validate(DataRecipe, sections, "shards for exactness"), shards)

    rows = []
    for world_size in worlds:
        folder = options.out / f"world-{world_size}"
        rows += measure(folder, shards, world_size, precisions, zero_stages, options.seed, beside=True)
    missed = [row for row in rows if row.missed]
    lines = heading("Exactness of the engine", this_command(), provenance(), hardware())
    lines += [*explained(), ""]
    if "fp32" in precisions:
        lines += [*noise(options.out, shards, options.seed), ""]
    for precision in precisions:
        lines += [f"## {precision}", "", *errors([row for row in rows if row.cell.table == precision]), ""]
    for precision in (precision for precision in precisions if precision != "fp32"):
        lines += [f"## {precision} as shipped: reduced in {precision}", "", *losses(rows, precision), ""]
    lines += [f"{len(missed)} of {len(rows)} rows MISSED their aim:" if missed else "All aims are held."]
    lines += [f"- {row.cell.table}, {row.cell.label}: {'; '.join(row.missed)}" for row in missed]
    write_record(options.record, lines)
    sys.exit(1 if missed else 0)


def plan_of(engine: str, reduced_in: str | None = "fp32", micro_batch_size: int = MICRO_BATCH_SIZE) -> Plan:
    """Three stages of a small model; its word embeddings are large enough for ZeRO-3 to partition them. `engine` is
    shipped; `reduced_in` replaces the type that gradients are reduced in, None keeps it."""
    sections = {
        "model": {
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 2048,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "data": {"shards": "given", "max_predictions": 5},
        "schedule": {"name": "mslt", "k": 2, "steps": 60, "retrain_share": 1 / 3},
        "training": {"sequence_length": 32, "batch_size": BATCH_SIZE, "micro_batch_size": micro_batch_size},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 5},
        "engine": engine,
    }
    recipe = parse_recipe(sections, "recipe for exactness")
    config = read_engine_config(recipe.engine)
    return make_plan(recipe, config if reduced_in is None else {**config, "communication_data_type": reduced_in})


def measure(
    folder: Path,
    shards: Path,
    world_size: int,
    precisions: list[str],
    zero_stages: list[int],
    seed: int = 0,
    beside: bool = False,
) -> list[Row]:
    """All cells of a world, in one launch; `zero_stages` holds 0. With what goes `beside`: variants and a library."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in STAGES:
        save_file(base_of(kind, seed), folder / f"base-{kind}.safetensors")
    cells = []
    for precision, zero, kind in product(precisions, zero_stages, STAGES):
        case = case_of(folder, f"{precision}-zero{zero}-{kind}", plan_of(f"zero{zero}_{precision}"), kind)
        against = None if precision == "fp32" else f"{precision}-zero0-{kind}"
        aim = FP32_AIM if precision == "fp32" else LOW_PRECISION_AIMS[zero]
        cells.append(Cell(precision, f"{world_size}, ZeRO-{zero}, {kind}", case, against, aim))
    if beside and "fp32" in precisions and world_size == 2:
        for zero, least in ((0, 0.0), (1, LIBRARY_ERROR)):
            case = case_of(folder, f"library-zero{zero}", plan_of(f"zero{zero}_fp32"), "full", through="deepspeed")
            cells.append(
                Cell("fp32", f"library's LAMB, 2, ZeRO-{zero}, full", case, None, None if zero else FP32_AIM, least)
            )
    low = [precision for precision in precisions if precision != "fp32"] if beside else []
    for precision, (name, changes), zero, kind in product(low, VARIANTS.items(), zero_stages, STAGES):
        reference = f"{precision}-{name}-zero0-{kind}"
        plan = plan_of(f"zero{zero}_{precision}", **changes)
        case = case_of(folder, f"{precision}-{name}-zero{zero}-{kind}", plan, kind)
        cells.append(Cell(f"{precision}, {name}", f"{world_size}, ZeRO-{zero}, {kind}", case, reference))
    job = Job(folder=folder, shards=shards, cases=tuple(cell.case for cell in cells))
    launch(job, world_size, timeout_s=1200)
    plainly = {kind: plain_weights(shards, kind, seed) for kind in STAGES}
    return [row_of(job, cell, world_size, plainly) for cell in cells]


def base_of(kind: str, seed: int) -> State:
    plan = plan_of("zero0_fp32")
    return factory.initial_state(plan.model, plan.stages[STAGES[kind]].depth, seed)


def case_of(folder: Path, name: str, plan: Plan, kind: str, **options: Any) -> Case:
    base, stage_index = folder / f"base-{kind}.safetensors", STAGES[kind]
    return Case(name=name, plan=plan, stage_index=stage_index, base=base, write_after=STEPS, **options)


def plain_weights(shards: Path, kind: str, seed: int, micro_batch_size: int | None = None) -> list[State]:
    """After each of STEPS, of LAMB in plain torch."""
    plan, stage_index = plan_of("zero0_fp32"), STAGES[kind]
    stage = plan.stages[stage_index]
    samples = Samples(open_shards(shards, "train"), plan.data, stage.sequence_length, stage.seed)
    return train_plainly(plan, stage_index, base_of(kind, seed), samples, STEPS, micro_batch_size)


def row_of(job: Job, cell: Cell, world_size: int, plainly: dict[str, list[State]]) -> Row:
    case = cell.case
    stage, base = case.plan.stages[case.stage_index], load_file(case.base)
    kind = next(kind for kind, stage_index in STAGES.items() if stage_index == case.stage_index)
    found = [weights(job, case.name, steps) for steps in STEPS]
    in_fp32 = plainly[kind]
    expected = in_fp32 if cell.against is None else [weights(job, cell.against, steps) for steps in STEPS]
    trained = [name for name in base if slot_of(FAMILIES["bert"], name) in stage.trainable]
    matrices, vectors = split(base, trained)
    worst = tuple(worst_of(f, e, base, matrices) for f, e in zip(found, expected, strict=True))
    off_vectors, _ = worst_of(found[-1], expected[-1], base, vectors)
    from_fp32, _ = worst_of(found[-1], in_fp32[-1], base, matrices)
    if case.through == "deepspeed":
        return Row(cell, worst, off_vectors, from_fp32, {}, {}, ())

    ranks = [told(job, case.name, rank) for rank in range(world_size)]
    num_micro_batches = stage.batch_size // world_size // micro_batch_size(stage, world_size)
    formula = step_bytes(case.plan.engine, [base[name].numel() for name in trained], world_size, num_micro_batches)
    faults = []
    if ranks[0]["trained"] != sorted(trained):
        faults.append("optimized other parameters than the plan trains")
    frozen = {name: found[-1][name] for name in base.keys() - set(trained)}  # held in the type that is computed with
    if not all(tensor.equal(base[name].to(tensor.dtype)) for name, tensor in frozen.items()):
        faults.append("moved frozen weights")
    if any(rank["digests"] != ranks[0]["digests"] for rank in ranks):
        faults.append("ranks came to different weights")
    if any(
        handed.get(name, 0) != size for rank in ranks for handed in rank["handed"] for name, size in formula.items()
    ):
        faults.append("handed other bytes than the formula's in a step")
    if cell.table == "fp32" and not off_vectors < VECTORS_AIM:
        faults.append(f"vectors are off by {off_vectors:.1e}, over {VECTORS_AIM:g}")
    return Row(cell, worst, off_vectors, from_fp32, ranks[0]["handed"][-1], formula, tuple(faults))


def split(base: State, trained: list[str]) -> tuple[list[str], list[str]]:
    """Matrices, which decay and have a trust ratio, and vectors. A bias of the keys moves no softmax: its true gradient
    is 0, and what Adam makes of the rounding is no number to compare."""
    vectors = [name for name in trained if base[name].ndim < 2 and not name.endswith("attention.self.key.bias")]
    return [name for name in trained if base[name].ndim > 1], vectors


def worst_of(found: State, expected: State, base: State, names: list[str]) -> tuple[float, str]:
    """Largest error of an update, and whose it is."""
    errors = []
    for name in names:
        update = expected[name].double() - base[name].double()
        errors.append((((found[name].double() - expected[name].double()).norm() / update.norm()).item(), name))
    return max(errors)


def explained() -> list[str]:
    plan = plan_of("zero0_fp32")
    base = base_of("full", 0)
    counts = {}
    for kind, stage_index in STAGES.items():
        trained = [name for name in base if slot_of(FAMILIES["bert"], name) in plan.stages[stage_index].trainable]
        counts[kind] = len(split(base, trained)[0])
    model = plan.model
    return [
        f"BERT of {model.num_hidden_layers} layers of {model.hidden_size}, vocabulary of {model.vocab_size}, LAMB, "
        f"clipped to norm {plan.clip_norm:g}, batches of {BATCH_SIZE} in micro-batches of up to {MICRO_BATCH_SIZE}, "
        "dropout off, gloo, one thread a worker. `full` trains everything, `frozen` the upper two layers and heads.",
        "",
        f"An error is |found - expected| / |expected - start| of one matrix; the largest over all {counts['full']} "
        f"({counts['frozen']}) trainable ones is shown: embeddings of words (also the MLM decoder), positions, types; "
        "query, key, value, output and both dense layers of each layer; pooler; the MLM transform; the NSP head. These "
        "decay and have a trust ratio. Vectors (biases, LayerNorms) do neither; theirs is shown for fp32, without "
        "attention.self.key.bias, whose true gradient is 0. bf16 and fp16 are held against their own ZeRO-0 on as many "
        "workers; how far they are from LAMB in fp32 is shown beside it.",
        "",
        "Bytes are what DeepSpeed handed to collectives in a step, beside the engine's `step_bytes`; where they differ "
        "in a step on a rank, the row is missed. ZeRO-3 gathers weights as the forward pass comes to them, without a "
        "formula; its last step is shown.",
    ]


def noise(folder: Path, shards: Path, seed: int) -> list[str]:
    """The oracle against itself, its sums in another order."""
    found = []
    for kind in STAGES:
        base, at_once = base_of(kind, seed), plain_weights(shards, kind, seed)
        in_parts = plain_weights(shards, kind, seed, MICRO_BATCH_SIZE)
        matrices, _ = split(base, [name for name in base if not at_once[-1][name].equal(base[name])])
        worst = [worst_of(f, e, base, matrices)[0] for f, e in zip(in_parts, at_once, strict=True)]
        found.append(f"{worst[0]:.1e} and {worst[1]:.1e} ({kind})")
    return [
        "What no engine can beat: plain torch in one process, its batch in micro-batches beside its batch at once, is "
        f"off by {', '.join(found)} after {STEPS[0]} and {STEPS[1]} steps. In LAMB's first step every element moves by "
        "about the same, whatever its gradient; where that is next to 0, rounding decides the direction."
    ]


def errors(rows: list[Row]) -> list[str]:
    """Errors and bytes of one precision."""
    lines: list[list[str]] = []
    for row in rows:
        (first, _), (last, _) = row.worst
        matrix = max(row.worst)[1].removeprefix("bert.").removesuffix(".weight")
        aim = f"over {row.cell.least:g}" if row.cell.least else "" if row.cell.aim is None else f"{row.cell.aim:g}"
        verdict = "MISSED" if row.missed else "held" if aim else ""
        other = row.vectors if row.cell.table == "fp32" else row.from_fp32
        bytes_ = [f"{of.get(name, '-')}" for name in collectives(row) for of in (row.handed, row.formula)]
        lines.append([row.cell.label, f"{first:.1e}", f"{last:.1e}", aim, verdict, matrix, f"{other:.1e}", *bytes_])
    beside = "vectors after 5" if rows[0].cell.table == "fp32" else "from fp32 after 5"
    columns = ["workers, ZeRO, trains", "after 1 step", "after 5", "aim", "", "worst matrix", beside]
    return table([*columns, "reduced B", "formula", "gathered B", "formula"], lines)


def collectives(row: Row) -> tuple[str, str]:
    """What reduces gradients and what gathers weights."""
    return "reduce_scatter_tensor" if "reduce_scatter_tensor" in row.formula else "all_reduce", "all_gather_into_tensor"


def losses(rows: list[Row], precision: str) -> list[str]:
    """How far low precision, reduced as such, is from its own ZeRO-0 and from LAMB in fp32."""
    found = {
        name: {row.cell.label: row for row in rows if row.cell.table == f"{precision}, {name}"} for name in VARIANTS
    }
    lines = []
    for label in found["as shipped"]:
        variants = [found[name][label] for name in VARIANTS]
        own = [" → ".join(f"{error:.1e}" for error, _ in row.worst) for row in variants]
        lines.append([label, *own, *(f"{row.from_fp32:.1e}" for row in variants)])
    columns = [f"{name}: from {of}" for of in ("its own ZeRO-0", "LAMB in fp32") for name in VARIANTS]
    return ["After 1 → 5 steps, and after 5. Without aims.", "", *table(["workers, ZeRO, trains", *columns], lines)]


if __name__ == "__main__":
    main()
