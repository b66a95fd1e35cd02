"""Workers of a test: a few steps of a stage through the engine, for each of several cases in one launch.

`launch` starts them and waits. A case leaves in the job's folder
  NAME-after-N.safetensors   all weights after N steps, as rank 0 has them
  NAME-rank-R.json           what rank R saw; see `told`
"""

import gc
import hashlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file

from mslt.data.loader import Batch, Samples, training_batches
from mslt.data.shards import open_shards
from mslt.engine import checkpoint
from mslt.engine.ds_config import zero_stage
from mslt.engine.engine import Engine, Workers, quiet, start_workers
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.surgery import State
from mslt.plan import Plan
from mslt.schedule import lr_at
from mslt.train import build_module
from mslt.validation import Frozen
from tests.distributed.oracle import plain_lamb

BASE_SHA256 = "of the base that tests share"
PLAN = "of the plan that tests share"


class Moment(Frozen):
    rank: int
    step: int


class Case(Frozen):
    """`write_after` counts steps done, 0 before the first; the largest ends the case. `load` is a checkpoint folder to
    begin from, `save` one to write to at the end. At `poisoned` one element of one gradient of one micro-batch becomes
    NaN. Through `deepspeed` the stage is trained as without mslt: DeepSpeed and an optimizer from a library."""

    name: str
    plan: Plan
    stage_index: int
    base: Path
    write_after: tuple[int, ...]
    load: Path | None = None
    save: Path | None = None
    says_stop: Moment | None = None
    poisoned: Moment | None = None
    through: Literal["engine", "deepspeed"] = "engine"


class Job(Frozen):
    folder: Path
    shards: Path
    cases: tuple[Case, ...]


# Workers fork from a process that has imported all this: seconds each otherwise, and their sum where cores are few.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, "deepspeed.runtime.zero.muon.original_muon"])  # ZeRO imports that one later


