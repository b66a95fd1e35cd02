"""Run the plan: stage after stage, each from its base on disk to its model folder. The only loop.

stage base → fresh module → freeze → engine → (newest checkpoint) → steps → model folder → DONE
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from mslt import metrics
from mslt.config import WatchConfig
from mslt.data import keyed
from mslt.data.loader import EVALUATION_SEED, Batch, Samples, evaluation_batches, training_batches
from mslt.data.shards import Shards, open_shards
from mslt.engine import checkpoint
from mslt.engine.ds_config import remarks, zero_stage
from mslt.engine.engine import Engine, Workers
from mslt.engine.optimizer import STATE
from mslt.errors import MsltError
from mslt.files import sha256_file, wait_until_seen, write_json, write_text
from mslt.logs import LOG
from mslt.model_card import Evaluations, model_card
from mslt.models import dropout, factory
from mslt.models.checkpoint import load_state, save_base, save_model_folder
from mslt.models.compiling import why_no_compiler
from mslt.models.families import FAMILIES, slot_of
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.forward import means as means_of
from mslt.models.freezing import freeze
from mslt.models.int8 import quantize_layers
from mslt.models.surgery import State, rebuild
from mslt.plan import Plan, autocast_dtype, lowest_graph_layer
from mslt.provenance import cpu_name, provenance
from mslt.rundir import RunDir
from mslt.schedule import lr_at
from mslt.watch import Watch

EXPLODED = 2.0  # times the loss of a model that knows nothing


@dataclass(frozen=True)
class Job:
    """All that a stage needs to know besides its number. `wants_to_stop` says whether this rank was told to leave; `at`
    is told what it begins."""

    plan: Plan
    run: RunDir
    watch: WatchConfig
    training: Shards
    heldout: Shards
    workers: Workers
    writer: checkpoint.Writer
    wants_to_stop: Callable[[], bool]
    at: Callable[[str], None] = lambda doing: None


@dataclass
class Progress:
    """How far a stage is, and what a resumed one must know of its past: seconds by kind and the held-out means before
    its first step and lately. `train` is the step loop, its parts beside it; then `log`, `evaluation`, `checkpoint`
    (what the loop waits for); `start`, from the last summary or the begin of training to the first batch; and `finish`,
    from the last step to the summary."""

    step: int = 0
    spent_s: dict[str, float] = field(default_factory=dict)
    evaluation_before: dict[str, float] = field(default_factory=dict)
    evaluation_after: dict[str, float] = field(default_factory=dict)

    def spend(self, kind: str, seconds: float) -> None:
        self.spent_s[kind] = self.spent_s.get(kind, 0.0) + seconds


def train(
    plan: Plan,
    run: RunDir,
    shards: Path,
    watch: WatchConfig,
    workers: Workers,
    wants_to_stop: Callable[[], bool],
    at: Callable[[str], None] = lambda doing: None,
) -> bool:
    """Run every stage that is not DONE. All ranks call this; the run directory is shared between them.

    Returns early, after a checkpoint, when a rank is told to leave, and says whether one was; and with ZeRO-3 after
    every stage: its partitioned module cannot be let go of, so a new launch takes the next one.
    """
    training, heldout = (open_shards(shards, split) for split in ("train", "validation"))
    plan = compilable(plan, workers)
    job = Job(plan, run, watch, training, heldout, workers, checkpoint.Writer(workers.rank), wants_to_stop, at)
    if workers.rank == 0:
        run.diverged.unlink(missing_ok=True)  # it may go on now: more bad batches may be borne
        for line in remarks(plan, workers.size):
            LOG.warning(f"warning: {line}")
    free_since, leaves = time.perf_counter(), False
    while (stage_index := workers.broadcast(run.first_unfinished(plan) if workers.rank == 0 else None)) is not None:
        free_since = run_stage(job, stage_index, free_since)
        leaves = any(workers.gather(wants_to_stop()))
        if leaves or zero_stage(plan.engine) == 3:
            break
    job.writer.close()
    return leaves


def compilable(plan: Plan, workers: Workers) -> Plan:
    """The plan, without compiled layers where a worker cannot make them. All ranks call this."""
    if plan.compile == "none":
        return plan
    for rank, why in enumerate(workers.gather(why_no_compiler(workers.device.type))):
        if why is not None:
            if workers.rank == 0:
                LOG.warning(f"warning: layers are not compiled: torch.compile fails on rank {rank} ({why})")
            return plan.model_copy(update={"compile": "none"})
    return plan


def build_module(plan: Plan, stage_index: int, base: State) -> PretrainingLoss:
    """The stage's model from its base, frozen, with its loss: a fresh module."""
    stage = plan.stages[stage_index]
    model = factory.build(plan.model, stage.depth, base)
    dropout.install(model)
    freeze(model, stage.trainable)
    lowest = lowest_graph_layer(stage.trainable, stage.depth)
    if stage.frozen_precision == "int8":
        quantize_layers(model, max(lowest, 0))
    still = () if stage.frozen_dropout else stage.frozen
    dtype = autocast_dtype(plan.engine)
    return PretrainingLoss(
        model,
        lowest,
        still,
        plan.data.next_sentence_prediction,
        None if dtype is None else getattr(torch, dtype),
    )


