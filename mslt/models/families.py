"""Where each part of a Hugging Face encoder lies: the only file that knows its attribute paths and key names."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertForPreTraining, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from mslt.config import ModelConfig
from mslt.errors import MsltError


@dataclass(frozen=True)
class Family:
    """`layer_key` finds a layer's number in the parameter names of any of its models, `slot_prefixes` the slot of
    every other parameter of its pretraining model."""

    layer_key: re.Pattern[str]
    slot_prefixes: dict[str, str]


FAMILIES = {
    "bert": Family(
        layer_key=re.compile(r"^(?P<before>(?:.*\.)?encoder\.layer\.)(?P<layer>\d+)(?P<after>\..+)$"),
        slot_prefixes={
            "bert.embeddings.": "embeddings",
            "bert.pooler.": "pooler",
            "cls.predictions.": "mlm_head",
            "cls.seq_relationship.": "nsp_head",
        },
    ),
}


READABLE = ("bert", "roberta", "electra")  # model types that are read as they are, through transformers' own heads


def family_of(config: PretrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        raise MsltError(f"model_type {config.model_type}: not supported; take one of {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def slot_of(family: Family, parameter_name: str) -> str:
    """The plan's slot that a parameter of a pretraining model belongs to."""
    layer = family.layer_key.match(parameter_name)
    if layer:
        return f"layer.{layer['layer']}"
    return next(slot for prefix, slot in family.slot_prefixes.items() if parameter_name.startswith(prefix))


def num_positions(config: PretrainedConfig) -> int:
    """The most tokens of a sequence; RoBERTa's first is at the position behind the padding entry's."""
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    return int(config.max_position_embeddings - first)


def is_pooler(parameter_name: str) -> bool:
    """Whether it is of the part that classifiers stand on, which not all checkpoints have."""
    return "pooler" in parameter_name.split(".")


def hf_config(model: ModelConfig, depth: int) -> BertConfig:
    shape = model.model_dump(exclude={"family", "num_hidden_layers"})
    return BertConfig(num_hidden_layers=depth, **shape, architectures=["BertForPreTraining"])


def pretraining_model(config: BertConfig) -> BertForPreTraining:
    """Weights from torch's generator, N(0, initializer_range); word embeddings and decoder are one tensor."""
    return BertForPreTraining(config)


def slot_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The module of each slot."""
    modules: dict[str, nn.Module] = {"embeddings": model.bert.embeddings}
    modules |= {f"layer.{index}": layer for index, layer in enumerate(layers(model))}
    return modules | {
        "pooler": model.bert.pooler,
        "mlm_head": model.cls.predictions,
        "nsp_head": model.cls.seq_relationship,
    }


def layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Of any model of READABLE."""
    return model.base_model.encoder.layer


def encoder(model: PreTrainedModel) -> nn.ModuleDict:
    """Embeddings and layers of any model of READABLE under names of ours, without what stands on them."""
    base = model.base_model
    parts: dict[str, nn.Module] = {"embeddings": base.embeddings, "layers": nn.ModuleList(layers(model))}
    if hasattr(base, "embeddings_project"):
        parts["projection"] = base.embeddings_project
    return nn.ModuleDict(parts)


def embed(
    model: PreTrainedModel,
    input_ids_BT: torch.Tensor,
    token_type_ids_BT: torch.Tensor | None = None,
    words_BTE: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden state 0, [B, T, D], of any model of READABLE: what goes into layer 0, so in ELECTRA after the projection
    to the layers' width. RoBERTa reads positions from ids: a padding entry takes none. `words_BTE` stands in for the
    ids' word embeddings; with these it is bit-equal."""
    base = model.base_model
    given: dict[str, torch.Tensor] = {"input_ids": input_ids_BT}
    if words_BTE is not None:
        given = {"inputs_embeds": words_BTE}
        if model.config.model_type == "roberta":
            is_token_BT = (input_ids_BT != model.config.pad_token_id).long()
            given["position_ids"] = is_token_BT.cumsum(1) * is_token_BT + model.config.pad_token_id
    h_BTD = base.embeddings(**given, token_type_ids=token_type_ids_BT)
    return base.embeddings_project(h_BTD) if hasattr(base, "embeddings_project") else h_BTD


def words_of(model: PreTrainedModel) -> nn.Embedding:
    """The word embeddings [V, E]; E is the layers' width but in ELECTRA."""
    return model.get_input_embeddings()


def copy_of_top(model: PreTrainedModel) -> nn.Module:
    """A layer that may follow the last, with its weights."""
    layer = copy.deepcopy(layers(model)[-1])
    for part in layer.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = len(layers(model))  # type: ignore[assignment]
    return layer


def mlm_head_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of a model of transformers' for masked words: `dense` D → E, `norm`, and the `bias` [V] of a decoder whose matrix
    is the word embeddings."""
    if model.config.model_type == "bert":
        transform = model.cls.predictions.transform
        dense, norm, decoder = transform.dense, transform.LayerNorm, model.cls.predictions.decoder
    elif model.config.model_type == "roberta":
        dense, norm, decoder = model.lm_head.dense, model.lm_head.layer_norm, model.lm_head.decoder
    else:
        predictions = model.generator_predictions
        dense, norm, decoder = predictions.dense, predictions.LayerNorm, model.generator_lm_head
    return {"dense.weight": dense.weight, "dense.bias": dense.bias, "norm.weight": norm.weight,
            "norm.bias": norm.bias, "bias": decoder.bias}  # fmt: skip


def mlm_activation(config: PretrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What follows `dense` there: a setting in BERT alone."""
    return ACT2FN[config.hidden_act if config.model_type == "bert" else "gelu"]


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether it answers with logits of one token sequence."""
    return type(model).__name__.endswith("ForSequenceClassification")


def is_classifiers_config(config: PretrainedConfig) -> bool:
    """Whether the weights beside it are a classifier's."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def class_logits(model: PreTrainedModel, h_BTD: torch.Tensor) -> torch.Tensor:
    """[B, C] of a classifier's own head on the last hidden state."""
    if model.config.model_type == "bert":
        return model.classifier(model.dropout(model.bert.pooler(h_BTD)))
    return model.classifier(h_BTD)


def pooler_of(model: PreTrainedModel) -> nn.Linear | None:
    """The matrix product [D, D] between the first token and an output layer: BERT's pooler; of a classifier without
    one, RoBERTa's and ELECTRA's, their head's first. None where there is neither."""
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        return pooler.dense
    return model.classifier.dense if is_classifier(model) else None


def pooler_activation(config: PretrainedConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What follows that product."""
    return nn.functional.gelu if config.model_type == "electra" else torch.tanh


def mlm_logits(model: PreTrainedModel, h_BMD: torch.Tensor) -> torch.Tensor:
    """[B, M, V]: transform, then the decoder that is tied to the word embeddings."""
    return model.cls.predictions(h_BMD)


def nsp_logits(model: PreTrainedModel, h_BTD: torch.Tensor) -> torch.Tensor:
    """[B, 2], from the pooled first token."""
    return model.cls.seq_relationship(model.bert.pooler(h_BTD))
