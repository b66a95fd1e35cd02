"""The engine on one, two and three workers: what it must do in every ZeRO stage, whatever DeepSpeed would do."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.engine_exactness import worst_of
from mslt import train as train_module
from mslt.config import parse_recipe
from mslt.cost import stage_cost
from mslt.data.loader import Batch, Samples
from mslt.data.shards import open_shards
from mslt.engine import checkpoint
from mslt.engine import engine as engine_module
from mslt.engine.ds_config import read_engine_config
from mslt.engine.engine import Engine, Workers
from mslt.errors import MsltError
from mslt.models import factory
from mslt.models.compiling import why_no_compiler
from mslt.models.surgery import State
from mslt.plan import Plan
from mslt.schedule import lr_at, make_plan
from mslt.train import build_module, compilable
from tests.distributed.oracle import train_plainly
from tests.distributed.probe import BASE_SHA256, PLAN, Case, Job, Moment, alone, launch, load, save, told, weights

ZERO_STAGES = [0, 1, 2, 3]
FROZEN, FULL = 1, 2  # stages of the plan: the upper two of four layers train with the heads, or everything
MICRO_BATCHES = 3  # of a step, on two workers
POISONED_STEP, STOP_STEP, STEPS = 1, 2, 4
SMALL_BYTES = 1000  # everything that is not a gradient: counts, norms


def plan_of(sections: dict[str, Any], engine: str, **training: Any) -> Plan:
    """The tiny recipe with word embeddings that ZeRO-3 partitions (it keeps all parameters under 100,000 elements on
    every rank), dropout off, and micro-batches that accumulate."""
    sections = copy.deepcopy(sections) | {"engine": engine}
    sections["model"] |= {"vocab_size": 4096, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sections["training"] |= {"batch_size": 12, "micro_batch_size": 2, **training}
    recipe = parse_recipe(sections, "recipe for tests")
    return make_plan(recipe, read_engine_config(recipe.engine))


def in_small_buckets(plan: Plan) -> Plan:
    """Gradients of many buckets, as a real model has: some parameters fill one, the word embeddings burst it."""
    zero = {**plan.engine["zero_optimization"], "reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
    return plan.model_copy(update={"engine": {**plan.engine, "zero_optimization": zero}})


def initial_state(plan: Plan, seed: int = 0) -> State:
    return factory.initial_state(plan.model, plan.model.num_hidden_layers, seed)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_sections: dict[str, Any]) -> Job:
    """One launch of two workers. In each ZeRO stage a gradient of rank 1 is spoiled in the second step, and rank 1 says
    stop in the third."""
    folder = tmp_path_factory.mktemp("two")
    base = folder / "base.safetensors"
    save_file(initial_state(plan_of(tiny_sections, "zero0_fp32")), base)
    poisoned, stop = Moment(rank=1, step=POISONED_STEP), Moment(rank=1, step=STOP_STEP)

    def case(name: str, plan: Plan, stage_index: int, *write_after: int, **options: Any) -> Case:
        return Case(name=name, plan=plan, stage_index=stage_index, base=base, write_after=write_after, **options)

    lenient = [plan_of(tiny_sections, f"zero{zero}_fp32", skip_bad_batches=1) for zero in ZERO_STAGES]
    cases = [
        case(f"zero{zero}", plan, FROZEN, *range(STEPS + 1), poisoned=poisoned, says_stop=stop)
        for zero, plan in enumerate(lenient)
    ]
    for zero in (0, 1):
        cases.append(
            case(f"fp16-zero{zero}", plan_of(tiny_sections, f"zero{zero}_fp16"), FULL, 1, 2, 3, poisoned=poisoned)
        )
    for zero in (1, 2, 3):
        plan = in_small_buckets(plan_of(tiny_sections, f"zero{zero}_fp32"))
        cases.append(case(f"buckets-zero{zero}", plan, FULL, 1, 2))
    cases.append(case("saved", plan_of(tiny_sections, "zero1_bf16"), FULL, 3, save=folder / "checkpoints"))
    job = Job(folder=folder, shards=shards, cases=tuple(cases))
    launch(job, 2)
    return job


def on_both(job: Job, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return told(job, name, 0), told(job, name, 1)


def plan_in(job: Job, name: str) -> Plan:
    return next(case.plan for case in job.cases if case.name == name)


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_two_workers_agree_bit_for_bit(two: Job, zero: int) -> None:
    one, other = on_both(two, f"zero{zero}")
    assert one["digests"] == other["digests"]
    assert len(set(one["digests"].values())) == STEPS, "each step moves, the poisoned one apart"


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_the_gradients_that_the_plan_trains_are_reduced_to_the_byte(two: Job, zero: int) -> None:
    """Once a step in ZeRO-0 and 1, after every micro-batch in ZeRO-2 and 3; by counting parameters from the shape."""
    plan = plan_in(two, f"zero{zero}")
    cost = stage_cost(plan.model, plan.stages[FROZEN])
    assert 0 < cost.trainable_parameters < cost.total_parameters
    times = MICRO_BATCHES if zero >= 2 else 1
    gathered = -(-cost.trainable_parameters // 4) * 4 * 4  # two ranks, an even number of fp32 elements each
    for seen in on_both(two, f"zero{zero}"):
        assert len(seen["handed"]) == STEPS
        for handed, calls in zip(seen["handed"], seen["all_reduced"], strict=True):
            large = [size for size in calls if size > SMALL_BYTES]
            assert sum(calls) - sum(large) < SMALL_BYTES
            if zero == 3:
                assert not large
                # The NSP head's bias of two and all others have an even number of elements: nothing is padded.
                assert handed["reduce_scatter_tensor"] == times * cost.fp32_gradient_bytes
            else:
                assert large == [cost.fp32_gradient_bytes] * times
                assert handed["all_reduce"] == times * cost.fp32_gradient_bytes
                assert handed.get("all_gather_into_tensor", 0) == (gathered if zero else 0)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_in_many_buckets_give_the_update_of_plain_torch(two: Job, zero: int) -> None:
    name = f"buckets-zero{zero}"
    plan, base = plan_in(two, name), load_file(two.cases[0].base)
    stage = plan.stages[FULL]
    samples = Samples(open_shards(two.shards, "train"), plan.data, stage.sequence_length, stage.seed)
    matrices = [parameter for parameter in base if base[parameter].ndim > 1]
    for steps, expected in zip((1, 2), train_plainly(plan, FULL, base, samples, (1, 2)), strict=True):
        error, matrix = worst_of(weights(two, name, steps), expected, base, matrices)
        assert error < 5e-5, f"{matrix} after {steps}"
    seen = told(two, name)
    if zero < 3:
        assert sum(size > SMALL_BYTES for size in seen["all_reduced"][0]) > MICRO_BATCHES, "one bucket held them all"


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_a_gradient_that_is_not_finite_on_one_rank_leaves_the_step_out_on_all(two: Job, zero: int) -> None:
    one, other = on_both(two, f"zero{zero}")
    assert one["left_out"] == other["left_out"] == [0, 1, 1, 1]
    before, left, after = (weights(two, f"zero{zero}", steps) for steps in (1, 2, 3))
    trained = one["trained"]
    assert all(torch.equal(before[name], left[name]) for name in before)
    assert not any(torch.equal(left[name], after[name]) for name in trained if before[name].ndim > 1)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    end, base = weights(two, f"zero{zero}", STEPS), load_file(two.cases[0].base)
    error, name = worst_of(end, weights(two, "zero0", STEPS), base, [n for n in trained if base[n].ndim > 1])
    assert error < 5e-5, f"{name}: ZeRO-{zero} goes on in another way than ZeRO-0"


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_the_norm_of_a_step_left_out_is_not_that_of_the_step_before(two: Job, zero: int) -> None:
    for seen in on_both(two, f"zero{zero}"):
        finite = [math.isfinite(scalars["gradient_norm"]) for scalars in seen["scalars"]]
        assert finite == [step != POISONED_STEP for step in range(STEPS)]


@pytest.mark.parametrize("zero", [0, 1])
def test_an_overflow_in_fp16_on_one_rank_leaves_the_step_out_on_all(two: Job, zero: int) -> None:
    """And halves the scale on all: each its own scale would add gradients of different size."""
    one, other = on_both(two, f"fp16-zero{zero}")
    scales = [scalars["loss_scale"] for scalars in one["scalars"]]
    assert scales == [2.0**16, 2.0**15, 2.0**15] == [scalars["loss_scale"] for scalars in other["scalars"]]
    assert one["digests"] == other["digests"]
    assert one["digests"]["1"] == one["digests"]["2"] != one["digests"]["3"]
    assert one["left_out"] == [0, 0, 0], "counts bad batches, and this is fp16's way of finding its scale"


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_all_hear_that_one_wants_to_stop(two: Job, zero: int) -> None:
    for seen in on_both(two, f"zero{zero}"):
        assert seen["stopping"] == [step == STOP_STEP for step in range(STEPS)]


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_frozen_weights_do_not_move(two: Job, zero: int) -> None:
    base, end = load_file(two.cases[0].base), weights(two, f"zero{zero}", STEPS)
    trained = told(two, f"zero{zero}")["trained"]
    assert "bert.embeddings.word_embeddings.weight" not in trained
    for name, weight in end.items():
        if name.endswith(".weight") and name in trained:
            assert not torch.equal(weight, base[name]), name
        elif name not in trained:
            assert torch.equal(weight, base[name]), name


def saved_at_two(job: Job) -> dict[str, dict[str, torch.Tensor]]:
    return whole(job.folder / "checkpoints")


def whole(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Flattened tensors of a checkpoint, by kind and parameter."""
    found, passed_over = checkpoint.newest_valid(folder, BASE_SHA256, PLAN)
    assert found is not None, passed_over
    with found.open() as shares:
        return {kind: shares.whole(kind) for kind in ("weight", "exp_avg", "exp_avg_sq", "step")}


