"""M9: our forward pass is Hugging Face's, bit for bit or to 1e-5, and cheaper."""

import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BertForPreTraining

from mslt.config import DataConfig, ModelConfig
from mslt.data.loader import Batch, Samples
from mslt.data.masking import IGNORED_LABEL
from mslt.data.shards import open_shards
from mslt.models import families
from mslt.models import loss as loss_module
from mslt.models.forward import SUMS, PretrainingLoss
from mslt.models.layer_stack import iter_hidden
from mslt.models.loss import head_sums
from mslt.plan import NEXT_SENTENCE_SLOTS


def build(model: ModelConfig, seed: int, attention: str = "sdpa", spread: float = 0.2) -> BertForPreTraining:
    """A model with weights spread enough that logits differ."""
    torch.manual_seed(seed)
    shape = model.model_copy(update={"initializer_range": spread})
    config = families.hf_config(shape, shape.num_hidden_layers)
    config._attn_implementation = attention
    built = families.pretraining_model(config)
    assert built.config._attn_implementation == attention
    return built


def real_batch(shards: Path, seed: int) -> Batch:
    """12 real samples, half of them shorter than 32 tokens: padded tokens and padded predictions."""
    config = DataConfig(shards="", max_predictions=5, short_sequence_probability=0.7)
    batch = Samples(open_shards(shards, "train"), config, 32, seed).batch(range(800))
    is_padded = (batch["attention_mask"] == 0).any(1)
    chosen = torch.cat([is_padded.nonzero()[:6, 0], (~is_padded).nonzero()[:6, 0]])
    batch = {name: tensor[chosen] for name, tensor in batch.items()}
    assert (batch["attention_mask"] == 0).any(1).sum() == 6
    assert (batch["mlm_labels"] == IGNORED_LABEL).any()
    return batch


def labels_BT(batch: Batch) -> torch.Tensor:
    """Labels as Hugging Face wants them: at every position, IGNORED_LABEL where nothing is predicted."""
    labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    for row, (positions, values) in enumerate(zip(batch["mlm_positions"], batch["mlm_labels"], strict=True)):
        used = values != IGNORED_LABEL
        labels[row, positions[used]] = values[used]
    return labels


