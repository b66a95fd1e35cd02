"""An engine that is closed leaves nothing behind: the next stage is built in the same process."""

import weakref
from pathlib import Path

import pytest

from mslt.data.loader import Samples
from mslt.data.shards import open_shards
from mslt.engine.engine import Engine, Workers, start_workers
from mslt.errors import MsltError
from mslt.models import factory
from mslt.models.forward import PretrainingLoss
from mslt.models.freezing import freeze
from mslt.plan import Plan, lowest_graph_layer
from mslt.schedule import lr_at


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """This process as the only worker."""
    where = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return start_workers()


def test_five_stages_in_one_process_leave_no_module_and_no_optimizer_state(
    alone: Workers, tiny_plan: Plan, shards: Path
) -> None:
    stage = tiny_plan.stages[1]
    samples = Samples(open_shards(shards, "train"), tiny_plan.data, stage.sequence_length, stage.seed)
    left: list[weakref.ref[object]] = []
    for _ in range(5):
        model = factory.build(tiny_plan.model, stage.depth, factory.initial_state(tiny_plan.model, stage.depth, 0))
        freeze(model, stage.trainable)
        module = PretrainingLoss(model, lowest_graph_layer(stage.trainable, stage.depth), stage.frozen)
        engine = Engine(module, stage, 0, tiny_plan.optimizer, 1.0, tiny_plan.engine, alone)
        assert not model.get_input_embeddings().training, "still from the first step, resumed or not"
        engine.train_step(samples.batch(range(stage.batch_size)), 0, lr_at(stage, 0))
        tensors, _ = engine.save()
        state = next(tensor for name, tensor in tensors.items() if name.startswith("exp_avg/"))
        left += [weakref.ref(module), weakref.ref(model), weakref.ref(state)]
        engine.close()
        del model, module, engine, tensors, state
    assert [reference() for reference in left] == [None] * len(left)


def test_workers_are_refused_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(MsltError, match=r"MASTER_ADDR.*not set; start this through `mslt train`"):
        start_workers()
