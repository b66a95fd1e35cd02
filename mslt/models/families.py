"""Where each part of a Hugging Face encoder lies: the only file that knows its attribute paths and key names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertForPreTraining, PretrainedConfig, PreTrainedModel

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


def layers(model: PreTrainedModel) -> Iterable[nn.Module]:
    return model.bert.encoder.layer


def embed(model: PreTrainedModel, input_ids_BT: torch.Tensor, token_type_ids_BT: torch.Tensor) -> torch.Tensor:
    """Hidden state 0, [B, T, D]."""
    return model.bert.embeddings(input_ids=input_ids_BT, token_type_ids=token_type_ids_BT)


def mlm_logits(model: PreTrainedModel, h_BMD: torch.Tensor) -> torch.Tensor:
    """[B, M, V]: transform, then the decoder that is tied to the word embeddings."""
    return model.cls.predictions(h_BMD)


def nsp_logits(model: PreTrainedModel, h_BTD: torch.Tensor) -> torch.Tensor:
    """[B, 2], from the pooled first token."""
    return model.cls.seq_relationship(model.bert.pooler(h_BTD))