def run_stage(job: Job, stage_index: int, free_since: float) -> float:
    """Start, growth and resume alike: read the base, build, freeze, initialise, load what there is, go on. What came
    before was over at `free_since`; returns when this was."""
    plan, workers = job.plan, job.workers
    where = job.run.stage(stage_index)
    job.at(f"stage {stage_index + 1}, starting")
    chosen = workers.broadcast(_ensure_start(job, stage_index) if workers.rank == 0 else None)
    for written in (where.base, where.base if chosen is None else chosen.path):
        wait_until_seen(written.exists)
    engine = Engine(build_module(plan, stage_index, load_state(where.base)), plan, stage_index, workers)
    progress = _resume(job, stage_index, engine, chosen)
    if workers.rank == 0:
        _note_start(job, stage_index, progress.step)
    watcher = Watch(plan, job.run, stage_index, progress.step) if workers.rank == 0 else None
    try:
        _steps(job, stage_index, engine, progress, watcher, free_since)
    finally:
        if watcher is not None:
            watcher.close()
    loop_ended = time.perf_counter()
    job.at(f"stage {stage_index + 1}, finishing")
    job.writer.wait()
    if progress.step == plan.stages[stage_index].steps:
        _finish(job, stage_index, engine, progress, loop_ended)
    finished = time.perf_counter()
    engine.close()
    workers.barrier()
    return finished


def _note_start(job: Job, stage_index: int, step: int) -> None:
    """A line in starts.jsonl, before what was logged behind `step` is dropped: these steps are taken again."""
    begun_at = job.plan.first_step(stage_index) + step
    logged = max((record["step"] for record in metrics.read(job.run.metrics)), default=0)
    device, versions = job.workers.device, provenance()
    line = json.dumps(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "stage": stage_index + 1,
            "step": begun_at,
            "steps_again": max(logged - begun_at, 0),
            "workers": job.workers.size,
            "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "mslt": versions["mslt"],
            "commit": versions["commit"],
        }
    )
    before = job.run.starts.read_text() if job.run.starts.exists() else ""
    write_text(job.run.starts, f"{before}{line}\n")


def _ensure_start(job: Job, stage_index: int) -> checkpoint.Checkpoint | None:
    """Make the stage base from the model of the stage before, or check the one that is there. Returns the newest valid
    checkpoint; where there is none, what the stage before hands over, if it does. Rank 0 only."""
    plan, stage, where = job.plan, job.plan.stages[stage_index], job.run.stage(stage_index)
    if where.base_description.exists():
        if sha256_file(where.base) != json.loads(where.base_description.read_text())["sha256"]:
            raise MsltError(f"{where.base}: does not have the sha256 in {where.base_description.name}; delete both, "
                            "they are made anew from the stage before")  # fmt: skip
    else:
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
    chosen, passed_over = _newest_checkpoint(job, stage_index)
    for line in passed_over:
        LOG.warning(f"warning: {line}")
    if chosen is None and stage_index:
        _hand_over(job, stage_index)
        chosen, _ = _newest_checkpoint(job, stage_index)
    return chosen


