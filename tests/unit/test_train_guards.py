"""What a stage takes over from the one before, and what a run refuses: in this process, alone, on stages of 2 steps."""

import copy
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mslt import metrics
from mslt import train as training
from mslt.config import parse_recipe
from mslt.data.loader import Batch, Samples, evaluation_batches
from mslt.data.shards import open_shards
from mslt.engine import checkpoint
from mslt.engine.ds_config import read_engine_config
from mslt.engine.engine import Engine, Workers
from mslt.engine.optimizer import STATE, LossScale
from mslt.errors import MsltError
from mslt.models import factory
from mslt.models.families import FAMILIES, slot_of
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.plan import Plan
from mslt.rundir import RunDir
from mslt.schedule import make_plan
from mslt.train import Job
from tests.distributed.probe import alone

STEPS = 2  # of each stage
UNLEARNED = math.log(512)
FAMILY = FAMILIES["bert"]
JobOf = Callable[..., Job]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two that share a busy core wait for each other: seconds for matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def job_in(run: Path, sections: dict[str, Any], shards: Path, worker: Workers) -> Iterator[Job]:
    recipe = parse_recipe(sections, "recipe for tests")
    plan = make_plan(recipe, read_engine_config(recipe.engine))
    train, heldout = (open_shards(shards, name) for name in ("train", "validation"))
    writer = checkpoint.Writer(0)
    run.mkdir(exist_ok=True)
    try:
        yield Job(plan, RunDir(run), recipe.watch, train, heldout, worker, writer, lambda: False)
    finally:
        writer.close()


def short(sections: dict[str, Any], engine: str, optimizer_state: str) -> dict[str, Any]:
    sections = copy.deepcopy(sections)
    sections["schedule"] |= {"steps": 3 * STEPS, "optimizer_state": optimizer_state}
    sections["optimizer"]["warmup_steps"] = 1
    sections["watch"] = {"log_every": 1, "checkpoint_every": 1}
    sections["data"]["evaluation_samples"] = 4
    return sections | {"engine": engine}


@dataclasses.dataclass
class Begun:
    """A run whose stage 1 is done, and its recipe's sections."""

    path: Path
    sections: dict[str, Any]


def begin(folder: Path, sections: dict[str, Any], shards: Path) -> Begun:
    with alone() as worker, job_in(folder, sections, shards, worker) as job:
        training.run_stage(job, 0, time.perf_counter())
        assert job.run.first_unfinished(job.plan) == 1
    return Begun(folder, sections)


@pytest.fixture(scope="module")
def carrying(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_sections: dict[str, Any]) -> Begun:
    return begin(tmp_path_factory.mktemp("carry") / "run", short(tiny_sections, "zero0_fp32", "carry"), shards)


@pytest.fixture(scope="module")
def in_fp16(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_sections: dict[str, Any]) -> Begun:
    """Its loss scale is 2**12 at the end of stage 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mslt.engine.engine.LossScale", lambda: LossScale(value=2.0**12))
        return begin(tmp_path_factory.mktemp("fp16") / "run", short(tiny_sections, "zero0_fp16", "reset"), shards)


@pytest.fixture
def worker() -> Iterator[Workers]:
    """This process, alone."""
    with alone() as workers:
        yield workers


@pytest.fixture
def again(tmp_path: Path, shards: Path, worker: Workers) -> Iterator[JobOf]:
    """A job on a copy of a begun run, which a test may spoil; `changed` is sections merged into the recipe's."""
    with ExitStack() as stack:

        def job(begun: Begun, **changed: dict[str, Any]) -> Job:
            run = tmp_path / "run"
            if not run.exists():
                shutil.copytree(begun.path, run)
            sections = begun.sections | {name: begun.sections[name] | part for name, part in changed.items()}
            return stack.enter_context(job_in(run, sections, shards, worker))

        yield job