def assert_same_state(found: dict[str, dict[str, torch.Tensor]], saved: dict[str, dict[str, torch.Tensor]]) -> None:
    assert found.keys() == saved.keys()
    for kind, tensors in saved.items():
        assert found[kind].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[kind][name], tensor), f"{kind} of {name}"


def test_a_checkpoint_of_two_workers_is_whole_and_in_fp32(two: Job) -> None:
    """In a bf16 run: what is saved are the masters, with bits that bf16 has not."""
    saved, end = saved_at_two(two), weights(two, "saved", 3)
    base = load_file(two.cases[0].base)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert {name: len(tensor) for name, tensor in saved[kind].items()} == {n: t.numel() for n, t in base.items()}
    assert {int(steps) for steps in saved["step"].values()} == {3}
    for name, weight in end.items():
        assert torch.equal(saved["weight"][name], weight.flatten())
        if weight.ndim > 1:
            assert not torch.equal(weight, weight.bfloat16().float()), f"{name} was rounded"
            assert saved["exp_avg"][name].any()
            assert saved["exp_avg_sq"][name].any()


def test_three_workers_load_what_two_saved(two: Job, tmp_path: Path, tiny_sections: dict[str, Any]) -> None:
    """ZeRO-1 into ZeRO-2 and 3, bit for bit: weights, moments and steps, and what the model computes with."""
    other = tmp_path / "other.safetensors"
    save_file(initial_state(plan_of(tiny_sections, "zero0_fp32"), seed=7), other)
    cases = [
        Case(
            name=f"zero{zero}",
            plan=plan_of(tiny_sections, f"zero{zero}_bf16"),
            stage_index=FULL,
            base=other,
            write_after=(0,),
            load=two.folder / "checkpoints",
            save=tmp_path / f"zero{zero}",
        )
        for zero in (2, 3)
    ]
    job = Job(folder=tmp_path, shards=two.shards, cases=tuple(cases))
    launch(job, 3)
    end = weights(two, "saved", 3)
    for case in cases:
        assert_same_state(whole(tmp_path / case.name), saved_at_two(two))
        model = weights(job, case.name, 0)
        assert all(torch.equal(model[name], weight) for name, weight in end.items()), case.name