def _hand_over(job: Job, stage_index: int) -> None:
    """Commit checkpoint 0 of the stage: what its optimizer takes over from the end of the stage before. In fp16 the
    loss scale; where the plan carries them the moments, each layer's from the layer that it is a copy of."""
    plan, stage = job.plan, job.plan.stages[stage_index]
    if stage.optimizer_state == "reset" and autocast_dtype(plan.engine) != "float16":
        return
    parent = job.run.stage(stage_index - 1)
    last, passed_over = _newest_checkpoint(job, stage_index - 1)
    if last is None or last.step != plan.stages[stage_index - 1].steps:
        lost = "; ".join(passed_over) or f"{parent.checkpoints}: holds no checkpoint of its last step"
        if stage.optimizer_state == "carry":
            raise MsltError(
                f"stage {stage_index + 1} carries the optimizer's state of the stage before, and that is lost "
                f"({lost}); delete {parent.summary} and {job.run.stage(stage_index).path}, and the same command takes "
                "the last steps of the stage before again"
            )
        LOG.warning(f"warning: the loss scale starts anew in stage {stage_index + 1} ({lost})")
        return
    tensors = {}
    if stage.optimizer_state == "carry":
        family, sizes = FAMILIES[plan.model.family], {n: t.numel() for n, t in load_state(parent.base).items()}
        with last.open() as shares:
            for kind in (*STATE, "step"):
                held = shares.whole(kind)  # not of what was frozen: that starts at 0
                before = {name: held.get(name, torch.zeros(1 if kind == "step" else sizes[name])) for name in sizes}
                for name, tensor in rebuild(before, stage.sources, family, fresh={}).items():
                    if slot_of(family, name) in stage.trainable:
                        tensors[f"{kind}/{name}/0"] = tensor
    scale = {key: value for key, value in last.manifest["engine"].items() if key == "loss_scale"}
    about = _about(job, stage_index, scale, Progress())
    checkpoint.commit(job.run.stage(stage_index).checkpoints, 0, tensors, about)


def _base_sha256(job: Job, stage_index: int) -> str:
    return str(json.loads(job.run.stage(stage_index).base_description.read_text())["sha256"])


def _newest_checkpoint(job: Job, stage_index: int) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    folder = job.run.stage(stage_index).checkpoints
    return checkpoint.newest_valid(folder, _base_sha256(job, stage_index), job.plan.digest())


