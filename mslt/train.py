"""Run the plan: stage after stage, each from its base on disk to its model folder. The only loop.

stage base → fresh module → freeze → engine → (newest checkpoint) → steps → model folder → DONE
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mslt.config import WatchConfig
from mslt.data import keyed
from mslt.data.loader import EVALUATION_SEED, Samples, evaluation_batches, training_batches
from mslt.data.shards import Shards, open_shards
from mslt.engine import checkpoint
from mslt.engine.engine import Engine, Workers
from mslt.errors import MsltError
from mslt.files import sha256_file, write_json
from mslt.models import factory
from mslt.models.checkpoint import load_state, save_base, save_model_folder
from mslt.models.families import FAMILIES
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.freezing import freeze
from mslt.models.surgery import State, rebuild
from mslt.plan import Plan, lowest_graph_layer
from mslt.provenance import provenance
from mslt.rundir import RunDir
from mslt.schedule import lr_at
from mslt.watch import Watch


@dataclass(frozen=True)
class Job:
    """All that a stage needs to know besides its number."""

    plan: Plan
    run: RunDir
    watch: WatchConfig
    training: Shards
    heldout: Shards
    workers: Workers


@dataclass
class Progress:
    """How far a stage is, and what a resumed one must know of its past: seconds by kind (`train` is the step loop,
    its parts beside it, `evaluation`, `checkpoint`) and the held-out means before its first step and lately."""

    step: int = 0
    spent_s: dict[str, float] = field(default_factory=dict)
    evaluation_before: dict[str, float] = field(default_factory=dict)
    evaluation_after: dict[str, float] = field(default_factory=dict)

    def spend(self, kind: str, seconds: float) -> None:
        self.spent_s[kind] = self.spent_s.get(kind, 0.0) + seconds


def train(plan: Plan, run: RunDir, shards: Path, watch: WatchConfig, workers: Workers) -> None:
    """Run every stage that is not DONE. All ranks call this; the run directory is shared between them."""
    job = Job(plan, run, watch, open_shards(shards, "train"), open_shards(shards, "validation"), workers)
    while (stage_index := workers.broadcast(run.first_unfinished(plan))) is not None:
        run_stage(job, stage_index)


def run_stage(job: Job, stage_index: int) -> None:
    """Start, growth and resume alike: read the base, build, freeze, initialise, load what there is, go on."""
    plan, workers = job.plan, job.workers
    stage, where = plan.stages[stage_index], job.run.stage(stage_index)
    if workers.rank == 0:
        _ensure_base(job, stage_index)
    workers.barrier()

    model = factory.build(plan.model, stage.depth, load_state(where.base))
    freeze(model, stage.trainable)
    still = () if stage.frozen_dropout else stage.frozen
    boundary = lowest_graph_layer(stage.trainable, stage.depth)
    module = PretrainingLoss(model, boundary, still, plan.data.next_sentence_prediction)
    engine = Engine(module, stage, plan.first_step(stage_index), plan.optimizer, plan.clip_norm, plan.engine, workers)
    progress = _resume(job, stage_index, engine)
    watcher = Watch(plan, job.run, stage_index, progress.step) if workers.rank == 0 else None
    try:
        _steps(job, stage_index, engine, progress, watcher)
    finally:
        if watcher is not None:
            watcher.close()
    if workers.rank == 0:
        _finish(job, stage_index, engine, progress)
    engine.close()
    workers.barrier()


def _ensure_base(job: Job, stage_index: int) -> None:
    """Make the stage base from the model of the stage before, or check the one that is there. Rank 0 only."""
    plan, stage, where = job.plan, job.plan.stages[stage_index], job.run.stage(stage_index)
    if where.base_description.exists():
        if sha256_file(where.base) != json.loads(where.base_description.read_text())["sha256"]:
            raise MsltError(f"{where.base}: does not have the sha256 in {where.base_description.name}; delete both, "
                            "they are made anew from the stage before")  # fmt: skip
        return
    before: State = {}
    origin: dict[str, Any] = {"plan": plan.digest(), "stage": stage_index + 1, "sources": stage.sources}
    if stage_index:
        parent = job.run.stage(stage_index - 1).model
        before = factory.own_state(factory.read_model(parent))
        origin["parent"] = str(parent.relative_to(job.run.path))
    fresh = None
    if "random" in stage.sources:
        seed = keyed.torch_seed(stage.seed, "initialise", stage_index)
        fresh = factory.initial_state(plan.model, stage.depth, seed)
    grown = rebuild(before, stage.sources, FAMILIES[plan.model.family], fresh)
    save_base(where.base, where.base_description, grown, origin)


def _resume(job: Job, stage_index: int, engine: Engine) -> Progress:
    """Load the newest valid checkpoint, chosen by rank 0, into the engine. Returns what was done so far."""
    where = job.run.stage(stage_index)
    chosen = None
    if job.workers.rank == 0:
        base_sha256 = json.loads(where.base_description.read_text())["sha256"]
        chosen, passed_over = checkpoint.newest_valid(where.checkpoints, base_sha256)
        for line in passed_over:
            print(f"warning: {line}", file=sys.stderr)
        if chosen is not None:
            print(f"resuming stage {stage_index + 1} at step {chosen.step} from {chosen.path}", file=sys.stderr)
    chosen = job.workers.broadcast(chosen)
    if chosen is None:
        return Progress()
    engine.load(chosen.tensors(), chosen.manifest["engine"])
    engine.reduced_bytes = chosen.manifest["reduced_bytes"]
    return Progress(**chosen.manifest["progress"])


def _steps(job: Job, stage_index: int, engine: Engine, progress: Progress, watcher: Watch | None) -> None:
    """The step loop, from `progress` to the end of the stage."""
    stage, workers, watch = job.plan.stages[stage_index], job.workers, job.watch
    run_steps, run_s = job.plan.first_step(stage_index), _seconds_before(job, stage_index)
    samples = Samples(job.training, job.plan.data, stage.sequence_length, stage.seed)
    heldout = Samples(job.heldout, job.plan.data, stage.sequence_length, EVALUATION_SEED)
    if progress.step == 0:
        progress.evaluation_before = _evaluate(job, stage_index, engine, heldout, progress, watcher)
    batches = training_batches(samples, stage, workers.rank, workers.size, progress.step, watch.loader_workers)
    sums, since_log, logged = torch.zeros(len(SUMS), device=workers.device), 0, time.perf_counter()
    while progress.step < stage.steps:
        with engine.clock.span("data"):
            batch = next(batches)
        rate = lr_at(stage, progress.step)
        sums += engine.train_step(batch, progress.step, rate)
        progress.step, since_log = progress.step + 1, since_log + 1
        if watcher is not None:
            watcher.advance(progress.step)

        at_end = progress.step == stage.steps
        must_evaluate = at_end or (watch.evaluate_every > 0 and progress.step % watch.evaluate_every == 0)
        must_save = progress.step % watch.checkpoint_every == 0 and not at_end
        if not (must_evaluate or must_save or progress.step % watch.log_every == 0):
            continue
        means = _means(workers.sum(sums))
        _refuse_divergence(means, stage_index, progress.step, job.run)
        seconds = time.perf_counter() - logged
        for kind, kind_s in {"train": seconds, **engine.clock.take()}.items():
            progress.spend(kind, kind_s)
        if watcher is not None:
            watcher.log(
                {
                    "kind": "train",
                    "stage": stage_index + 1,
                    "step": run_steps + progress.step,
                    "samples": stage.first_sample + progress.step * stage.batch_size,
                    **means,
                    "learning_rate": rate,
                    **engine.scalars(),
                    "train_s": run_s + progress.spent_s["train"],
                    "samples_per_s": since_log * stage.batch_size / seconds,
                }
            )
        sums.zero_()
        if must_evaluate:
            progress.evaluation_after = _evaluate(job, stage_index, engine, heldout, progress, watcher)
        if must_save:
            _save(job, stage_index, engine, progress)
        since_log, logged = 0, time.perf_counter()


def _means(sums: torch.Tensor) -> dict[str, float]:
    """Means and accuracies of SUMS, as a record's fields; none of a head that predicted nothing."""
    by_name = dict(zip(SUMS, sums.double().tolist(), strict=True))
    means = {}
    for head in ("mlm", "nsp"):
        if count := by_name[f"{head}_count"]:
            means[f"{head}_loss"] = by_name[f"{head}_loss"] / count
            means[f"{head}_accuracy"] = by_name[f"{head}_correct"] / count
    return means


