"""The walker over BERT, RoBERTa and ELECTRA, under any head: every hidden state and every logit is Hugging Face's, bit
for bit."""

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from mslt.models import families
from mslt.models.layer_stack import iter_hidden, iter_layers
from tests.checkpoints import OWN, SHAPE

HEADS = ("ForSequenceClassification", "Model", "ForMaskedLM", "ForPreTraining")
CLASSES = [f"{kind}{head}" for kind in OWN for head in HEADS if f"{kind}{head}" != "RobertaForPreTraining"]


def build(class_name: str, attention: str, **shape: Any) -> PreTrainedModel:
    kind = next(name for name in OWN if class_name.startswith(name))
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": 64, "initializer_range": 0.2, "num_labels": 3, **SHAPE, **OWN[kind], **shape}
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return getattr(transformers, class_name)(config).eval()


def batch(padded: bool, with_types: bool = True) -> dict[str, torch.Tensor]:
    """5 rows of 12 tokens at most; id 0 is padding."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (5, 12), generator=draw)
    mask = torch.ones_like(ids)
    if padded:
        for row, length in enumerate((12, 9, 3, 7, 1)):
            mask[row, length:] = 0
    found = {"input_ids": ids * mask, "attention_mask": mask}
    if with_types:
        found["token_type_ids"] = (torch.arange(12) > 5).long().expand(5, 12) * mask
    return found


def walk(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [
        h for _, h in iter_hidden(model, inputs["input_ids"], inputs.get("token_type_ids"), inputs["attention_mask"])
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("class_name", CLASSES)
@torch.no_grad()
def test_hidden_states_are_hugging_faces_bit_for_bit(class_name: str, padded: bool, attention: str) -> None:
    model = build(class_name, attention)
    inputs = batch(padded, with_types=not class_name.startswith("Roberta"))
    expected = model(**inputs, output_hidden_states=True).hidden_states
    found = walk(model, inputs)
    assert len(found) == len(expected) == 4
    for k, (h, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(h, wanted), k
    assert not torch.equal(found[-1], found[-2])


@pytest.mark.parametrize("class_name", [name for name in CLASSES if name.endswith("Classification")])
@pytest.mark.parametrize("with_types", [True, False])
@torch.no_grad()
def test_logits_are_the_classifiers_own_bit_for_bit(class_name: str, with_types: bool) -> None:
    model = build(class_name, "sdpa", type_vocab_size=2)
    inputs = batch(padded=True, with_types=with_types)
    expected = model(**inputs).logits
    assert expected.shape == (5, 3)
    assert torch.equal(families.class_logits(model, walk(model, inputs)[-1]), expected)


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_a_walk_goes_on_from_any_hidden_state(kind: str) -> None:
    model = build(f"{kind}ForSequenceClassification", "sdpa")
    inputs = batch(padded=True, with_types=False)
    hidden = walk(model, inputs)
    for first in range(4):
        on = list(iter_layers(model, hidden[first], inputs["attention_mask"], first))
        assert [k for k, _ in on] == list(range(first + 1, 4))
        assert all(torch.equal(h, hidden[k]) for k, h in on)


@torch.no_grad()
def test_roberta_takes_no_position_for_padding_and_electra_projects() -> None:
    roberta, inputs = build("RobertaModel", "sdpa"), batch(padded=True, with_types=False)
    left = {name: tensor.flip(1) for name, tensor in inputs.items()}  # row 4: its one token last
    assert torch.equal(walk(roberta, left)[0][4, -1], walk(roberta, inputs)[0][4, 0])
    electra = build("ElectraModel", "sdpa")
    assert electra.config.embedding_size == 16
    assert walk(electra, inputs)[0].shape == (5, 12, 32)


def test_the_activation_behind_the_pooler_is_the_heads_own() -> None:
    x = torch.linspace(-3, 3, 50)
    for kind, expected in (("Bert", torch.tanh), ("Roberta", torch.tanh)):
        assert torch.equal(families.pooler_activation(build(f"{kind}Model", "sdpa").config)(x), expected(x))
    electra = build("ElectraForSequenceClassification", "sdpa")
    assert torch.equal(families.pooler_activation(electra.config)(x), electra.classifier.activation(x))