def _about(job: Job, stage_index: int, engine_numbers: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What a checkpoint's manifest says besides its files."""
    return {
        "base_sha256": _base_sha256(job, stage_index),
        "plan": job.plan.digest(),
        "stage": stage_index + 1,
        "world_size": job.workers.size,
        "engine": engine_numbers,
        "progress": asdict(progress),
    }


def _resume(job: Job, stage_index: int, engine: Engine, chosen: checkpoint.Checkpoint | None) -> Progress:
    """Load the checkpoint that rank 0 has chosen into the engine. Returns what was done so far."""
    if chosen is None:
        return Progress()
    if chosen.step and job.workers.rank == 0:
        LOG.info(f"resuming stage {stage_index + 1} at step {chosen.step} from {chosen.path}")
    with chosen.open() as shares:
        engine.load(shares.read, chosen.manifest["engine"])
    return Progress(**chosen.manifest["progress"])


def _steps(
    job: Job, stage_index: int, engine: Engine, progress: Progress, watcher: Watch | None, free_since: float
) -> None:
    """The step loop, from `progress` to the end of the stage, or to where a rank wants to stop."""
    stage, workers, watch = job.plan.stages[stage_index], job.workers, job.watch
    run_steps, run_s = job.plan.first_step(stage_index), _seconds_before(job, stage_index)
    samples = Samples(job.training, job.plan.data, stage.sequence_length, stage.seed)
    heldout = Samples(job.heldout, job.plan.data, stage.sequence_length, EVALUATION_SEED)
    batches = training_batches(samples, stage, workers.rank, workers.size, progress.step, watch.loader_workers)
    progress.spend("start", time.perf_counter() - free_since)
    if progress.step == 0:
        progress.evaluation_before = _evaluate(job, stage_index, engine, heldout, progress, watcher)
    sums, since_log, logged = torch.zeros(len(SUMS), device=workers.device), 0, time.perf_counter()
    at_end = must_stop = False
    upcoming = _next_batch(engine, batches)
    while upcoming is not None and not must_stop:
        batch, upcoming = upcoming, _next_batch(engine, batches)
        rate = lr_at(stage, progress.step)
        job.at(f"stage {stage_index + 1}, step {progress.step + 1}")
        sums += engine.train_step(batch, progress.step, rate, job.wants_to_stop(), upcoming)
        progress.step, since_log = progress.step + 1, since_log + 1
        if watcher is not None:
            watcher.advance(progress.step)
        _refuse_bad_batches(job, stage_index, engine, progress)
        job.writer.raise_if_failed()

        must_stop, at_end = engine.someone_wants_to_stop(), progress.step == stage.steps
        must_evaluate = at_end or (watch.evaluate_every > 0 and progress.step % watch.evaluate_every == 0)
        must_save = at_end or must_stop or progress.step % watch.checkpoint_every == 0
        if not (must_evaluate or must_save or progress.step % watch.log_every == 0):
            continue
        means, scalars = means_of(workers.sum(sums)), engine.scalars()
        _refuse_divergence(job, stage_index, progress.step, means, scalars)
        seconds = time.perf_counter() - logged
        for kind, kind_s in {"train": seconds, **engine.clock.take()}.items():
            progress.spend(kind, kind_s)
        log_began = time.perf_counter()
        if watcher is not None and means:
            watcher.log(
                {
                    "kind": "train",
                    "stage": stage_index + 1,
                    "step": run_steps + progress.step,
                    "samples": stage.first_sample + progress.step * stage.batch_size,
                    **means,
                    "learning_rate": rate,
                    **{name: value for name, value in scalars.items() if math.isfinite(value)},
                    "train_s": run_s + progress.spent_s["train"],
                    "samples_per_s": since_log * stage.batch_size / seconds,
                }
            )
        progress.spend("log", time.perf_counter() - log_began)
        sums.zero_()
        if must_evaluate:
            progress.evaluation_after = _evaluate(job, stage_index, engine, heldout, progress, watcher)
        if must_save:
            _save(job, stage_index, engine, progress)
        since_log, logged = 0, time.perf_counter()


def _next_batch(engine: Engine, batches: Iterator[Batch]) -> Batch | None:
    with engine.clock.span("data"):
        return next(batches, None)


def _refuse_divergence(
    job: Job, stage_index: int, step: int, means: dict[str, float], scalars: dict[str, float]
) -> None:
    """MsltError where training cannot be saved any more. Called before a checkpoint, so that those there are good."""
    found = None
    unlearned = math.log(job.plan.model.vocab_size)
    if not all(map(math.isfinite, means.values())):
        found = "the loss is no longer finite"
    elif not math.isfinite(scalars["gradient_norm"]) and "loss_scale" not in scalars and not job.plan.skip_bad_batches:
        found = "the gradient is no longer finite"
    elif scalars.get("loss_scale", 1.0) < 1.0:
        found = f"the loss scale has fallen to {scalars['loss_scale']:g}: no gradient is finite"
    elif means.get("mlm_loss", 0.0) > EXPLODED * unlearned:
        found = f"the MLM loss is {means['mlm_loss']:.2f}, and a model that knows nothing has {unlearned:.2f}"
    if found is not None:
        _diverged(
            job, stage_index, step,
            f"{found}, seen at step {step} of stage {stage_index + 1} ({_last_good(job, stage_index)}). Lower "
            "optimizer.learning_rate or lengthen optimizer.warmup_steps, and start a new run directory",
        )  # fmt: skip


def _refuse_bad_batches(job: Job, stage_index: int, engine: Engine, progress: Progress) -> None:
    if engine.left_out_steps > job.plan.skip_bad_batches:
        _diverged(
            job, stage_index, progress.step,
            f"the gradient is not finite at step {progress.step} of stage {stage_index + 1}, for the "
            f"{engine.left_out_steps}. time; training.skip_bad_batches allows {job.plan.skip_bad_batches} "
            f"({_last_good(job, stage_index)}). Raise it and run the same command again, or lower "
            "optimizer.learning_rate in a new run directory",
        )  # fmt: skip


def _diverged(job: Job, stage_index: int, step: int, why: str) -> NoReturn:
    """Leave a mark for those who compare runs, and stop."""
    if job.workers.rank == 0:
        write_json(job.run.diverged, {"stage": stage_index + 1, "step": step, "why": why})
    raise MsltError(why)


def _last_good(job: Job, stage_index: int) -> str:
    job.writer.wait()
    newest, _ = _newest_checkpoint(job, stage_index)
    return f"last good checkpoint: {newest.path if newest else job.run.stage(stage_index).base}"


def _evaluate(
    job: Job, stage_index: int, engine: Engine, heldout: Samples, progress: Progress, watcher: Watch | None
) -> dict[str, float]:
    """Held-out means at fixed samples and masks, logged."""
    started = time.perf_counter()
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=job.workers.device)
    for batch in evaluation_batches(heldout, engine.micro_batch_size, job.workers.rank, job.workers.size):
        job.at(f"stage {stage_index + 1}, evaluation at step {progress.step}")
        sums += engine.evaluate_step(batch)
    means = means_of(job.workers.sum(sums))
    evaluated = time.perf_counter()
    if watcher is not None:
        run_step = job.plan.first_step(stage_index) + progress.step
        watcher.log({"kind": "evaluation", "stage": stage_index + 1, "step": run_step, **means})
    progress.spend("evaluation", evaluated - started)
    progress.spend("log", time.perf_counter() - evaluated)
    return means


