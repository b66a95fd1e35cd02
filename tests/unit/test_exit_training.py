"""Ramps trained on a frozen model, all exits trained at once, and taught by the last: D2 of the specification."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mslt.evaluate import exits as exits_module
from mslt.evaluate.exits import (
    PRESETS,
    AllExits,
    RampTraining,
    exit_logits_of,
    exit_losses,
    train_exits,
)
from mslt.evaluate.fine_tune import FineTuning
from mslt.evaluate.glue_data import Row
from mslt.heads.early_exit import EarlyExitModel
from tests.exits import KINDS, batch, classifier, row

ROWS = [Row(str(index), None, index % 2) for index in range(48)]
INPUTS = batch(48)
INPUTS["input_ids"][1::2, 1] = 5  # what tells the labels apart
INPUTS["input_ids"][::2, 1] = 9


def batch_of(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    indices = [int(each.text) for each in rows]
    most = int(INPUTS["attention_mask"][indices].sum(1).max())
    return {**{name: tensor[indices, :most] for name, tensor in INPUTS.items()},
            "labels": torch.tensor([each.label for each in rows])}  # fmt: skip


def quiet(doing: str, done: int, total: int) -> None:
    """Tells nobody."""


def training(**changes: Any) -> RampTraining:
    settings = FineTuning(learning_rate=1e-3, batch_size=16, num_epochs=2, seed=3, warmup_share=0.0, weight_decay=0.1)
    return dataclasses.replace(RampTraining(settings, settings), **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["kept", "computed", "with dropout"])
def test_training_ramps_leaves_every_other_tensor_as_it_was(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "computed":
        monkeypatch.setattr(exits_module, "KEPT_BYTES", 0)
    exits = EarlyExitModel.from_finetuned(classifier(kind))
    model_before = {name: tensor.clone() for name, tensor in exits.model.state_dict().items()}
    ramps_before = {name: tensor.clone() for name, tensor in exits.ramps.state_dict().items()}
    told: list[tuple[str, int, int]] = []
    seen: list[int] = []
    hook = torch.autograd.graph.register_multi_grad_hook(tuple(exits.model.parameters()), lambda g: seen.append(1))
    train_exits(
        exits, ROWS, batch_of, training(backbone_dropout=way == "with dropout"), lambda *each: told.append(each)
    )
    hook.remove()
    for name, tensor in exits.model.state_dict().items():
        assert torch.equal(tensor, model_before[name]), name
    for name, tensor in exits.ramps.state_dict().items():
        assert not torch.equal(tensor, ramps_before[name]), name
    assert all(parameter.grad is None for parameter in exits.model.parameters())
    assert not seen
    assert not exits.training
    once = [("what ramps read, once", 1, 1)] if way == "kept" else []
    assert told == [*once, *(("ramps", batch, 6) for batch in range(1, 7))]


def test_what_trains_are_the_ramps_alone_and_they_are_as_many_as_the_paper_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exits = EarlyExitModel.from_finetuned(classifier(num_labels=3))
    counted = []

    def spy(model: AllExits, *_: Any) -> list[int]:
        counted.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        return []

    monkeypatch.setattr(exits_module, "fine_tune", spy)
    train_exits(exits, ROWS, batch_of, training(), quiet)
    assert counted == [3 * (32 * 32 + 32 + 32 * 3 + 3)]


def test_kept_and_computed_reads_train_the_same_ramps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kept_bytes in (exits_module.KEPT_BYTES, 0):
        monkeypatch.setattr(exits_module, "KEPT_BYTES", kept_bytes)
        exits = EarlyExitModel.from_finetuned(classifier())
        train_exits(exits, ROWS, batch_of, training(), quiet)
        found.append(exits.ramps.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("changes", [{}, {"joint": True}, {"distillation": 0.2}])
def test_ramps_learn(changes: dict[str, Any]) -> None:
    exits = EarlyExitModel.from_finetuned(classifier(initializer_range=0.05))
    labels = torch.tensor([each.label for each in ROWS])
    before = cross_entropy(exit_logits_of(exits, ROWS, batch_of)[1], labels)
    longer = FineTuning(learning_rate=3e-3, batch_size=16, num_epochs=30, seed=3)
    train_exits(exits, ROWS, batch_of, training(ramps=longer, **changes), quiet)
    assert cross_entropy(exit_logits_of(exits, ROWS, batch_of)[1], labels) < 0.9 * before


def test_the_loss_is_the_sum_over_ramps_or_jointly_the_weighted_mean_over_exits() -> None:
    exits, labels = EarlyExitModel.from_finetuned(classifier()), torch.tensor([0, 1] * 24)
    with torch.no_grad():
        logits = exits.all_logits(**INPUTS)
        each = torch.stack([cross_entropy(logits_BC, labels) for logits_BC in logits])
        ramps = AllExits(exits, training())(**INPUTS, labels=labels)
        joint = AllExits(exits, training(joint=True))(**INPUTS, labels=labels)
    torch.testing.assert_close(ramps.loss, each[:3].sum())
    torch.testing.assert_close(joint.loss, (each * torch.tensor([1, 2, 3, 4])).sum() / 10)
    assert torch.equal(ramps.logits, logits.transpose(0, 1))


def test_distillation_is_the_divergence_from_the_last_exit() -> None:
    logits, labels = torch.randn(3, 5, 4), torch.tensor([0, 1, 2, 3, 0])
    p_last = logits[-1].softmax(-1)
    divergence = (p_last * (p_last.log() - logits[0].log_softmax(-1))).sum(-1).mean()
    found = exit_losses(logits, labels, 0.3)
    torch.testing.assert_close(found[0], 0.7 * cross_entropy(logits[0], labels) + 0.3 * divergence)
    torch.testing.assert_close(found[2], cross_entropy(logits[2], labels))
    scores, targets = torch.randn(3, 5, 1), torch.randn(5)
    found = exit_losses(scores, targets, 0.3)
    expected = 0.7 * (scores[1, :, 0] - targets).square().mean() + 0.3 * (scores[1] - scores[2]).square().mean()
    torch.testing.assert_close(found[1], expected)


def test_the_last_exits_answer_teaches_and_does_not_learn() -> None:
    logits = torch.randn(3, 5, 4, requires_grad=True)
    exit_losses(logits, torch.zeros(5, dtype=torch.int64), 1.0)[:2].sum().backward()
    assert logits.grad is not None
    assert not logits.grad[2].any()


def test_kept_logits_are_those_of_each_row_in_its_order() -> None:
    exits = EarlyExitModel.from_finetuned(classifier())
    kept = exit_logits_of(exits, ROWS, batch_of)
    assert kept.shape == (4, 48, 2)
    with torch.no_grad():
        for index in (0, 7, 47):
            torch.testing.assert_close(kept[:, index], exits.all_logits(**row(INPUTS, index))[:, 0], rtol=0, atol=1e-5)


def test_presets_are_the_papers() -> None:
    paper = PRESETS["paper"].ramps
    assert (paper.learning_rate, paper.batch_size, paper.num_epochs) == (2e-5, 8, 3)
    assert (paper.weight_decay, paper.warmup_share, paper.seed) == (0.0, 0.0, 42)
    assert PRESETS["paper"].options.initial == "finetuned"
    assert PRESETS["paper-code"].options.initial == "pretrained"
    for name, epochs in (("paper", 3), ("paper-roberta", 10), ("paper-code", 3), ("paper-code-roberta", 10)):
        assert PRESETS[name].stage_1 == PRESETS[name].ramps
        assert PRESETS[name].ramps.num_epochs == epochs
        assert PRESETS[name].backbone_dropout == name.startswith("paper-code")