def hugging_face(model: BertForPreTraining, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, MLM logits at all positions, NSP logits."""
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    out = model(**inputs, labels=labels_BT(batch), next_sentence_label=batch["nsp_labels"])
    return out.loss, out.prediction_logits, out.seq_relationship_logits


def mean_loss(sums: torch.Tensor) -> torch.Tensor:
    by_name = dict(zip(SUMS, sums, strict=True))
    return by_name["mlm_loss"] / by_name["mlm_count"] + by_name["nsp_loss"] / by_name["nsp_count"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_is_hugging_faces(shards: Path, tiny_model: ModelConfig, seed: int, attention: str) -> None:
    model = build(tiny_model, seed, attention).eval()
    batch = real_batch(shards, seed)
    expected, mlm_logits, nsp_logits = hugging_face(model, batch)
    sums = PretrainingLoss(model).eval()(**batch)
    assert sums.dtype == torch.float32
    assert mean_loss(sums).item() == pytest.approx(expected.item(), abs=1e-5)
    labels = labels_BT(batch)
    by_name = dict(zip(SUMS, sums.tolist(), strict=True))
    assert by_name["mlm_count"] == int((labels != IGNORED_LABEL).sum())
    assert by_name["mlm_correct"] == int((mlm_logits.argmax(-1) == labels).sum())
    assert by_name["nsp_count"] == 12
    assert by_name["nsp_correct"] == int((nsp_logits.argmax(-1) == batch["nsp_labels"]).sum())


def test_without_next_sentences_the_loss_is_that_of_mlm_alone(shards: Path, tiny_model: ModelConfig) -> None:
    model, batch = build(tiny_model, 0).eval(), real_batch(shards, 0)
    module = PretrainingLoss(model, next_sentence_prediction=False).eval()
    both, alone = PretrainingLoss(model).eval()(**batch), module(**{**batch, "nsp_labels": torch.full((12,), -100)})
    assert torch.equal(alone, torch.cat([both[:3], torch.zeros(3)]))
    alone[SUMS.index("mlm_loss")].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    slots = {families.slot_of(families.FAMILIES["bert"], name) for name in without}
    assert slots == set(NEXT_SENTENCE_SLOTS)


def test_gradients_are_hugging_faces(shards: Path, tiny_model: ModelConfig) -> None:
    model = build(tiny_model, 0).eval()
    batch = real_batch(shards, 0)
    hugging_face(model, batch)[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mean_loss(PretrainingLoss(model).eval()(**batch)).backward()
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_sums_add_over_micro_batches(shards: Path, tiny_model: ModelConfig) -> None:
    model = PretrainingLoss(build(tiny_model, 0)).eval()
    batch = real_batch(shards, 0)
    parts = [{name: tensor[first : first + 4] for name, tensor in batch.items()} for first in (0, 4, 8)]
    torch.testing.assert_close(sum(model(**part) for part in parts), model(**batch), rtol=1e-5, atol=1e-4)


def test_padded_predictions_and_padded_tokens_change_nothing(shards: Path, tiny_model: ModelConfig) -> None:
    model = PretrainingLoss(build(tiny_model, 0)).eval()
    batch = real_batch(shards, 0)
    changed = dict(batch)
    changed["mlm_positions"] = torch.where(batch["mlm_labels"] == IGNORED_LABEL, 3, batch["mlm_positions"])
    changed["input_ids"] = torch.where(batch["attention_mask"] == 0, 77, batch["input_ids"])
    assert not torch.equal(changed["input_ids"], batch["input_ids"])
    assert not torch.equal(changed["mlm_positions"], batch["mlm_positions"])
    torch.testing.assert_close(model(**changed), model(**batch), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_hidden_states_are_hugging_faces_bit_for_bit(
    shards: Path, tiny_model: ModelConfig, attention: str, padded: bool
) -> None:
    model = build(tiny_model, 3, attention).eval()
    batch = real_batch(shards, 3)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    inputs = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    with torch.no_grad():
        expected = model.bert(
            input_ids=inputs[0], token_type_ids=inputs[1], attention_mask=inputs[2], output_hidden_states=True
        ).hidden_states
        found = list(iter_hidden(model, *inputs))
    assert [k for k, _ in found] == list(range(5))
    assert len(expected) == 5
    for (k, h_BTD), wanted in zip(found, expected, strict=True):
        assert torch.equal(h_BTD, wanted), k
    assert not torch.equal(expected[-1], expected[-2])


def test_hidden_states_are_hugging_faces_with_dropout(shards: Path, tiny_model: ModelConfig) -> None:
    model = build(tiny_model, 3).train()
    batch = real_batch(shards, 3)
    inputs = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    torch.manual_seed(5)
    expected = model.bert(input_ids=inputs[0], token_type_ids=inputs[1], attention_mask=inputs[2]).last_hidden_state
    torch.manual_seed(5)
    *_, (_, found) = iter_hidden(model, *inputs)
    assert torch.equal(found, expected)
    *_, (_, again) = iter_hidden(model, *inputs)
    assert not torch.equal(again, expected), "dropout is on"


def test_hidden_states_are_computed_when_asked_for(shards: Path, tiny_model: ModelConfig) -> None:
    model = build(tiny_model, 0).eval()
    batch = real_batch(shards, 0)
    called = []
    for index, layer in enumerate(families.layers(model)):
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
    for k, _ in iter_hidden(model, batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]):
        assert called == list(range(k))
        if k == 2:
            break
    assert called == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("next_sentences", [True, False])
def test_low_precision_is_torchs_autocast_on_fp32_parameters(
    shards: Path, tiny_model: ModelConfig, dtype: torch.dtype, next_sentences: bool
) -> None:
    model, batch = build(tiny_model, 0).eval(), real_batch(shards, 0)
    module = PretrainingLoss(model, next_sentence_prediction=next_sentences, autocast=dtype).eval()
    computed: set[torch.dtype] = set()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda *told: computed.add(told[2].dtype))
    sums = module(**batch)
    assert computed == {dtype}, "matrix products"
    assert not torch.is_autocast_enabled("cpu")
    assert sums.dtype == torch.float32

    single = PretrainingLoss(model, next_sentence_prediction=next_sentences).eval()(**batch)
    assert torch.float32 in computed
    assert not torch.equal(sums, single)
    torch.testing.assert_close(sums, single, rtol=0.05, atol=1.0)
    with torch.autocast("cpu", dtype=dtype):
        _, mlm_logits, nsp_logits = hugging_face(model, batch)
    labels = labels_BT(batch).flatten()
    expected = cross_entropy(mlm_logits.float().flatten(0, 1), labels, reduction="sum").item()
    assert sums[SUMS.index("mlm_loss")].item() == pytest.approx(expected, rel=2e-3)
    nsp_loss = cross_entropy(nsp_logits.float(), batch["nsp_labels"], reduction="sum").item() if next_sentences else 0.0
    assert sums[SUMS.index("nsp_loss")].item() == pytest.approx(nsp_loss, rel=1e-2)

    (sums[SUMS.index("mlm_loss")] + sums[SUMS.index("nsp_loss")]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, name


def test_a_loss_of_many_positions_is_summed_in_fp32() -> None:
    # 4096 losses of about 7 are over 28,000: in bf16 a sum that large has steps of 128, in fp16 of 16.
    logits_NC, labels_N = torch.randn(4096, 1000, generator=torch.Generator().manual_seed(0)), torch.arange(4096) % 1000
    for dtype in (torch.bfloat16, torch.float16):
        rounded = logits_NC.to(dtype)
        expected = -rounded.double().log_softmax(-1)[torch.arange(4096), labels_N].sum().item()
        loss, _, count = head_sums(rounded, labels_N).tolist()
        assert loss == pytest.approx(expected, rel=1e-6)
        assert count == 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_elements", [1, 300, 2**20])
def test_loss_and_gradient_are_torchs(dtype: torch.dtype, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module._CHUNK_ELEMENTS, "cpu", chunk_elements)
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(100, (37,), generator=generator).masked_fill(torch.arange(37) % 5 == 0, IGNORED_LABEL)
    logits = [(3 * torch.randn(37, 100, generator=generator)).to(dtype).requires_grad_()]
    logits.append(logits[0].detach().clone().requires_grad_())
    sums = head_sums(logits[0], labels_N)
    loss = cross_entropy(logits[1].float(), labels_N, reduction="sum")
    assert sums.dtype == torch.float32
    right = (logits[1].argmax(-1) == labels_N).sum().item()
    torch.testing.assert_close(sums, torch.tensor([loss.item(), right, 29]), rtol=1e-6, atol=0)
    (0.37 * sums[0]).backward()
    (0.37 * loss).backward()
    for each in logits:
        assert each.grad is not None
    torch.testing.assert_close(logits[0].grad, logits[1].grad, rtol=0, atol=1e-7)


def test_logits_are_kept_once_and_as_they_are() -> None:
    logits_NC = torch.randn(64, 1000).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        head_sums(logits_NC, torch.arange(64))
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16, torch.int64]


def test_gathering_before_the_head_is_faster_than_all_positions() -> None:
    shape = ModelConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=8192,
        max_position_embeddings=128,
    )
    model = build(shape, 0, spread=0.02).train()
    ours = PretrainingLoss(model).train()
    positions = torch.stack([torch.randperm(126)[:20].sort().values + 1 for _ in range(4)])
    batch = {
        "input_ids": torch.randint(5, 8192, (4, 128)),
        "token_type_ids": torch.zeros(4, 128, dtype=torch.int64),
        "attention_mask": torch.ones(4, 128, dtype=torch.int64),
        "mlm_positions": positions,
        "mlm_labels": torch.randint(5, 8192, (4, 20)),
        "nsp_labels": torch.tensor([0, 1, 0, 1]),
    }
    seconds: dict[str, list[float]] = {"gathered": [], "all positions": []}
    for _ in range(8):
        for name in seconds:
            started = time.process_time()  # on one thread: the wall clock of a machine of one's own
            loss = mean_loss(ours(**batch)) if name == "gathered" else hugging_face(model, batch)[0]
            loss.backward()
            seconds[name].append(time.process_time() - started)
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    print(medians)
    assert medians["gathered"] < medians["all positions"]