def _save(job: Job, stage_index: int, engine: Engine, progress: Progress) -> None:
    """Start writing a checkpoint of the present state; the loop goes on when the state is copied."""
    started = time.perf_counter()
    tensors, numbers = engine.save()
    about = _about(job, stage_index, numbers, progress)
    job.writer.write(job.run.stage(stage_index).checkpoints, progress.step, tensors, about)
    progress.spend("checkpoint", time.perf_counter() - started)


def _finish(job: Job, stage_index: int, engine: Engine, progress: Progress, loop_ended: float) -> None:
    """Check the stage's promises, write the model folder, then the summary that says DONE."""
    stage, where = job.plan.stages[stage_index], job.run.stage(stage_index)
    state, base = engine.export_state(), load_state(where.base)
    _refuse_moved_weights(job, stage_index, state, base)
    family = FAMILIES[job.plan.model.family]
    state |= {name: tensor for name, tensor in base.items() if slot_of(family, name) in stage.frozen}
    if job.workers.rank > 0:
        return
    origin = {
        "plan": job.plan.digest(),
        "stage": stage_index + 1,
        "samples": stage.first_sample + stage.steps * stage.batch_size,
        "parent": str(where.base.relative_to(job.run.path)),
        **provenance(),
    }
    model = factory.build(job.plan.model, stage.depth, state)
    evaluations = [*_evaluations_before(job, stage_index), (progress.evaluation_before, progress.evaluation_after)]
    card = model_card(job.plan, job.training.manifest, evaluations, origin)
    save_model_folder(where.model, model, job.training.tokenizer_folder, origin, card)
    progress.spend("finish", time.perf_counter() - loop_ended)
    summary = {
        "stage": stage_index + 1,
        "depth": stage.depth,
        "trainable_parameters": sum(engine.sizes.values()),
        "steps": stage.steps,
        "left_out_steps": engine.left_out_steps,
        "samples": stage.steps * stage.batch_size,
        "world_size": job.workers.size,
        "evaluation_before": progress.evaluation_before,
        "evaluation_after": progress.evaluation_after,
        "spent_s": {name: round(seconds, 3) for name, seconds in progress.spent_s.items()},
        "reduced_bytes": engine.handed_bytes["all_reduce"] + engine.handed_bytes["reduce_scatter_tensor"],
        "gathered_bytes": engine.handed_bytes["all_gather_into_tensor"],
    }
    write_json(where.summary, summary)


def _refuse_moved_weights(job: Job, stage_index: int, state: State, base: State) -> None:
    """MsltError where a frozen weight is not the base's, on any rank; a warning where ranks differ in any weight."""
    family, stage = FAMILIES[job.plan.model.family], job.plan.stages[stage_index]
    frozen = [name for name in state if slot_of(family, name) in stage.frozen]
    moved = [name for name in frozen if not torch.equal(state[name], base[name].to(state[name].dtype))]
    digest = hashlib.sha256()
    for tensor in (tensor for name, tensor in state.items() if name not in frozen):
        digest.update(tensor.numpy().data)
    for rank, (rank_moved, rank_digest) in enumerate(ranks := job.workers.gather((moved, digest.hexdigest()))):
        if rank_moved:
            raise MsltError(
                f"stage {stage_index + 1}: frozen weights moved on rank {rank}: {', '.join(rank_moved[:5])}. The "
                f"machine or its software is at fault; {job.run.stage(stage_index).checkpoints} holds the last state"
            )
        if rank_digest != ranks[0][1] and job.workers.rank == 0:
            LOG.warning(f"warning: rank {rank} has come to other weights than rank 0, whose are kept")


def _summaries_before(job: Job, stage_index: int) -> list[dict[str, Any]]:
    return [json.loads(job.run.stage(index).summary.read_text()) for index in range(stage_index)]


def _evaluations_before(job: Job, stage_index: int) -> list[Evaluations]:
    """Held-out means before and after each stage before."""
    found = _summaries_before(job, stage_index)
    return [(summary["evaluation_before"], summary["evaluation_after"]) for summary in found]


def _seconds_before(job: Job, stage_index: int) -> float:
    """Training time of all stages before."""
    return float(sum(summary["spent_s"]["train"] for summary in _summaries_before(job, stage_index)))
