"""Model files: the stage base (one safetensors file, fp32) and the model folder (plain Hugging Face)."""

import copy
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_file, sha256_text, whole_file, whole_folder, write_json, write_text
from mslt.growth import Sources
from mslt.models import families
from mslt.models.factory import fill, own_state, read_model
from mslt.models.surgery import State, num_layers, rebuild
from mslt.provenance import provenance

WEIGHTS = re.compile(r"\.(safetensors|bin|h5|msgpack|onnx|ckpt)(\.index\.json)?$")


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """What safetensors says in words alone when it cannot write, as the OSError it was: a full disk above all."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error), str(path)) from error


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. OSError where it cannot be written."""
    with system_errors(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def save_state(path: Path, state: State, metadata: dict[str, str] | None = None) -> None:
    with whole_file(path) as temporary:
        write_tensors(temporary, state, metadata)


def load_state(path: Path) -> State:
    return load_file(path)


def save_base(path: Path, description: Path, state: State, origin: dict[str, Any]) -> None:
    """Write what a stage starts from, then the description that commits it: sha256 and where it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(path, state)
    write_json(description, {"sha256": sha256_file(path), **origin})


def save_model_folder(path: Path, model: PreTrainedModel, tokenizer: Path, origin: dict[str, Any], card: str) -> None:
    """A folder that `AutoModelForPreTraining.from_pretrained` and `AutoTokenizer.from_pretrained` load as it is, with
    a model card for the hub."""
    with whole_folder(path) as temporary, system_errors(path):
        model.save_pretrained(temporary)
        for file in tokenizer.iterdir():
            shutil.copy(file, temporary / file.name)
        write_text(temporary / "README.md", card)
        write_json(temporary / "provenance.json", origin)


def save_fine_tuned(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, origin: dict[str, Any]
) -> None:
    """A folder that transformers' Auto classes load as it is."""
    with whole_folder(path) as temporary, system_errors(path):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "provenance.json", {**origin, **provenance()})


def folder_digest(folder: Path) -> str:
    """What tells two folders of checkpoints apart: a hash of their weights and config."""
    files = sorted(file for file in folder.iterdir() if WEIGHTS.search(file.name) or file.name == "config.json")
    return sha256_text(canonical_json([(file.name, sha256_file(file)) for file in files]))


def grow_folder(source: Path, out: Path, sources: Sources, seed: int) -> tuple[int, int]:
    """Rebuild the checkpoint in `source` by an index map and write it to `out`, with all other files carried over.

    Returns the number of layers before and after. MsltError when `out` exists or `sources` names no layer of it.
    """
    if out.exists():
        raise MsltError(f"{out}: exists; name a folder that does not")
    model = read_model(source)
    family = families.family_of(model.config)
    before = own_state(model)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(sources)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.torch_seed(seed, "initialise", 0))
        grown = type(model)(config)
    fill(grown, rebuild(before, sources, family, own_state(grown)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as temporary, system_errors(out):
        grown.save_pretrained(temporary)
        for file in source.rglob("*"):
            carried = temporary / file.relative_to(source)
            if file.is_file() and not carried.exists() and not WEIGHTS.search(file.name):
                carried.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, carried)
        origin = {"parent": str(source), "parent_sha256": folder_digest(source), "sources": sources}
        write_json(temporary / "provenance.json", {**origin, **provenance()})
    return num_layers(before, family), len(sources)
