"""An engine that is closed leaves nothing behind: the next stage is built in the same process."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from mslt.data.loader import Samples
from mslt.data.shards import open_shards
from mslt.engine.ds_config import read_engine_config
from mslt.engine.engine import Engine, Workers, start_workers
from mslt.errors import MsltError
from mslt.models import factory
from mslt.models.forward import PretrainingLoss
from mslt.plan import Plan
from mslt.schedule import lr_at
from mslt.train import build_module
from tests.distributed.probe import alone

STAGES_IN_A_ROW = 5
LIVE_BYTES = 1024  # what other threads may hold for a moment; a stage's weights are a hundred times that
GROWTH_BYTES = 30_000_000  # of the process from the second stage to the last; the buckets of one stage are more


@pytest.fixture
def worker() -> Iterator[Workers]:
    """This process, alone."""
    with alone() as workers:
        yield workers


ENGINES = ["zero0_bf16", "zero1_fp32", "zero2_bf16"]


@pytest.mark.parametrize("engine_name", ENGINES)
def test_five_stages_in_one_process_leave_nothing(
    worker: Workers, tiny_plan: Plan, shards: Path, engine_name: str
) -> None:
    left: list[weakref.ref[object]] = []
    live_bytes, process_bytes = [], []
    for index in range(STAGES_IN_A_ROW):
        engine, module = engine_after_a_step(tiny_plan, engine_name, shards, worker)
        own = [weakref.ref(module.model), *(weakref.ref(parameter) for parameter in module.parameters())]
        left += [weakref.ref(module), *own, *insides(engine)]
        del module
        engine.close()
        assert [reference() for reference in left] == [None] * len(left)
        if index in (1, STAGES_IN_A_ROW - 1):
            live_bytes.append(bytes_of_live_tensors())
            process_bytes.append(psutil.Process().memory_info().rss)
    assert live_bytes[1] < live_bytes[0] + LIVE_BYTES
    assert process_bytes[1] < process_bytes[0] + GROWTH_BYTES


@pytest.mark.parametrize("engine_name", ENGINES)
def test_a_module_that_lives_on_holds_nothing_of_its_engine(
    worker: Workers, tiny_plan: Plan, shards: Path, engine_name: str
) -> None:
    engine, module = engine_after_a_step(tiny_plan, engine_name, shards, worker)
    left = insides(engine)
    engine.close()
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert not any(vars(parameter) for parameter in module.parameters())


def engine_after_a_step(plan: Plan, engine_name: str, shards: Path, worker: Workers) -> tuple[Engine, PretrainingLoss]:
    """Of the grown stage, its frozen part without dropout."""
    still = tuple(stage.model_copy(update={"frozen_dropout": False}) for stage in plan.stages)
    plan = plan.model_copy(update={"engine": read_engine_config(engine_name), "stages": still})
    stage = plan.stages[1]
    module = build_module(plan, 1, factory.initial_state(plan.model, stage.depth, 0))
    engine = Engine(module, plan, 1, worker)
    assert not module.model.get_input_embeddings().training, "still from the first step, resumed or not"
    samples = Samples(open_shards(shards, "train"), plan.data, stage.sequence_length, stage.seed)
    engine.train_step(samples.batch(range(stage.batch_size)), 0, lr_at(stage, 0))
    return engine, module


def insides(engine: Engine) -> list[weakref.ref[object]]:
    """DeepSpeed's engine and optimizer, ours, and its state."""
    optimizer = engine._optimizer
    held = [engine._engine, engine._zero, optimizer, *optimizer.moments["exp_avg"], *optimizer.moments["exp_avg_sq"]]
    return [weakref.ref(thing) for thing in held]


def bytes_of_live_tensors() -> int:
    """Each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # isinstance would ask each object, and some warn
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_workers_are_refused_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(MsltError, match=r"MASTER_ADDR.*not set; start this through `mslt train`"):
        start_workers()