def _refuse_divergence(means: dict[str, float], stage_index: int, step: int, run: RunDir) -> None:
    if not all(map(math.isfinite, means.values())):
        raise MsltError(
            f"the loss is no longer finite at step {step} of stage {stage_index + 1} (checkpoints before it: "
            f"{run.stage(stage_index).checkpoints}). Lower optimizer.learning_rate or lengthen optimizer.warmup_steps, "
            "and start a new run directory"
        )


def _evaluate(
    job: Job, stage_index: int, engine: Engine, heldout: Samples, progress: Progress, watcher: Watch | None
) -> dict[str, float]:
    """Held-out means at fixed samples and masks, logged."""
    started = time.perf_counter()
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=job.workers.device)
    for batch in evaluation_batches(heldout, engine.micro_batch_size, job.workers.rank, job.workers.size):
        sums += engine.evaluate_step(batch)
    means = _means(job.workers.sum(sums))
    progress.spend("evaluation", time.perf_counter() - started)
    if watcher is not None:
        run_step = job.plan.first_step(stage_index) + progress.step
        watcher.log({"kind": "evaluation", "stage": stage_index + 1, "step": run_step, **means})
    return means


def _save(job: Job, stage_index: int, engine: Engine, progress: Progress) -> None:
    """Commit a checkpoint of the present state."""
    started = time.perf_counter()
    if job.workers.rank == 0:
        where = job.run.stage(stage_index)
        tensors, numbers = engine.save()
        about = {
            "base_sha256": json.loads(where.base_description.read_text())["sha256"],
            "plan": job.plan.digest(),
            "stage": stage_index + 1,
            "world_size": job.workers.size,
            "engine": numbers,
            "reduced_bytes": engine.reduced_bytes,
            "progress": asdict(progress),
        }
        checkpoint.commit(where.checkpoints, progress.step, tensors, about)
    job.workers.barrier()
    progress.spend("checkpoint", time.perf_counter() - started)