@pytest.fixture
def worker() -> Iterator[Workers]:
    """This process, alone."""
    with alone() as workers:
        yield workers


def engine_of(plan: Plan, stage_index: int, workers: Workers, base: State) -> Engine:
    return Engine(build_module(plan, stage_index, base), plan, stage_index, workers)


def batch_of(plan: Plan, stage_index: int, shards: Path, step: int = 0) -> Batch:
    stage = plan.stages[stage_index]
    samples = Samples(open_shards(shards, "train"), plan.data, stage.sequence_length, stage.seed)
    first = stage.first_sample + step * stage.batch_size
    return samples.batch(range(first, first + stage.batch_size))


def by_kind(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """What one worker saves, by kind and parameter, its pieces joined."""
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in engine.save()[0].items():
        kind, name, start = key.split("/")
        assert start == "0", "one worker holds all of it in one piece"
        kinds.setdefault(kind, {})[name] = tensor
    return kinds


@pytest.mark.parametrize("zero", [0, 3])
def test_one_worker_loads_what_two_saved(two: Job, worker: Workers, tiny_sections: dict[str, Any], zero: int) -> None:
    plan = plan_of(tiny_sections, f"zero{zero}_bf16")
    engine = engine_of(plan, FULL, worker, initial_state(plan, seed=7))
    load(engine, two.folder / "checkpoints")
    assert_same_state(by_kind(engine), saved_at_two(two))
    model, end = engine.export_state(), weights(two, "saved", 3)
    assert all(torch.equal(model[name], weight) for name, weight in end.items())
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_initialising_changes_no_bit_and_takes_no_step(
    worker: Workers, tiny_sections: dict[str, Any], zero: int, precision: str
) -> None:
    """DeepSpeed's own bf16 and fp16 round the masters, and under ZeRO-0 take a step, at every stage's start."""
    plan = plan_of(tiny_sections, f"zero{zero}_{precision}")
    base = initial_state(plan)
    engine = engine_of(plan, FULL, worker, base)
    exported, saved = engine.export_state(), by_kind(engine)
    assert exported.keys() == base.keys() == saved["weight"].keys()
    for name, tensor in base.items():
        assert torch.equal(exported[name], tensor), name
        assert torch.equal(saved["weight"][name], tensor.flatten()), name
        assert tensor.ndim < 2 or not torch.equal(tensor, tensor.bfloat16().float()), "no bits to lose"
    assert not any(tensor.any() for kind in ("exp_avg", "exp_avg_sq", "step") for tensor in saved[kind].values())
    engine.close()


def test_fp16_without_zero_takes_the_step_of_fp32(worker: Workers, shards: Path, tiny_sections: dict[str, Any]) -> None:
    """DeepSpeed's own fp16 does not scale the loss there, and divides the gradient by the scale all the same."""
    ends, norms = [], []
    for precision in ("fp32", "fp16"):
        plan = plan_of(tiny_sections, f"zero0_{precision}")
        engine = engine_of(plan, FROZEN, worker, initial_state(plan))
        for step in range(2):
            engine.train_step(batch_of(plan, FROZEN, shards), step, lr_at(plan.stages[FROZEN], step))
        norms.append(engine.scalars()["gradient_norm"])
        ends.append(engine.export_state())
        matrices = [name for name in engine.sizes if name.endswith(".weight") and "LayerNorm" not in name]
        engine.close()
    error, name = worst_of(ends[1], ends[0], initial_state(plan), matrices)
    assert error < 2e-2, name
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.parametrize("clip_norm", [0.0, 0.25])
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_gradients_are_clipped_as_the_plan_says(
    worker: Workers, shards: Path, tiny_sections: dict[str, Any], zero: int, clip_norm: float
) -> None:
    """0 means not at all; DeepSpeed would clip to 1 where nobody says otherwise. After the first step the first moment
    is a tenth of the gradient."""
    plan = plan_of(tiny_sections, f"zero{zero}_fp32", clip_norm=clip_norm)
    engine = engine_of(plan, FULL, worker, initial_state(plan))
    engine.train_step(batch_of(plan, FULL, shards), 0, 0.001)
    norm = engine.scalars()["gradient_norm"]
    assert norm > 1.0, "DeepSpeed's clipping would not be seen"
    moments = by_kind(engine)["exp_avg"].values()
    moved = torch.stack([moment.norm() for moment in moments]).norm().item()
    assert moved == pytest.approx(0.1 * (clip_norm or norm), rel=1e-4)
    engine.close()


def test_a_step_that_reduces_other_bytes_is_refused(
    worker: Workers, shards: Path, tiny_sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny_sections, "zero0_fp32")
    engine = engine_of(plan, FROZEN, worker, initial_state(plan))
    begin_step = engine._optimizer.begin_step

    def and_reduce() -> None:
        worker.start_sum(torch.zeros(10)).wait()
        begin_step()

    monkeypatch.setattr(engine._optimizer, "begin_step", and_reduce)
    with pytest.raises(MsltError, match=r"handed {'all_reduce': 40} bytes.* make {}"):
        engine.train_step(batch_of(plan, FROZEN, shards), 0, 0.001)
    engine.close()


@pytest.mark.parametrize("engine_name", ["zero0_fp32", "zero0_bf16", "zero1_fp32", "zero3_fp32"])
def test_what_is_computed_ahead_changes_no_bit(
    worker: Workers, shards: Path, tiny_sections: dict[str, Any], engine_name: str
) -> None:
    """Dropout is on in all layers, and a step has several micro-batches."""
    plan = plan_of(tiny_sections, engine_name)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    plan = plan.model_copy(update={"model": plan.model.model_copy(update=dropout)})
    assert plan.stages[FROZEN].frozen_dropout
    batches = [batch_of(plan, FROZEN, shards, step) for step in range(3)]
    ends = []
    for upcoming in ([None, None, None], [batches[1], batches[2], None], [batches[1], None, None]):
        engine = engine_of(plan, FROZEN, worker, initial_state(plan))
        sums = []
        for step in range(3):
            sums.append(engine.train_step(batches[step], step, 0.001, upcoming=upcoming[step]))
            is_ahead = upcoming[step] is not None and engine.zero_stage < 3
            assert (engine._ahead is not None) == is_ahead
        ends.append({**engine.export_state(), **{f"sums {step}": found for step, found in enumerate(sums)}})
        engine.close()
    for end in ends[1:]:
        for name, tensor in ends[0].items():
            assert torch.equal(end[name], tensor), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_frozen_layers_are_held_in_the_type_they_compute_with(
    worker: Workers, shards: Path, tiny_sections: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny_sections, f"zero0_{dtype}")
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    seen = []
    for holds in (True, False):
        if not holds:
            monkeypatch.setattr(engine_module, "hold_in", lambda *_: None)
        engine = engine_of(plan, FROZEN, worker, initial_state(plan))
        state = engine.export_state()
        frozen = {name for name in state if ".layer.0." in name or ".layer.1." in name}
        is_low = {name for name, tensor in state.items() if tensor.dtype == low}
        matrices = {name for name in frozen if "LayerNorm" not in name}
        assert is_low == (matrices if holds else set()), "embeddings, LayerNorm and what trains are fp32"
        sums = engine.train_step(batch_of(plan, FROZEN, shards), 0, 0.001)
        evaluated = engine.evaluate_step(batch_of(plan, FROZEN, shards))
        trained = {name: tensor for name, tensor in engine.export_state().items() if name not in frozen}
        seen.append({"sums": sums, "evaluated": evaluated, **trained})
        engine.close()
    for name, tensor in seen[0].items():
        assert torch.equal(tensor, seen[1][name]), name


def test_an_optimizer_that_holds_other_parameters_is_refused(
    worker: Workers, tiny_sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny_sections, "zero1_fp32")
    zero_pieces = engine_module.zero_pieces
    monkeypatch.setattr(engine_module, "zero_pieces", lambda *arguments: zero_pieces(*arguments)[:-1])
    with pytest.raises(MsltError, match=r"optimizes another set of parameters than the plan trains: cls\.seq_relat"):
        engine_of(plan, FROZEN, worker, initial_state(plan))


@pytest.mark.parametrize("engine_name", ["zero0_bf16", "zero1_fp32"])
def test_layers_without_a_graph_train_their_top_in_int8(
    worker: Workers, shards: Path, tiny_sections: dict[str, Any], engine_name: str
) -> None:
    """Eager: compiled or not, the numbers are about the same."""
    exact = plan_of(tiny_sections, engine_name)
    stages = tuple(stage.model_copy(update={"frozen_precision": "int8"}) for stage in exact.stages)
    low = exact.model_copy(update={"stages": stages})
    ends = []
    for plan in (exact, low):
        engine = engine_of(plan, FROZEN, worker, initial_state(plan))
        sums = [engine.train_step(batch_of(plan, FROZEN, shards, step), step, 0.001)[0] for step in range(3)]
        ends.append((torch.stack(sums), engine.export_state()))
        engine.close()
    (sums, state), (low_sums, low_state) = ends
    assert not torch.equal(sums, low_sums)
    torch.testing.assert_close(low_sums, sums, rtol=1e-2, atol=0)
    gone = state.keys() - low_state.keys()
    assert {name.split(".layer.")[1][0] for name in gone} == {"0", "1"}
    assert all("LayerNorm" not in name for name in gone)
    assert not low_state.keys() - state.keys()
    whole = engine_of(low, FULL, worker, initial_state(low))
    assert whole.export_state().keys() == state.keys(), "where all trains nothing is low"
    whole.close()


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_compiled_layers_train_alike_and_are_compiled_in_the_first_step_alone(
    worker: Workers, shards: Path, tiny_sections: dict[str, Any]
) -> None:
    if why_no_compiler("cpu") is not None:
        pytest.skip(f"torch.compile does not work here: {why_no_compiler('cpu')}")
    ends, made = {}, []
    for run, compile_ in enumerate(("none", "frozen", "all", "all")):
        before = compiled_graphs()
        plan = plan_of(tiny_sections, "zero0_bf16", compile=compile_)
        engine = engine_of(plan, FROZEN, worker, initial_state(plan))
        is_compiled = [
            layer._compiled_call_impl is not None for layer in engine._engine.module.model.bert.encoder.layer
        ]
        assert is_compiled == {"none": [False] * 4, "frozen": [True, True, False, False], "all": [True] * 4}[compile_]
        sums = [engine.train_step(batch_of(plan, FROZEN, shards), 0, 0.001)]
        graphs = compiled_graphs()
        made.append(graphs - before)
        evaluated = engine.evaluate_step(batch_of(plan, FROZEN, shards))
        sums += [engine.train_step(batch_of(plan, FROZEN, shards, step), step, 0.001) for step in (1, 2)]
        assert compiled_graphs() == graphs, "neither evaluation nor a later step compiles"
        ends[run] = {"sums": torch.stack(sums), "evaluated": evaluated, **engine.export_state()}
        engine.close()
    eager, frozen, both, again = ends.values()
    assert made == [0, 1, 2, 0], "one for all frozen layers; one for the first that trains, and one for those above"
    for end in (frozen, both):
        torch.testing.assert_close(end["sums"][:, 0], eager["sums"][:, 0], rtol=1e-3, atol=0)
        torch.testing.assert_close(end["evaluated"][0], eager["evaluated"][0], rtol=1e-3, atol=0)
    for name, tensor in both.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.slow
def test_a_compiled_stage_goes_on_from_its_checkpoint_bit_for_bit(
    worker: Workers, shards: Path, tiny_sections: dict[str, Any], tmp_path: Path
) -> None:
    if why_no_compiler("cpu") is not None:
        pytest.skip(f"torch.compile does not work here: {why_no_compiler('cpu')}")
    plan = plan_of(tiny_sections, "zero0_bf16", compile="all")
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    plan = plan.model_copy(update={"model": plan.model.model_copy(update=dropout)})
    batches = [batch_of(plan, FROZEN, shards, step) for step in range(4)]
    undisturbed = engine_of(plan, FROZEN, worker, initial_state(plan))
    for step in range(2):
        undisturbed.train_step(batches[step], step, 0.001, upcoming=batches[step + 1])
    save(undisturbed, tmp_path, 2, worker)
    resumed = engine_of(plan, FROZEN, worker, initial_state(plan))
    load(resumed, tmp_path)
    ends = []
    for engine in (undisturbed, resumed):
        for step in (2, 3):
            engine.train_step(batches[step], step, 0.001)
        ends.append(engine.export_state())
        engine.close()
    for name, tensor in ends[0].items():
        assert torch.equal(ends[1][name], tensor), name


def test_without_a_compiler_on_a_rank_none_compiles_and_says_so(
    worker: Workers, tiny_sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tiny_sections, "zero0_bf16", compile="all")
    monkeypatch.setattr(train_module, "why_no_compiler", lambda device_type: None)
    assert compilable(plan, worker).compile == "all"
    monkeypatch.setattr(train_module, "why_no_compiler", lambda device_type: f"no compiler for {device_type}")
    assert compilable(plan, worker).compile == "none"
    said = "warning: layers are not compiled: torch.compile fails on rank 0 (no compiler for cpu)"
    assert capsys.readouterr().err.strip() == said