def launch(job: Job, num_workers: int, timeout_s: float = 120) -> None:
    """Run the cases on this many workers on the CPU. RuntimeError with its last words when one fails."""
    job.folder.mkdir(parents=True, exist_ok=True)
    port, deadline = free_port(), time.monotonic() + timeout_s
    logs = [job.folder / f"worker-{rank}.log" for rank in range(num_workers)]
    with environment(HOW_WORKERS_RUN):
        workers = [_FORKS.Process(target=work, args=(job, r, num_workers, port, log)) for r, log in enumerate(logs)]
        for worker in workers:
            worker.start()
    try:
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            if any(worker.exitcode for worker in workers):
                break
            time.sleep(0.05)
        codes = [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    for rank in sorted(range(num_workers), key=lambda rank: codes[rank] is None):  # who failed before who waited
        if codes[rank] != 0:
            said = logs[rank].read_text()[-4000:]
            raise RuntimeError(
                f"worker {rank} of {num_workers} ended with {codes[rank]} (None: {timeout_s} s were up):\n{said}"
            )


HOW_WORKERS_RUN = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def place(rank: int, num_workers: int, port: int) -> dict[str, str]:
    """What a launcher tells a worker."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_workers, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@cache
def _this_process() -> Workers:
    return start_workers()


@contextmanager
def alone() -> Iterator[Workers]:
    """This process as the only worker, for as long as it lasts."""
    with environment({"DS_ACCELERATOR": "cpu", **place(0, 1, free_port())}):
        workers = _this_process()
        gc.freeze()  # see `work`
        try:
            yield workers
        finally:
            gc.unfreeze()


def told(job: Job, name: str, rank: int = 0) -> dict[str, Any]:
    """`trained` names what was optimized; `digests` is of all weights, by steps done; the rest has one entry a step:
    bytes that DeepSpeed `handed` to each collective, bytes of each call of torch's all-reduce (`all_reduced`), the
    `scalars`, whether someone was `stopping`, and the steps `left_out` so far."""
    return json.loads((job.folder / f"{name}-rank-{rank}.json").read_text())


def weights(job: Job, name: str, steps: int) -> State:
    return load_file(job.folder / f"{name}-after-{steps}.safetensors")


def work(job: Job, rank: int, num_workers: int, port: int, log: Path) -> None:
    """One worker, to the end."""
    with open(log, "w") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    os.environ.update(place(rank, num_workers, port))
    gc.freeze()  # `Engine.close` collects: 0.4 s each time with all that was imported
    quiet()
    workers = start_workers()
    reduced: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        reduced.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *arguments, **keywords)

    torch.distributed.all_reduce = counted
    for case in job.cases:
        through = {"engine": through_engine, "deepspeed": through_deepspeed}[case.through]
        through(case, job, workers, reduced)
        workers.barrier()


def through_engine(case: Case, job: Job, workers: Workers, reduced: list[int]) -> None:
    stage = case.plan.stages[case.stage_index]
    module = build_module(case.plan, case.stage_index, load_file(case.base))
    poison = Poison(module)
    engine = Engine(module, case.plan, case.stage_index, workers)
    if case.load is not None:
        load(engine, case.load)
    batches = batches_of(case, job, workers)
    upcoming = next(batches)
    seen: dict[str, Any] = {"trained": sorted(engine.sizes), "digests": {}}
    for step in range(max(case.write_after) + 1):
        if step in case.write_after:
            seen["digests"][step] = write_weights(case, job, workers, engine.export_state(), step)
        if step == max(case.write_after):
            break
        poison.armed = case.poisoned == Moment(rank=workers.rank, step=step)
        reduced.clear()
        before = engine.handed_bytes.copy()
        says_stop = case.says_stop == Moment(rank=workers.rank, step=step)
        batch, upcoming = upcoming, next(batches)
        engine.train_step(batch, step, lr_at(stage, step), says_stop, upcoming)
        saw = {
            "handed": dict(engine.handed_bytes - before),
            "all_reduced": list(reduced),
            "scalars": engine.scalars(),
            "stopping": engine.someone_wants_to_stop(),
            "left_out": engine.left_out_steps,
        }
        for key, value in saw.items():
            seen.setdefault(key, []).append(value)
    if case.save is not None:
        save(engine, case.save, max(case.write_after), workers)
    (job.folder / f"{case.name}-rank-{workers.rank}.json").write_text(json.dumps(seen))
    engine.close()


class Poison:
    """Makes the first element of the NSP head's gradient NaN, once, when armed: under ZeRO one rank alone holds it."""

    def __init__(self, module: PretrainingLoss) -> None:
        self.armed = False
        module.model.get_parameter("cls.seq_relationship.weight").register_hook(self._spoil)

    def _spoil(self, grad: torch.Tensor) -> torch.Tensor:
        if not self.armed:
            return grad
        self.armed = False
        grad = grad.clone()
        grad.view(-1)[0] = torch.nan
        return grad


def through_deepspeed(case: Case, job: Job, workers: Workers, reduced: list[int]) -> None:
    plan, stage = case.plan, case.plan.stages[case.stage_index]
    module = build_module(plan, case.stage_index, load_file(case.base))
    config = {
        "train_micro_batch_size_per_gpu": stage.batch_size // workers.size,
        "gradient_clipping": plan.clip_norm,
        "zero_optimization": {"stage": zero_stage(plan.engine)},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = plain_lamb(module.model.parameters(), plan)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    batches = batches_of(case, job, workers)
    for step in range(max(case.write_after)):
        for group in engine.optimizer.param_groups:
            group["lr"] = lr_at(stage, step)
        batch = next(batches)
        masked = workers.sum((batch["mlm_labels"] >= 0).sum())
        sums = dict(zip(SUMS, engine(**batch), strict=True))
        loss = sums["mlm_loss"] / masked + sums["nsp_loss"] / stage.batch_size
        engine.backward(loss * workers.size)
        engine.step()
        if step + 1 in case.write_after:
            state = {name: p.detach().clone() for name, p in module.model.named_parameters()}
            write_weights(case, job, workers, state, step + 1)
    engine.destroy()


def batches_of(case: Case, job: Job, workers: Workers) -> Iterator[Batch]:
    stage = case.plan.stages[case.stage_index]
    samples = Samples(open_shards(job.shards, "train"), case.plan.data, stage.sequence_length, stage.seed)
    return training_batches(samples, stage, workers.rank, workers.size, 0, 0)


def write_weights(case: Case, job: Job, workers: Workers, state: State, steps: int) -> str:
    """The sha256 of all weights, which rank 0 writes."""
    if workers.rank == 0:
        save_file(state, job.folder / f"{case.name}-after-{steps}.safetensors")
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(engine: Engine, folder: Path, step: int, workers: Workers) -> None:
    writer = checkpoint.Writer(workers.rank)
    tensors, numbers = engine.save()
    writer.write(folder, step, tensors, {"base_sha256": BASE_SHA256, "plan": PLAN, "engine": numbers})
    writer.wait()
    writer.close()


def load(engine: Engine, folder: Path) -> None:
    found, passed_over = checkpoint.newest_valid(folder, BASE_SHA256, PLAN)
    assert found is not None, passed_over
    with found.open() as shares:
        engine.load(shares.read, found.manifest["engine"])