def held(found: checkpoint.Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    with found.open() as shares:
        return {kind: shares.whole(kind) for kind in ("weight", *STATE, "step")}


def newest(job: Job, stage_index: int) -> checkpoint.Checkpoint:
    found, passed_over = training._newest_checkpoint(job, stage_index)
    assert found is not None, passed_over
    return found


def steps_of_fresh_engine(job: Job, stage_index: int, chosen: checkpoint.Checkpoint | None) -> dict[str, int]:
    """The step that each parameter's bias correction begins from."""
    engine = engine_of(job, stage_index)
    assert training._resume(job, stage_index, engine, chosen).step == 0
    steps = dict(zip((piece.name for piece in engine._optimizer.pieces), engine._optimizer.steps, strict=True))
    engine.close()
    return steps


def engine_of(job: Job, stage_index: int) -> Engine:
    base = load_file(job.run.stage(stage_index).base)
    return Engine(training.build_module(job.plan, stage_index, base), job.plan, stage_index, job.workers)


def trainable(job: Job, stage_index: int) -> set[str]:
    names = load_file(job.run.stage(stage_index).base)
    return {name for name in names if slot_of(FAMILY, name) in job.plan.stages[stage_index].trainable}


def tear(folder: Path) -> None:
    file = folder / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_carried_state_goes_on_with_each_copy_and_what_was_frozen_starts_at_0(carrying: Begun, again: JobOf) -> None:
    job = again(carrying)
    before = held(newest(job, 0))
    chosen = training._ensure_start(job, 1)
    assert chosen is not None
    assert chosen.path == job.run.stage(1).checkpoints / "step-00000000"
    assert chosen.step == 0
    taken = held(chosen)
    names = trainable(job, 1)
    assert {"bert.encoder.layer.2.output.dense.weight", "cls.predictions.bias"} <= names
    assert taken["weight"] == {}
    for kind in (*STATE, "step"):
        assert taken[kind].keys() == names
        for name, tensor in taken[kind].items():
            source = name.replace(".layer.2.", ".layer.0.").replace(".layer.3.", ".layer.1.")
            assert torch.equal(tensor, before[kind][source]), (kind, name)
    assert all(tensor.any() for name, tensor in taken["exp_avg"].items() if "key.bias" not in name)
    assert steps_of_fresh_engine(job, 1, chosen) == dict.fromkeys(names, STEPS)

    training.run_stage(job, 1, time.perf_counter())
    chosen = training._ensure_start(job, 2)
    assert chosen is not None
    taken, before = held(chosen), held(newest(job, 1))
    assert before["step"].keys() == names
    everything = set(load_file(job.run.stage(2).base))
    assert names < everything
    for kind in (*STATE, "step"):
        assert taken[kind].keys() == everything
        for name, tensor in taken[kind].items():
            expected = before[kind][name] if name in names else torch.zeros_like(tensor)
            assert torch.equal(tensor, expected), (kind, name)
    steps = steps_of_fresh_engine(job, 2, chosen)
    assert steps == {name: 2 * STEPS if name in names else 0 for name in everything}

    training.run_stage(job, 2, time.perf_counter())
    end = held(newest(job, 2))["step"]
    assert end == {name: 3 * STEPS if name in names else STEPS for name in everything}


def test_reset_in_fp32_takes_nothing_over(carrying: Begun, again: JobOf) -> None:
    job = again(carrying, schedule={"optimizer_state": "reset"})
    assert training._ensure_start(job, 1) is None
    assert not job.run.stage(1).checkpoints.exists()
    assert set(steps_of_fresh_engine(job, 1, None).values()) == {0}


def test_reset_in_fp16_takes_over_the_loss_scale_and_no_tensor(in_fp16: Begun, again: JobOf) -> None:
    job = again(in_fp16)
    chosen = training._ensure_start(job, 1)
    assert chosen is not None
    assert chosen.step == 0
    assert held(chosen) == {"weight": {}, "exp_avg": {}, "exp_avg_sq": {}, "step": {}}
    assert chosen.manifest["engine"].keys() == {"loss_scale"}
    engine = engine_of(job, 1)
    assert engine._scale == LossScale()
    training._resume(job, 1, engine, chosen)
    assert engine._scale == LossScale(value=2.0**12, good_steps=STEPS)
    assert set(engine._optimizer.steps) == {0}
    assert engine.left_out_steps == 0
    assert not engine.handed_bytes
    engine.close()


def test_a_lost_parent_is_refused_with_carry_and_the_remedy_named_gives_the_same(
    carrying: Begun, again: JobOf, capsys: pytest.CaptureFixture[str]
) -> None:
    job = again(carrying)
    parent, child = job.run.stage(0), job.run.stage(1)
    whole = held(newest(job, 0))
    shutil.rmtree(parent.checkpoints / f"step-{STEPS:08d}")
    with pytest.raises(MsltError) as refused:
        training.run_stage(job, 1, time.perf_counter())
    assert "stage 2 carries the optimizer's state of the stage before, and that is lost" in str(refused.value)
    assert f"{parent.checkpoints}: holds no checkpoint of its last step" in str(refused.value)
    assert f"delete {parent.summary} and {child.path}" in str(refused.value)

    parent.summary.unlink()
    shutil.rmtree(child.path)
    assert job.run.first_unfinished(job.plan) == 0
    training.run_stage(job, 0, time.perf_counter())
    assert f"resuming stage 1 at step {STEPS - 1}" in capsys.readouterr().err
    *_, begun, again_from = metrics.read(job.run.starts)
    assert (begun["step"], begun["steps_again"]) == (0, 0)
    assert (again_from["stage"], again_from["step"], again_from["steps_again"]) == (1, STEPS - 1, 1)
    for kind, tensors in held(newest(job, 0)).items():
        assert all(torch.equal(tensor, whole[kind][name]) for name, tensor in tensors.items())
    assert training._ensure_start(job, 1) is not None


def test_a_torn_parent_is_named(carrying: Begun, again: JobOf) -> None:
    job = again(carrying)
    tear(job.run.stage(0).checkpoints / f"step-{STEPS:08d}")
    with pytest.raises(MsltError, match=rf"that is lost \(checkpoint .*step-{STEPS:08d} passed over: .* bytes"):
        training._ensure_start(job, 1)


def test_a_lost_parent_in_fp16_starts_the_loss_scale_anew_and_says_so(
    in_fp16: Begun, again: JobOf, capsys: pytest.CaptureFixture[str]
) -> None:
    job = again(in_fp16)
    shutil.rmtree(job.run.stage(0).checkpoints)
    assert training._ensure_start(job, 1) is None
    assert "warning: the loss scale starts anew in stage 2 (" in capsys.readouterr().err


def test_a_torn_hand_over_is_made_anew(carrying: Begun, again: JobOf, capsys: pytest.CaptureFixture[str]) -> None:
    job = again(carrying)
    first = training._ensure_start(job, 1)
    assert first is not None
    expected = held(first)
    assert training._ensure_start(job, 1) == first, "not made twice"
    assert "warning" not in capsys.readouterr().err
    tear(first.path)
    second = training._ensure_start(job, 1)
    assert f"warning: checkpoint {first.path} passed over" in capsys.readouterr().err
    assert second == first
    assert all(torch.equal(t, expected[kind][n]) for kind, tensors in held(second).items() for n, t in tensors.items())


def test_torn_checkpoints_fall_back_to_the_hand_over_and_where_it_is_gone_make_it_anew(
    carrying: Begun, again: JobOf, capsys: pytest.CaptureFixture[str]
) -> None:
    job = again(carrying)
    first = training._ensure_start(job, 1)
    assert first is not None
    later = [first.path.with_name(f"step-{step:08d}") for step in (1, 2)]
    for path in later:
        shutil.copytree(first.path, path)
        tear(path)
    assert training._ensure_start(job, 1) == first
    said = capsys.readouterr().err
    assert all(f"warning: checkpoint {path} passed over" in said for path in later)
    shutil.rmtree(first.path)
    assert training._ensure_start(job, 1) == first
    said = capsys.readouterr().err
    assert all(f"warning: checkpoint {path} passed over" in said for path in later)
    assert [path.name for path in first.path.parent.iterdir()] == ["step-00000000"]


@pytest.mark.parametrize(
    ("there", "step", "kept"),
    [
        ([], 0, [0]),
        ([5], 0, [0]),
        ([5, 6, 7], 0, [0]),
        ([5, 6, 7], 1, [1]),
        ([0, 5, 6], 1, [0, 1]),
        ([0, 1, 5], 2, [1, 2]),
        ([0, 1, 2], 2, [1, 2]),
        ([0, 1, 2, 3], 4, [3, 4]),
    ],
)
def test_what_was_just_committed_stays_whatever_else_is_there(
    tmp_path: Path, there: list[int], step: int, kept: list[int]
) -> None:
    for other in there:
        (tmp_path / f"step-{other:08d}").mkdir()
    checkpoint.commit(tmp_path, step, {"weight/w/0": torch.ones(3)}, {"base_sha256": "base", "plan": "plan"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{number:08d}" for number in kept]
    found, passed_over = checkpoint.newest_valid(tmp_path, "base", "plan")
    assert found is not None
    assert (found.step, passed_over) == (step, [])


@pytest.mark.parametrize("stage_index", [0, 1])
def test_a_base_whose_bytes_changed_is_refused_and_made_anew_when_deleted(
    carrying: Begun, again: JobOf, stage_index: int
) -> None:
    job = again(carrying)
    training._ensure_start(job, stage_index)
    where = job.run.stage(stage_index)
    content = where.base.read_bytes()
    where.base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(MsltError, match=r"base\.safetensors: does not have the sha256 in base\.json; delete both"):
        training.run_stage(job, stage_index, time.perf_counter())
    where.base.unlink()
    where.base_description.unlink()
    training._ensure_start(job, stage_index)
    assert where.base.read_bytes() == content


def test_a_checkpoint_of_another_plan_is_passed_over(
    carrying: Begun, again: JobOf, capsys: pytest.CaptureFixture[str]
) -> None:
    job = again(carrying, optimizer={"learning_rate": 0.02})
    assert training._ensure_start(job, 0) is None
    assert capsys.readouterr().err.count("passed over: belongs to another plan") == 2
    with pytest.raises(MsltError, match="belongs to another plan"):
        training._ensure_start(job, 1)


GOOD = {"gradient_norm": 1.0}


@pytest.mark.parametrize(
    ("means", "scalars", "skip", "says"),
    [
        ({"mlm_loss": math.nan}, GOOD, 0, "the loss is no longer finite"),
        ({"mlm_loss": 1.0, "nsp_loss": math.inf}, GOOD, 0, "the loss is no longer finite"),
        ({"mlm_loss": 1.0}, {"gradient_norm": math.nan}, 0, "the gradient is no longer finite"),
        ({"mlm_loss": 1.0}, {"gradient_norm": math.inf}, 0, "the gradient is no longer finite"),
        ({}, GOOD | {"loss_scale": 0.5}, 0, "the loss scale has fallen to 0.5: no gradient is finite"),
        ({"mlm_loss": 2.01 * UNLEARNED}, GOOD, 0, "the MLM loss is 12.54, and a model that knows nothing has 6.24"),
        ({"mlm_loss": 2.01 * UNLEARNED}, GOOD, 1, "the MLM loss is 12.54, and a model that knows nothing has 6.24"),
    ],
)
def test_divergence_is_refused_with_the_last_good_checkpoint(
    carrying: Begun, again: JobOf, means: dict[str, float], scalars: dict[str, float], skip: int, says: str
) -> None:
    job = again(carrying, training={"skip_bad_batches": skip})
    good = newest(job, 0).path
    with pytest.raises(MsltError) as refused:
        training._refuse_divergence(job, 0, 7, means, scalars)
    assert str(refused.value).startswith(f"{says}, seen at step 7 of stage 1 (last good checkpoint: {good}). Lower ")
    mark = json.loads(job.run.diverged.read_text())
    assert (mark["stage"], mark["step"], mark["why"]) == (1, 7, str(refused.value))
    tear(good)
    with pytest.raises(MsltError, match=f"last good checkpoint: .*step-{STEPS - 1:08d}"):
        training._refuse_divergence(job, 0, 7, means, scalars)


@pytest.mark.parametrize(
    ("means", "scalars", "skip"),
    [
        ({"mlm_loss": 1.99 * UNLEARNED, "nsp_loss": 0.7}, GOOD, 0),
        ({}, GOOD, 0),
        ({"mlm_loss": 1.0}, {"gradient_norm": math.inf, "loss_scale": 1.0}, 0),
        ({"mlm_loss": 1.0}, {"gradient_norm": math.nan}, 1),
    ],
)
def test_what_training_can_live_with_passes(
    carrying: Begun, again: JobOf, means: dict[str, float], scalars: dict[str, float], skip: int
) -> None:
    training._refuse_divergence(again(carrying, training={"skip_bad_batches": skip}), 0, 7, means, scalars)


def test_before_the_first_checkpoint_the_base_is_the_last_good(carrying: Begun, again: JobOf) -> None:
    job = again(carrying)
    shutil.rmtree(job.run.stage(0).checkpoints)
    with pytest.raises(MsltError, match=r"last good checkpoint: .*stage-1/base\.safetensors"):
        training._refuse_divergence(job, 0, 1, {"mlm_loss": math.nan}, GOOD)


def test_one_bad_batch_too_many_is_refused(carrying: Begun, again: JobOf) -> None:
    job = again(carrying, training={"skip_bad_batches": 2})
    progress = training.Progress(step=7)
    engine: Any = SimpleNamespace(left_out_steps=2)
    training._refuse_bad_batches(job, 0, engine, progress)
    engine.left_out_steps = 3
    with pytest.raises(MsltError) as refused:
        training._refuse_bad_batches(job, 0, engine, progress)
    said = str(refused.value)
    assert "not finite at step 7 of stage 1, for the 3. time; training.skip_bad_batches allows 2" in said
    assert f"(last good checkpoint: {newest(job, 0).path})" in said
    mark = json.loads(job.run.diverged.read_text())
    assert (mark["stage"], mark["step"], mark["why"]) == (1, 7, said)


def test_a_run_that_goes_on_is_no_longer_marked_as_diverged(
    carrying: Begun, again: JobOf, shards: Path, worker: Workers
) -> None:
    """More bad batches are borne than when the mark was left: the run may come to its end, and then it counts."""
    job = again(carrying, training={"skip_bad_batches": 2})
    with pytest.raises(MsltError, match="the loss is no longer finite"):
        training._refuse_divergence(job, 0, 1, {"mlm_loss": math.nan}, GOOD)
    assert job.run.diverged.exists()
    seen = []

    def wants_to_stop() -> bool:
        seen.append(job.run.diverged.exists())
        return False

    training.train(job.plan, job.run, shards, job.watch, worker, wants_to_stop)
    assert job.run.first_unfinished(job.plan) is None
    assert not job.run.diverged.exists()
    assert seen
    assert not any(seen), "it goes before the first step"


def test_a_run_that_diverges_again_is_marked_again(
    carrying: Begun, again: JobOf, shards: Path, worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = again(carrying)
    job.run.diverged.write_text('{"stale": true}')
    monkeypatch.setattr(training, "EXPLODED", 0.0)
    with pytest.raises(MsltError, match="seen at step 1 of stage 2"):
        training.train(job.plan, job.run, shards, job.watch, worker, lambda: False)
    mark = json.loads(job.run.diverged.read_text())
    assert (mark["stage"], mark["step"]) == (2, 1)
    assert "stale" not in mark


def test_a_frozen_weight_that_moved_by_one_bit_is_refused(carrying: Begun, again: JobOf) -> None:
    job = again(carrying)
    training._ensure_start(job, 1)
    base = load_file(job.run.stage(1).base)
    state = {name: tensor.clone() for name, tensor in base.items()}
    state["cls.seq_relationship.bias"] += 1
    state["bert.encoder.layer.3.output.dense.bias"] += 1
    training._refuse_moved_weights(job, 1, state, base)
    name = "bert.encoder.layer.1.output.dense.weight"
    state[name][0, 0] = torch.nextafter(state[name][0, 0], torch.tensor(math.inf))
    with pytest.raises(MsltError, match=f"stage 2: frozen weights moved on rank 0: {name}. The machine"):
        training._refuse_moved_weights(job, 1, state, base)


def test_ranks_that_differ_are_told_of_and_one_that_moved_is_refused(
    carrying: Begun, again: JobOf, capsys: pytest.CaptureFixture[str]
) -> None:
    job = again(carrying)
    base = load_file(job.run.stage(0).base)

    def with_other(rank: int, moved: list[str]) -> Job:
        workers: Any = SimpleNamespace(rank=rank, gather=lambda own: [own, own, (moved, "another digest")])
        return dataclasses.replace(job, workers=workers)

    training._refuse_moved_weights(with_other(0, []), 0, base, base)
    expected = "warning: rank 2 has come to other weights than rank 0, whose are kept\n"
    assert capsys.readouterr().err == expected
    training._refuse_moved_weights(with_other(1, []), 0, base, base)
    assert capsys.readouterr().err == "", "rank 0 says it once"
    with pytest.raises(MsltError, match=r"frozen weights moved on rank 2: bert\.x"):
        training._refuse_moved_weights(with_other(0, ["bert.x"]), 0, base, base)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 2), (7, 2), (13, 4)])
def test_evaluation_gives_every_rank_as_many_batches_and_every_sample_once(
    shards: Path, tiny_plan: Plan, count: int, batch_size: int
) -> None:
    data = tiny_plan.data.model_copy(update={"evaluation_samples": count})
    samples = Samples(open_shards(shards, "validation"), data, 32, 0)
    assert samples.order.num_samples(0) >= count
    module = PretrainingLoss(factory.build(tiny_plan.model, 2, factory.initial_state(tiny_plan.model, 2, 0))).eval()
    whole = samples.batch(range(count))
    expected = sorted(rows(whole))
    assert len(expected) == count
    with torch.no_grad():
        sums = module(**whole).double()
    for world_size in range(1, 6):
        ranks = [list(evaluation_batches(samples, batch_size, rank, world_size)) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {math.ceil(math.ceil(count / world_size) / batch_size)}
        batches = [batch for rank in ranks for batch in rank]
        assert all(len(batch["input_ids"]) <= batch_size for batch in batches)
        fillers = [batch for batch in batches if not (batch["mlm_labels"] >= 0).any()]
        assert all((filler["nsp_labels"] < 0).all() for filler in fillers)
        assert sorted(row for batch in batches if batch["nsp_labels"].max() >= 0 for row in rows(batch)) == expected
        with torch.no_grad():
            dealt = torch.stack([module(**batch).double() for batch in batches]).sum(0)
        for name, found, right in zip(SUMS, dealt.tolist(), sums.tolist(), strict=True):
            # Counts are whole; losses are fp32 sums over other groups: 1e-5 is over 100 roundings of 6e-8.
            assert found == (pytest.approx(right, rel=1e-5) if name.endswith("loss") else right), (world_size, name)


def rows(batch: Batch) -> list[str]:
    """Each sample of a batch as a text."""
    return [
        json.dumps([tensor[index].tolist() for tensor in batch.values()]) for index in range(len(batch["nsp_labels"]))
    ]
