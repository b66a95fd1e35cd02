"""Early exit beside the plain model and beside one row at a time: D1 to D5, D10 and D11 of the specification, for BERT,
RoBERTa and ELECTRA."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, DistilBertConfig, DistilBertForSequenceClassification

from mslt.errors import MsltError
from mslt.heads.early_exit import EarlyExitModel
from mslt.heads.exit_rule import by_entropy, by_patience, counts, exits_of, expected_saving, left_with
from mslt.heads.off_ramp import RampOptions, pool
from mslt.models import families
from tests.exits import KINDS, batch, classifier, middle_threshold, row, with_exits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_where_nobody_leaves_it_is_the_plain_model_bit_for_bit(kind: str, attention: str) -> None:
    exits, inputs = with_exits(kind), batch()
    exits.model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = exits.model(**inputs).logits
    found = exits(**inputs, rule=by_entropy(0.0))
    assert torch.equal(found.logits, expected)
    assert found.exit_layer.tolist() == [3] * 32
    assert found.entropies.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_batch_answers_as_its_rows_one_by_one(kind: str, pooling: str) -> None:
    exits, inputs = with_exits(kind, pooling=pooling), batch()
    for rule in (by_entropy(middle_threshold(exits, inputs)), by_patience(1), by_patience(2)):
        found = exits(**inputs, rule=rule)
        assert len(set(found.exit_layer.tolist())) >= (2 if rule.patience == 2 else 3), "rows leave at unlike layers"
        for index in range(32):
            alone = exits(**row(inputs, index), rule=rule)
            assert found.exit_layer[index] == alone.exit_layer[0]
            torch.testing.assert_close(found.logits[index], alone.logits[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found.entropies[index], alone.entropies[0], rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_but_rounding(kind: str) -> None:
    exits, inputs = with_exits(kind), batch()
    rule = by_entropy(middle_threshold(exits, inputs))
    found = exits(**inputs, rule=rule)
    wide = {name: torch.nn.functional.pad(tensor, (0, 9)) for name, tensor in inputs.items()}
    padded = exits(**wide, rule=rule)
    assert torch.equal(padded.exit_layer, found.exit_layer)
    torch.testing.assert_close(padded.logits, found.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["entropy", "per layer", "patience"])
def test_cached_logits_give_what_real_runs_give(kind: str, rule: str) -> None:
    """D4 and D6: answers, exits, and the layers times rows that were computed."""
    exits, inputs = with_exits(kind), batch()
    with torch.no_grad():
        logits_EBC = exits.all_logits(**inputs)
    middle = middle_threshold(exits, inputs)
    for chosen in {
        "entropy": [by_entropy(s) for s in (0.0, middle / 2, middle, 0.69, 1.0)],
        "per layer": [by_entropy([middle, 0.0, 1.0]), by_entropy([0.0, 0.0, middle])],
        "patience": [by_patience(t) for t in (1, 2, 3, 4)],
    }[rule]:
        executed: list[int] = []  # rows, of each layer that was called
        hooks = [
            layer.register_forward_hook(lambda _, args, __, executed=executed: executed.append(len(args[0])))
            for layer in families.layers(exits.model)
        ]
        found = exits(**inputs, rule=chosen)
        for hook in hooks:
            hook.remove()
        expected = exits_of(chosen, logits_EBC)
        assert torch.equal(found.exit_layer, expected)
        torch.testing.assert_close(found.logits, left_with(logits_EBC, expected), rtol=0, atol=1e-5)
        saving = expected_saving(counts(expected, 4))
        assert sum(executed) == round((1 - saving) * 4 * 32)
        assert 1 - sum(executed) / (4 * 32) == pytest.approx(saving, abs=1e-12)


@pytest.mark.parametrize("check_every", [2, 3, 0])
def test_asking_the_device_less_often_changes_no_answer(check_every: int) -> None:
    exits, inputs = with_exits(), batch()
    rule = by_entropy(middle_threshold(exits, inputs))
    found, expected = exits(**inputs, rule=rule, check_every=check_every), exits(**inputs, rule=rule)
    assert torch.equal(found.exit_layer, expected.exit_layer)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropies, expected.entropies, rtol=0, atol=1e-5, equal_nan=True)


def test_entropies_end_where_a_row_left_and_all_leave_at_once_above_the_most() -> None:
    exits, inputs = with_exits(num_labels=3), batch()
    found = exits(**inputs, rule=by_entropy(1.1))
    assert found.exit_layer.tolist() == [0] * 32
    assert found.entropies[:, 0].isfinite().all()
    assert found.entropies[:, 1:].isnan().all()
    found = exits(**inputs, rule=by_entropy(middle_threshold(exits, inputs)))
    for at, entropies in zip(found.exit_layer.tolist(), found.entropies, strict=True):
        assert entropies.isnan().tolist() == [k > at for k in range(4)]


def test_padding_goes_with_the_rows_that_needed_it() -> None:
    exits, inputs = with_exits(), batch()
    rule = by_entropy(middle_threshold(exits, inputs))
    short_at_the_end = (exits(**inputs, rule=rule).exit_layer < 3) | (inputs["attention_mask"].sum(1) < 15)
    inputs = {name: tensor[short_at_the_end] for name, tensor in inputs.items()}
    widths: list[tuple[int, int]] = []
    for layer in families.layers(exits.model):
        layer.register_forward_hook(lambda _, args, __: widths.append(tuple(args[0].shape[:2])))
    at, lengths = exits(**inputs, rule=rule).exit_layer, inputs["attention_mask"].sum(1)
    assert widths[1:] == [(int((at >= k).sum()), int(lengths[at >= k].max())) for k in range(1, 4)]
    assert widths[-1][1] < widths[0][1]


def test_left_padding_is_refused() -> None:
    exits, inputs = with_exits(), batch(4)
    left = {name: tensor.flip(1) for name, tensor in inputs.items()}
    first = int((left["attention_mask"][:, 0] == 0).nonzero()[0])
    for run in (exits, exits.all_logits):
        with pytest.raises(MsltError, match=rf"attention_mask: row {first} begins with padding; pad on the right"):
            run(**left)


def test_mean_pooling_is_the_mean_over_tokens() -> None:
    h, mask = torch.randn(3, 5, 7), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    expected = torch.stack([h[0, :2].mean(0), h[1].mean(0), h[2, 0]])
    torch.testing.assert_close(pool(h, mask, "mean"), expected)
    torch.testing.assert_close(pool(h, None, "mean"), h.mean(1))
    assert torch.equal(pool(h, torch.ones_like(mask), "mean"), pool(h, None, "mean"))
    assert torch.equal(pool(h, mask, "cls"), h[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_is_summed_up_in_fp32(dtype: torch.dtype) -> None:
    h, mask = 100 + torch.randn(2, 500, 3), torch.ones(2, 500, dtype=torch.int64)
    expected = h.to(dtype).double().mean(1)
    with torch.autocast("cpu", dtype):
        in_autocast = pool(h.to(dtype).float(), mask, "mean")
    assert in_autocast.dtype == torch.float32
    torch.testing.assert_close(in_autocast.double(), expected, rtol=1e-6, atol=0)
    for given in (mask, None):
        found = pool(h.to(dtype), given, "mean")
        assert torch.equal(found, expected.to(dtype)), "rounded once, at the end"


@pytest.mark.parametrize("kind", KINDS)
def test_a_regression_leaves_by_patience_and_not_by_entropy(kind: str) -> None:
    exits, inputs = with_exits(kind, num_labels=1), batch()
    with pytest.raises(MsltError, match=r"regression has none.*patience"):
        exits(**inputs, rule=by_entropy(0.3))
    found = exits(**inputs, rule=by_patience(1, 0.2))
    assert found.entropies.isnan().all()
    assert len(set(found.exit_layer.tolist())) >= 2
    with torch.no_grad():
        expected = exits.model(**inputs).logits
    torch.testing.assert_close(exits(**inputs, rule=by_patience(9, 0.2)).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_ramps_are_one_fewer_than_layers_and_begin_from_the_finetuned_pooler(kind: str) -> None:
    exits = EarlyExitModel.from_finetuned(classifier(kind, num_labels=3))
    D, C = 32, 3
    assert len(exits.ramps) == 3
    assert sum(p.numel() for p in exits.ramps.parameters()) == 3 * (D * D + D + D * C + C)
    pooler = families.pooler_of(exits.model)
    for ramp in exits.ramps:
        assert torch.equal(ramp.dense.weight, pooler.weight)
        assert torch.equal(ramp.dense.bias, pooler.bias)
        assert not ramp.output.bias.any()
    assert not torch.equal(exits.ramps[0].output.weight, exits.ramps[1].output.weight)


def test_ramps_begin_from_a_given_pooler_or_at_random() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model, before = classifier(), BertForPreTraining(BertConfig(**shape))
    given = EarlyExitModel.from_finetuned(model, RampOptions("pretrained"), poolers=[before])
    assert torch.equal(given.ramps[2].dense.weight, before.bert.pooler.dense.weight)
    one, other = (EarlyExitModel.from_finetuned(model, RampOptions("random"), seed) for seed in (5, 6))
    again = EarlyExitModel.from_finetuned(model, RampOptions("random"), 5)
    assert torch.equal(one.ramps[0].dense.weight, again.ramps[0].dense.weight)
    assert not torch.equal(one.ramps[0].dense.weight, other.ramps[0].dense.weight)
    with pytest.raises(MsltError, match="0 poolers are given"):
        EarlyExitModel.from_finetuned(model, RampOptions("pretrained"))
    with pytest.raises(MsltError, match="no pooler"):
        EarlyExitModel.from_finetuned(model, RampOptions("pretrained"), poolers=[classifier("Electra").electra])


def test_what_is_no_classifier_or_has_one_layer_is_refused() -> None:
    with pytest.raises(MsltError, match="BertModel: is no classifier"):
        EarlyExitModel.from_finetuned(classifier().bert)
    with pytest.raises(MsltError, match="1 layer"):
        EarlyExitModel.from_finetuned(classifier(num_hidden_layers=1))
    config = DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=64)
    with pytest.raises(MsltError, match="model_type distilbert: is not supported; take a classifier of bert, roberta"):
        EarlyExitModel.from_finetuned(DistilBertForSequenceClassification(config))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_several_labels_or_scores_at_once_are_refused(problem: str, tmp_path: Path) -> None:
    exits = with_exits()
    exits.save_pretrained(tmp_path)
    exits.model.config.problem_type = problem
    said = f"problem_type {problem} with 2 outputs: an exit answers with one label"
    with pytest.raises(MsltError, match=said):
        EarlyExitModel.from_finetuned(exits.model)
    with pytest.raises(MsltError, match=said):
        EarlyExitModel.from_pretrained(tmp_path, exits.model)


# Bad batches


def test_bad_batches_are_refused() -> None:
    exits, inputs = with_exits(), batch(4)
    with pytest.raises(MsltError, match=r"input_ids \[0, 20\]: the batch is empty"):
        exits(inputs["input_ids"][:0], inputs["attention_mask"][:0])
    with pytest.raises(MsltError, match="batch is empty"):
        exits(torch.empty(3, 0, dtype=torch.int64))
    inputs["attention_mask"][2] = 0
    with pytest.raises(MsltError, match="row 2 begins with padding"):
        exits(**inputs)
    with pytest.raises(MsltError, match="2 are given; give one for all exits, or 3"):
        exits(**batch(4), rule=by_entropy([0.1, 0.2]))


@pytest.mark.parametrize("check_every", [1, 3, 0])
def test_logits_that_overflow_in_fp16_are_refused(check_every: int) -> None:
    exits, inputs = with_exits(), batch(4)
    with torch.no_grad():
        exits.ramps[1].output.weight.mul_(1e6)
    exits.half()
    with pytest.raises(MsltError, match=r"not finite.*fp32 or bf16"):
        exits(**inputs, rule=by_entropy(0.01), check_every=check_every)


def test_bf16_runs_and_decides_in_fp32() -> None:
    exits, inputs = with_exits().bfloat16(), batch(8)
    found = exits(**inputs, rule=by_entropy(0.5))
    assert found.logits.dtype == found.entropies.dtype == torch.float32


# The folder


@pytest.mark.parametrize("kind", KINDS)
def test_ramps_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    exits, inputs = with_exits(kind, pooling="mean"), batch()
    exits.model.save_pretrained(tmp_path / "model")
    exits.save_pretrained(tmp_path, task="SST-2")
    rule = by_entropy(middle_threshold(exits, inputs))
    for again in (EarlyExitModel.from_pretrained(tmp_path), EarlyExitModel.from_pretrained(tmp_path, exits.model)):
        assert again.options == exits.options
        found, expected = again(**inputs, rule=rule), exits(**inputs, rule=rule)
        for field in dataclasses.fields(found):
            torch.testing.assert_close(
                getattr(found, field.name), getattr(expected, field.name), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ramps_know_their_model_in_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    exits = with_exits()
    exits.save_pretrained(tmp_path)
    again = EarlyExitModel.from_pretrained(tmp_path, classifier().to(dtype))
    assert again.ramps[0].dense.weight.dtype == dtype
    with pytest.raises(MsltError, match=f"ramps of another model: weights .sha256, {str(dtype)[6:]}"):
        EarlyExitModel.from_pretrained(tmp_path, classifier(seed=9).to(dtype))
    exits.to(dtype).save_pretrained(tmp_path / "rounded")  # and what was rounded before, in wider types
    for wider in (dtype, torch.float32):
        EarlyExitModel.from_pretrained(tmp_path / "rounded", classifier().to(dtype).to(wider))


def test_ramps_of_another_model_are_refused(tmp_path: Path) -> None:
    exits = with_exits()
    exits.save_pretrained(tmp_path)
    for other, said in (
        (classifier(seed=9), "weights"),
        (classifier(num_labels=3), "labels 2 there, 3 here"),
        (classifier(num_hidden_layers=5), "layers 4 there, 5 here"),
        (classifier(hidden_size=64), "width 32 there, 64 here"),
    ):
        with pytest.raises(MsltError, match=f"ramps of another model: {said}.*train ramps for this one"):
            EarlyExitModel.from_pretrained(tmp_path, other)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    exits = with_exits()
    with pytest.raises(MsltError, match=r"holds no ramps.*mslt exit train"):
        EarlyExitModel.from_pretrained(tmp_path, exits.model)
    exits.save_pretrained(tmp_path)
    with pytest.raises(MsltError, match="cannot be opened"):
        EarlyExitModel.from_pretrained(tmp_path)
    state = load_file(tmp_path / "ramps.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "ramps.safetensors")
    with pytest.raises(MsltError, match="is not the file that"):
        EarlyExitModel.from_pretrained(tmp_path, exits.model)
    (tmp_path / "ramps.safetensors").unlink()
    with pytest.raises(MsltError, match="cannot be read"):
        EarlyExitModel.from_pretrained(tmp_path, exits.model)
    (tmp_path / "ramps.json").write_text("{}")
    with pytest.raises(MsltError, match="holds no ramps"):
        EarlyExitModel.from_pretrained(tmp_path, exits.model)
