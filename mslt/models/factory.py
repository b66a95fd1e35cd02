"""Models from shapes and states: always a fresh module, never an edited one."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mslt.config import ModelConfig
from mslt.errors import MsltError
from mslt.models import families
from mslt.models.surgery import State


def own_state(model: PreTrainedModel) -> State:
    """Every parameter once, under its first name: the decoder's weight is the word embeddings'."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def initial_state(model: ModelConfig, depth: int, seed: int) -> State:
    """A randomly initialised state; the same seed gives the same bits, and torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return own_state(families.pretraining_model(families.hf_config(model, depth)))


def build(model: ModelConfig, depth: int, state: State) -> PreTrainedModel:
    """A pretraining model of `depth` layers holding a copy of `state`, whose names must be exactly its parameters'."""
    with no_init_weights():  # a second for BERT-Base, at every change of stage twice
        built = families.pretraining_model(families.hf_config(model, depth))
    built.tie_weights()
    fill(built, state)
    return built


def fill(model: PreTrainedModel, state: State) -> None:
    """Copy `state` into the model's parameters, in place."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == state.keys(), parameters.keys() ^ state.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def read_config(folder: Path) -> PretrainedConfig:
    """Of a Hugging Face folder. MsltError where there is none, or one of a family that is not written."""
    if not (folder / "config.json").is_file():
        raise MsltError(f"{folder}: no model folder (it has no config.json)")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    families.family_of(config)
    return config


def read_model(folder: Path) -> PreTrainedModel:
    """The model in a Hugging Face folder, in the class its config names, fp32. MsltError where there is none."""
    config = read_config(folder)
    name = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise MsltError(f"{folder}: config.json names the architecture {name}, which transformers does not have")
    return model_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
