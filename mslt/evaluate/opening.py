"""Anybody's checkpoint, opened as it is: nothing that it lacks is made up, but for a head that is to be trained.

A checkpoint is named by a folder (a model's, a stage's or a run's) or by a name on the hub.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_text
from mslt.models import families
from mslt.models.checkpoint import folder_digest
from mslt.rundir import RunDir, find_model

T = TypeVar("T")
# What transformers, tokenizers and safetensors raise at files that are damaged, of another kind or not there.
_CANNOT_OPEN = (
    OSError, ValueError, LookupError, AttributeError, ImportError, RuntimeError, TypeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip


def locate(checkpoint: str) -> tuple[str, tuple[RunDir, int] | None]:
    """What transformers opens for it, and the run and stage index it is of. MsltError for a folder without a model, and
    for a path that is none."""
    if not Path(checkpoint).is_dir():
        owner, slash, name = checkpoint.partition("/")  # of a model on the hub
        if owner in ("", ".", "..") or "/" in name or (slash and Path(owner).exists()):
            raise MsltError(f"{checkpoint}: no such folder; name that of a checkpoint, of a stage or of a run, or a "
                            "model on the hub as OWNER/NAME")  # fmt: skip
        return checkpoint, None
    folder, origin = find_model(Path(checkpoint))
    if not (folder / "config.json").is_file():
        raise MsltError(f"{folder}: no model folder (it has no config.json); name the folder of a checkpoint, of a "
                        "stage or of a run")  # fmt: skip
    return str(folder), origin


def open_config(source: str) -> PretrainedConfig:
    """MsltError where there is none, or one of another kind of model."""
    config = _opened("checkpoint", source, lambda: AutoConfig.from_pretrained(source))
    if config.model_type not in families.READABLE:
        raise MsltError(f"{source}: model_type {config.model_type} is not supported; take one of "
                        f"{', '.join(families.READABLE)}")  # fmt: skip
    return config


def open_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """MsltError where there is none: transformers then makes one up, of special tokens alone."""
    tokenizer = _opened("tokenizer", source, lambda: AutoTokenizer.from_pretrained(source))
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise MsltError(f"{source}: holds no tokenizer; copy the files of the one that it was trained with there")
    return tokenizer


def open_fitting_tokenizer(config: PretrainedConfig, source: str, other: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's own, or the one that `other` names. MsltError where it has entries that the model of `config`
    has no embedding of, or pads with another, and where both are there and differ."""
    tokenizer = open_tokenizer(other or source)
    remedy = "copy the files of the one that it was trained with there, or give it by --tokenizer"
    if len(tokenizer) > config.vocab_size:
        raise MsltError(
            f"{other or source}: its tokenizer has {len(tokenizer):,} entries, the model in {source} embeddings of "
            f"{config.vocab_size:,}; {remedy}"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != config.pad_token_id:
        raise MsltError(
            f"{other or source}: its tokenizer pads with entry {tokenizer.pad_token_id}, the model in {source} with "
            f"{config.pad_token_id}; {remedy}"
        )
    if other is not None and (own := _own_tokenizer(source)) is not None:
        apart = vocabulary_difference(own.get_vocab(), tokenizer.get_vocab())
        if apart is not None:
            raise MsltError(f"{other}: is another tokenizer than the one in {source} ({apart}); leave out --tokenizer, "
                            "or take away the one there if it is the wrong one")  # fmt: skip
    return tokenizer


def _own_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    try:
        return open_tokenizer(source)
    except MsltError:
        return None


def open_model(source: str, auto_class: Any, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model under one of transformers' Auto classes, fp32, without dropout, and the names of its weights that the
    checkpoint does not hold, or not in that shape, which are random."""
    model, found = _opened(
        "weights",
        source,
        lambda: auto_class.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **options),
    )
    unlike = [name for name, *_ in found["mismatched_keys"]]
    return model.eval(), sorted({*found["missing_keys"], *unlike})


def open_with_new_head(
    source: str, auto_class: Any, seed: int, new_pooler: bool = False, **options: Any
) -> PreTrainedModel:
    """The encoder under a head to be trained, which is drawn with `seed`, whatever head the checkpoint has. MsltError
    where it lacks more than that: its pooler (unless `new_pooler` is to be drawn, too), or any other part."""
    torch.manual_seed(seed)
    model, missing = open_model(source, auto_class, ignore_mismatched_sizes=True, **options)
    prefix = f"{model.base_model_prefix}."
    held = [name for name, _ in model.named_parameters() if not name.startswith(prefix) and name not in missing]
    if held:  # of another task, or of this one
        fresh = type(model)(model.config)
        with torch.no_grad():
            for name in held:
                model.get_parameter(name).copy_(fresh.get_parameter(name))
    lacking = [name for name in missing if name.startswith(prefix)]
    refuse_without_layers(source, lacking)
    if lacking and not new_pooler:
        raise MsltError(
            f"{source}: has no pooler, on which this model's classifier stands; take a checkpoint that has one, or let "
            "--new-pooler draw one at random"
        )
    return model


def refuse_without_layers(source: str, missing: list[str]) -> None:
    """MsltError where more than a pooler is missing."""
    lacking = [name for name in missing if not families.is_pooler(name)]
    if lacking:
        more = ", …" * (len(lacking) > 3)
        raise MsltError(
            f"{source}: lacks weights of its encoder ({', '.join(lacking[:3])}{more}); its config.json is another "
            "model's, or it is damaged"
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells two tokenizers apart: all that a fast one does, of a slow one its entries."""
    does = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else canonical_json(tokenizer.get_vocab())
    return sha256_text(does)


def digest(source: str) -> str:
    """What tells two checkpoints apart: of a folder a hash of its weights and config, of a hub name the commit."""
    folder = Path(source)
    if not folder.is_dir():
        return f"{source} at {open_config(source)._commit_hash}"
    return folder_digest(folder)


def tuned_on(source: str) -> str | None:
    """The task that a folder of ours says its model was fine-tuned on; None where none is said."""
    return _origin(source).get("task")


def grown_from(source: str) -> dict[str, Any] | None:
    """What `mslt grow` says of a folder: the digest of its `parent`, and which `layers` of that it has; None where it
    did not write it."""
    found = _origin(source)
    if not {"sources", "parent_sha256"} <= found.keys():
        return None
    return {"parent": found["parent_sha256"], "layers": found["sources"]}


def _origin(source: str) -> dict[str, Any]:
    path = Path(source) / "provenance.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise MsltError(f"{path}: cannot be read; remove it, or take the folder from where it came") from None


def vocabulary_difference(first: dict[str, int], second: dict[str, int]) -> str | None:
    """What tells two vocabularies apart, entry → id, None where nothing does."""
    apart = sorted(entry for entry in first.keys() | second.keys() if first.get(entry) != second.get(entry))
    if not apart:
        return None
    there, here = (f"is {found[apart[0]]}" if apart[0] in found else "is missing" for found in (first, second))
    sizes = f"{len(first):,} and {len(second):,} entries, {len(apart):,} unlike"
    return f"{sizes}: {apart[0]!r} {there} in the one and {here} in the other"


def _opened(what: str, source: str, open_it: Callable[[], T]) -> T:
    try:
        return open_it()
    except _CANNOT_OPEN as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise MsltError(f"{source}: no {what} that transformers can open ({said[:300]}); name the folder of a "
                        "checkpoint, of a stage or of a run, or a model on the hub") from None  # fmt: skip
