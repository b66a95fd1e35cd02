"""M4: a grown stage moves exactly its trainable slots, with the full graph's gradients and none of its memory."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.memory import bytes_for_backward
from mslt.config import DataConfig
from mslt.data.loader import Batch, Samples
from mslt.data.shards import open_shards
from mslt.engine.optimizer import Lamb
from mslt.engine.pieces import whole_pieces
from mslt.models import dropout, factory, families
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.freezing import freeze
from mslt.models.layer_stack import iter_hidden
from mslt.models.surgery import State, rebuild
from mslt.plan import Plan, all_slots, layer_slots, lowest_graph_layer


@pytest.fixture
def batch(shards: Path) -> Batch:
    config = DataConfig(shards="", max_predictions=5, short_sequence_probability=0.5)
    return Samples(open_shards(shards, "train"), config, 32, seed=0).batch(range(8))


def grown_state(plan: Plan) -> State:
    """What stage 2 starts from."""
    first = factory.initial_state(plan.model, plan.stages[0].depth, seed=0)
    return rebuild(first, plan.stages[1].sources, families.FAMILIES["bert"])


def stage_module(plan: Plan, trainable: tuple[str, ...], still: tuple[str, ...] = ()) -> PretrainingLoss:
    """The grown model of stage 2 with these slots trainable, in training mode."""
    depth = plan.stages[1].depth
    model = factory.build(plan.model, depth, grown_state(plan))
    dropout.install(model)
    freeze(model, trainable)
    return PretrainingLoss(model, lowest_graph_layer(trainable, depth), still).train()


def loss_of(module: PretrainingLoss, batch: Batch) -> torch.Tensor:
    by_name = dict(zip(SUMS, module(**batch), strict=True))
    return by_name["mlm_loss"] / by_name["mlm_count"] + by_name["nsp_loss"] / by_name["nsp_count"]


def saved_bytes(module: PretrainingLoss, batch: Batch) -> int:
    return bytes_for_backward(lambda: loss_of(module, batch), module.parameters())


@pytest.mark.parametrize("stage_index", [0, 1, 2])
def test_three_steps_move_exactly_the_trainable_slots(tiny_plan: Plan, shards: Path, stage_index: int) -> None:
    stage = tiny_plan.stages[stage_index]
    state = factory.initial_state(tiny_plan.model, stage.depth, seed=1)
    model = factory.build(tiny_plan.model, stage.depth, state)
    freeze(model, stage.trainable)
    module = PretrainingLoss(model, lowest_graph_layer(stage.trainable, stage.depth)).train()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = Lamb(trainable.values(), tiny_plan.optimizer, tiny_plan.clip_norm)
    matrices = [name for name, parameter in trainable.items() if parameter.ndim > 1]
    optimizer.bind(whole_pieces(trainable), matrices, torch.device("cpu"))
    samples = Samples(open_shards(shards, "train"), tiny_plan.data, 32, seed=0)
    torch.manual_seed(0)
    for step in range(3):
        loss_of(module, samples.batch(range(16 * step, 16 * step + 16))).backward()
        optimizer.step()
        assert optimizer.applied
        optimizer.zero_grad()

    held = [id(piece.holder) for piece in optimizer.pieces]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    family = families.family_of(model.config)
    for name, parameter in model.named_parameters():
        is_trainable = families.slot_of(family, name) in stage.trainable
        assert parameter.requires_grad == is_trainable, name
        assert (id(parameter) in held) == is_trainable, name
        assert torch.equal(parameter, state[name]) != is_trainable, name
        assert bool(torch.isfinite(parameter).all())


def test_every_parameter_belongs_to_the_slot_it_hangs_on(tiny_plan: Plan) -> None:
    module = stage_module(tiny_plan, all_slots(4))
    family = families.family_of(module.model.config)
    assert list(families.slot_modules(module.model)) == list(all_slots(4))
    seen: set[int] = set()
    for slot, part in families.slot_modules(module.model).items():
        for name, parameter in module.model.named_parameters():
            if families.slot_of(family, name) == slot:
                assert any(parameter is own for own in part.parameters()), name
                seen.add(id(parameter))
    assert seen == {id(p) for p in module.model.parameters()}


@pytest.mark.parametrize("slot", all_slots(4))
def test_one_slot_alone_can_train(tiny_plan: Plan, batch: Batch, slot: str) -> None:
    module = stage_module(tiny_plan, (slot,))
    loss_of(module, batch).backward()
    family = families.family_of(module.model.config)
    for name, parameter in module.model.named_parameters():
        assert parameter.requires_grad == (families.slot_of(family, name) == slot), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_the_full_graphs_bit_for_bit(tiny_plan: Plan, batch: Batch, seed: int) -> None:
    stage = tiny_plan.stages[1]
    full, frozen = stage_module(tiny_plan, all_slots(4)), stage_module(tiny_plan, stage.trainable)
    losses = []
    for module in (full, frozen):
        torch.manual_seed(seed)
        loss = loss_of(module, batch)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    expected = {name: p.grad for name, p in full.named_parameters()}
    trainable = {name: p for name, p in frozen.named_parameters() if p.requires_grad}
    assert 0 < len(trainable) < len(expected)
    for name, parameter in trainable.items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name]), name
        assert parameter.grad.any(), name
    torch.manual_seed(seed + 100)
    assert not torch.equal(loss_of(frozen, batch), losses[1]), "dropout is on"


def test_tied_decoder_takes_no_gradient_in_a_grown_stage(tiny_plan: Plan, batch: Batch) -> None:
    module = stage_module(tiny_plan, tiny_plan.stages[1].trainable)
    loss_of(module, batch).backward()
    decoder = module.model.cls.predictions.decoder.weight
    assert decoder is module.model.bert.embeddings.word_embeddings.weight
    assert not decoder.requires_grad
    assert decoder.grad is None


@pytest.mark.parametrize(
    ("trainable", "lowest"),
    [(all_slots(4), -1), (("layer.0", "layer.3"), 0), (("layer.2", "layer.3", "pooler"), 2), (("mlm_head",), 4)],
)
@pytest.mark.parametrize("frozen_by", ["requires_grad", "boundary alone"])
def test_graph_begins_above_the_boundary(
    tiny_plan: Plan, batch: Batch, trainable: tuple[str, ...], lowest: int, frozen_by: str
) -> None:
    module = stage_module(tiny_plan, trainable if frozen_by == "requires_grad" else all_slots(4))
    inputs = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    hidden = list(iter_hidden(module.model, *inputs, lowest))
    assert [h.requires_grad for _, h in hidden] == [k > lowest for k, _ in hidden]
    assert [h.grad_fn is not None for _, h in hidden] == [k > lowest for k, _ in hidden]
    assert torch.is_grad_enabled()


def test_no_graph_is_made_under_no_grad(tiny_plan: Plan, batch: Batch) -> None:
    module = stage_module(tiny_plan, all_slots(4))
    inputs = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    with torch.no_grad():
        assert not any(h.requires_grad for _, h in iter_hidden(module.model, *inputs))
        assert not module(**batch).requires_grad


def test_abandoned_walk_leaves_gradients_switched_on(tiny_plan: Plan, batch: Batch) -> None:
    module = stage_module(tiny_plan, tiny_plan.stages[1].trainable)
    inputs = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    for k, _ in iter_hidden(module.model, *inputs, 2):
        assert torch.is_grad_enabled()
        if k == 1:
            break
    assert torch.is_grad_enabled()


def test_frozen_part_keeps_nothing_for_the_backward_pass(tiny_plan: Plan, batch: Batch) -> None:
    heads = ("pooler", "mlm_head", "nsp_head")
    kept = [saved_bytes(stage_module(tiny_plan, (*layer_slots(4 - n, 4), *heads)), batch) for n in range(5)]
    everything = saved_bytes(stage_module(tiny_plan, all_slots(4)), batch)
    print(f"saved bytes with 0 to 4 trainable layers {kept}, with all slots {everything:,}")
    a_layer = [after - before for before, after in pairwise(kept)]
    assert min(a_layer) > 0.99 * max(a_layer), "every trainable layer costs the same, the frozen ones nothing"
    assert everything > kept[4] > 3 * kept[0]
    assert kept[2] < 0.6 * everything, "the grown half"


def modes(module: PretrainingLoss) -> dict[str, set[bool]]:
    """Training modes of all modules of each slot."""
    parts: dict[str, nn.Module] = families.slot_modules(module.model)
    return {slot: {part.training for part in whole.modules()} for slot, whole in parts.items()}


def test_still_slots_stay_in_evaluation_mode(tiny_plan: Plan) -> None:
    stage = tiny_plan.stages[1]
    module = stage_module(tiny_plan, stage.trainable, still=stage.frozen)
    expected = {slot: {slot in stage.trainable} for slot in all_slots(4)}
    assert stage.frozen == ("embeddings", "layer.0", "layer.1")
    assert modes(module) == expected
    module.eval()
    assert modes(module) == {slot: {False} for slot in all_slots(4)}
    assert modes(module.train()) == expected
    assert module.training
    nn.Sequential(module).train()
    assert modes(module) == expected, "also when a module around it is switched"
    assert modes(stage_module(tiny_plan, stage.trainable)) == {slot: {True} for slot in all_slots(4)}


@pytest.mark.parametrize("is_still", [True, False])
def test_frozen_dropout_is_on_unless_asked_for(tiny_plan: Plan, batch: Batch, is_still: bool) -> None:
    stage = tiny_plan.stages[1]
    module = stage_module(tiny_plan, stage.trainable, still=stage.frozen if is_still else ())
    inputs = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        runs.append([h for _, h in iter_hidden(module.model, *inputs, 2)])
    same = [torch.equal(one, other) for one, other in zip(*runs, strict=True)]
    assert same == [is_still] * 3 + [False] * 2