def _finish(job: Job, stage_index: int, engine: Engine, progress: Progress) -> None:
    """Write the model folder, then the summary that says DONE. Rank 0 only."""
    stage, where = job.plan.stages[stage_index], job.run.stage(stage_index)
    origin = {
        "plan": job.plan.digest(),
        "stage": stage_index + 1,
        "samples": stage.first_sample + stage.steps * stage.batch_size,
        "parent": str(where.base.relative_to(job.run.path)),
        **provenance(),
    }
    model = factory.build(job.plan.model, stage.depth, engine.export_state())
    save_model_folder(where.model, model, job.training.tokenizer_folder, origin)
    summary = {
        "stage": stage_index + 1,
        "depth": stage.depth,
        "trainable_parameters": sum(p.numel() for p in engine.trainable().values()),
        "steps": stage.steps,
        "samples": stage.steps * stage.batch_size,
        "world_size": job.workers.size,
        "evaluation_before": progress.evaluation_before,
        "evaluation_after": progress.evaluation_after,
        "spent_s": {name: round(seconds, 3) for name, seconds in progress.spent_s.items()},
        "reduced_bytes": engine.reduced_bytes,
    }
    write_json(where.summary, summary)


def _seconds_before(job: Job, stage_index: int) -> float:
    """Training time of all stages before."""
    summaries = (job.run.stage(index).summary for index in range(stage_index))
    return float(sum(json.loads(summary.read_text())["spent_s"]["train"] for summary in summaries))
