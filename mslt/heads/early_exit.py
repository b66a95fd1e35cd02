"""A classifier whose rows leave when they may: the loop that leaves, and the folder that its ramps are kept in.

B batch, A rows still in it, T tokens, D width, C labels, E exits, as many as layers: exit k stands behind layer k. The
last exit is the model's own head.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from mslt.errors import MsltError
from mslt.files import sha256_file, write_json
from mslt.heads.exit_rule import ExitRule, begun, by_entropy, entropy, leaves, refuse_unfit
from mslt.heads.off_ramp import OffRamp, RampOptions, copy_pooler, new_ramps, pool
from mslt.models import families
from mslt.models.checkpoint import save_state
from mslt.models.layer_stack import iter_hidden, iter_layers
from mslt.provenance import provenance

RAMPS, DESCRIPTION, MODEL = "ramps.safetensors", "ramps.json", "model"
NEVER = by_entropy(0.0)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of weights


@dataclass(frozen=True)
class Exited:
    """`logits` [B, C] of the exit that a row left at, `exit_layer` [B] from 0, `entropies` [B, E] in nats, NaN of exits
    that a row did not come to, or that have none (regression)."""

    logits: torch.Tensor
    exit_layer: torch.Tensor
    entropies: torch.Tensor


class EarlyExitModel(nn.Module):
    """A Hugging Face classifier (BERT, RoBERTa, ELECTRA) and a ramp behind each of its layers but the last."""

    def __init__(self, model: PreTrainedModel, ramps: nn.ModuleList, options: RampOptions) -> None:
        super().__init__()
        self.model = model
        self.ramps = ramps
        self.options = options

    @property
    def num_exits(self) -> int:
        return len(self.ramps) + 1

    @property
    def is_regression(self) -> bool:
        return bool(self.model.config.num_labels == 1)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @classmethod
    def from_finetuned(
        cls,
        model: PreTrainedModel,
        options: RampOptions | None = None,
        seed: int = 0,
        poolers: Sequence[PreTrainedModel] = (),
    ) -> "EarlyExitModel":
        """Ramps still to be trained. Where `options.initial` is `pretrained` or `stages`, `poolers` names the model
        that each begins from, or one for all. Everything goes into evaluation mode. MsltError for a model that is no
        classifier of READABLE, gives several labels or scores at once, or has one layer."""
        refuse_unlike(model)
        chosen = options or RampOptions()
        ramps = new_ramps(model, seed)
        sources = {"finetuned": [model], "random": []}.get(chosen.initial, list(poolers))
        if chosen.initial != "random" and len(sources) not in (1, len(ramps)):
            raise MsltError(f"ramps from {chosen.initial}: {len(sources)} poolers are given; give one, or {len(ramps)}")
        for index, ramp in enumerate(ramps):
            if sources:
                assert isinstance(ramp, OffRamp)
                copy_pooler(ramp, sources[index if len(sources) > 1 else 0])
        return cls(model, ramps, chosen).eval()

    def walk(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, token_type_ids: torch.Tensor | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (k, what exit k reads): of a ramp [B, D], of the last the hidden state [B, T, D]."""
        hidden = iter_hidden(self.model, input_ids, token_type_ids, attention_mask)
        refuse_batch(input_ids, attention_mask)
        next(hidden)
        for number, h_BTD in hidden:
            is_last = number == self.num_exits
            yield number - 1, h_BTD if is_last else pool(h_BTD, attention_mask, self.options.pooling)

    @property
    def exit_heads(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """For each exit, what makes logits [B, C] of what it reads."""
        return [*self.ramps, partial(families.class_logits, self.model)]

    def all_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[E, B, C]: every exit's, nobody leaves."""
        walk = self.walk(input_ids, attention_mask, token_type_ids)
        return torch.stack([head(read) for head, (_, read) in zip(self.exit_heads, walk, strict=True)])

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        rule: ExitRule = NEVER,
        check_every: int = 1,
    ) -> Exited:
        """ids, mask and types [B, T]. Rows that are done leave the batch, and with them the columns that held a token
        of theirs alone; the answers are those of one row at a time. `check_every` lets the device run so many layers
        before it is asked who is done, 0 to the end. MsltError for an empty batch, a row that begins with padding,
        logits that are not finite, and a rule that is not for this model."""
        refuse_unfit(rule, self.num_exits, self.is_regression)
        mask_AT = _unless_all(attention_mask)
        refuse_batch(input_ids, mask_AT)
        B, E, device = len(input_ids), self.num_exits, input_ids.device
        logits_BC = torch.empty(B, self.model.config.num_labels, device=device)
        exit_B = torch.full((B,), E - 1, device=device)
        entropies_EB = torch.full((E, B), torch.nan, device=device)
        rows_A: slice | torch.Tensor = slice(None)  # where in the batch the rows stand that are still in it
        gone_A: torch.Tensor | None = None  # those that are done, but not yet out of it
        kept_A2 = begun(B if rule.patience is not None else 0, device)
        hidden = iter_hidden(self.model, input_ids, token_type_ids, mask_AT)
        next(hidden)
        for k, head in enumerate(self.exit_heads):
            _, h_ATD = next(hidden)
            read = pool(h_ATD, mask_AT, self.options.pooling) if k < E - 1 else h_ATD
            logits_AC = head(read).float()
            entropy_A = entropy(logits_AC)
            if k < E - 1:
                leaving_A, kept_A2 = leaves(rule, k, logits_AC, entropy_A, kept_A2)
            else:
                leaving_A = torch.ones_like(entropy_A, dtype=torch.bool)
            if gone_A is not None:
                leaving_A = leaving_A & ~gone_A
                entropy_A = torch.where(gone_A, torch.nan, entropy_A)
            entropies_EB[k, rows_A] = entropy_A
            is_asked = k == E - 1 or (check_every > 0 and (k + 1) % check_every == 0)
            if is_asked and gone_A is None and not leaving_A.any():
                continue
            logits_BC[rows_A] = torch.where(leaving_A[:, None], logits_AC, logits_BC[rows_A])
            exit_B[rows_A] = torch.where(leaving_A, k, exit_B[rows_A])
            gone_A = leaving_A if gone_A is None else gone_A | leaving_A
            if is_asked and k < E - 1:
                stay_A = (~gone_A).nonzero()[:, 0]
                if not len(stay_A):
                    break
                h_ATD, mask_AT = _compacted(h_ATD, mask_AT, stay_A)
                rows_A = stay_A if isinstance(rows_A, slice) else rows_A[stay_A]
                kept_A2, gone_A = kept_A2[stay_A] if rule.patience is not None else kept_A2, None
                hidden = iter_layers(self.model, h_ATD, mask_AT, k + 1)
        _refuse_overflow(entropies_EB, exit_B)
        if self.is_regression:
            entropies_EB.fill_(torch.nan)
        return Exited(logits_BC, exit_B, entropies_EB.T)

    def save_pretrained(self, folder: str | Path, **more: Any) -> None:
        """Write the ramps and what they belong to into `folder`, which may exist; `more` goes into the
        description. The model itself is only named, by its hash and where it was loaded from."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / DESCRIPTION).unlink(missing_ok=True)
        save_state(path / RAMPS, {name: tensor.detach().cpu() for name, tensor in self.ramps.state_dict().items()})
        config = self.model.config
        own = path / MODEL / "config.json"
        described = {
            "model_sha256": {name: model_hash(self.model, dtype) for name, dtype in TYPES.items()},
            "model": MODEL if own.is_file() else str(self.model.name_or_path),
            "model_type": config.model_type,
            "num_layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "labels": [config.id2label[index] for index in range(config.num_labels)],
            "options": asdict(self.options),
            "ramps_sha256": sha256_file(path / RAMPS),
            **more,
            "provenance": provenance(),
        }
        write_json(path / DESCRIPTION, described)  # last: it makes the folder one of ramps

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel | None = None) -> "EarlyExitModel":
        """Ramps on the model that they were trained on: `model`, in any of TYPES, or without one the model that the
        folder names, in fp32. They go to its device, in its type. MsltError for another model, and for a folder
        without whole ramps."""
        path = Path(folder)
        described = read_description(path)
        found = opened(path, described) if model is None else model
        refuse_another(path, described, found)
        try:
            if sha256_file(path / RAMPS) != described["ramps_sha256"]:
                raise MsltError(f"{path / RAMPS}: is not the file that {DESCRIPTION} speaks of; train the ramps again")
            state = load_file(path / RAMPS)
        except (OSError, SafetensorError) as error:
            raise MsltError(f"{path / RAMPS}: cannot be read ({error}); train the ramps again") from None
        options = RampOptions(**described["options"])
        ramps = new_ramps(found, seed=0)
        ramps.load_state_dict(state)
        return cls(found, ramps, options).eval()


def refuse_unlike(model: PreTrainedModel) -> None:
    """MsltError for a model that exits cannot stand on."""
    config = model.config
    if config.model_type not in families.READABLE:
        raise MsltError(f"model_type {config.model_type}: is not supported; take a classifier of "
                        f"{', '.join(families.READABLE)}")  # fmt: skip
    if not families.is_classifier(model):
        raise MsltError(
            f"{type(model).__name__}: is no classifier; fine-tune it first, and load it with "
            "AutoModelForSequenceClassification"
        )
    if config.problem_type not in (None, "regression" if config.num_labels == 1 else "single_label_classification"):
        raise MsltError(
            f"problem_type {config.problem_type} with {config.num_labels} outputs: an exit answers with one label of "
            "several, or with one score; take a model that was fine-tuned for that"
        )


def refuse_batch(input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None) -> None:
    """MsltError for a batch without rows or tokens, and for a row that begins with padding: exits read the first
    column."""
    if not input_ids_BT.numel():
        raise MsltError(f"input_ids {list(input_ids_BT.shape)}: the batch is empty; give a row with a token, or more")
    if attention_mask_BT is not None and not bool(attention_mask_BT[:, 0].all()):
        row = int((attention_mask_BT[:, 0] == 0).nonzero()[0])
        raise MsltError(f"attention_mask: row {row} begins with padding; pad on the right (the tokenizer's "
                        "padding_side), and leave out rows without a token")  # fmt: skip


def _unless_all(mask_BT: torch.Tensor | None) -> torch.Tensor | None:
    """None where nothing is padding: attention without a mask is the same bits, sooner."""
    return None if mask_BT is None or bool(mask_BT.all()) else mask_BT


def _compacted(
    h_ATD: torch.Tensor, mask_AT: torch.Tensor | None, stay_A: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows that stay, without the last columns, in which none of them has a token."""
    if mask_AT is None:
        return h_ATD[stay_A], None
    mask_AT = mask_AT[stay_A]
    num_used = int(mask_AT.any(0).nonzero()[-1]) + 1
    return h_ATD[stay_A, :num_used], _unless_all(mask_AT[:, :num_used])


def _refuse_overflow(entropies_EB: torch.Tensor, exit_B: torch.Tensor) -> None:
    """MsltError where an exit that a row came to gave logits that are not finite: their entropy is not either."""
    wanted_EB = torch.arange(len(entropies_EB), device=exit_B.device)[:, None] <= exit_B
    if not bool((entropies_EB.isfinite() == wanted_EB).all()):
        k = int((entropies_EB.isfinite() != wanted_EB).any(1).nonzero()[0])
        raise MsltError(
            f"logits at exit {k}: are not finite (65,504 is the most in fp16); load the model in fp32 or bf16"
        )


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder's ramps belong to. MsltError where it holds none."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text())
        _ = described["model_sha256"]["float32"], described["ramps_sha256"], described["labels"], described["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise MsltError(f"{folder}: holds no ramps (no {DESCRIPTION} that can be read); make them with "
                        "`mslt exit train`") from None  # fmt: skip
    return described


def opened(folder: Path, described: dict[str, Any]) -> PreTrainedModel:
    """The model that ramps belong to, fp32."""
    source = folder / MODEL if described["model"] == MODEL else described["model"]
    try:
        return AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise MsltError(f"{source}: the model that {folder} belongs to cannot be opened ({said}); put it there again, "
                        "or train ramps for one that is there") from None  # fmt: skip


def refuse_another(folder: Path, described: dict[str, Any], model: PreTrainedModel) -> None:
    """MsltError where the ramps are another model's, the plain differences first."""
    refuse_unlike(model)
    config = model.config
    dtype = str(model.dtype).removeprefix("torch.")
    for what, theirs, own in (
        ("layers", described["num_layers"], config.num_hidden_layers),
        ("labels", len(described["labels"]), config.num_labels),
        ("width", described["width"], config.hidden_size),
        (f"weights (sha256, {dtype})", described["model_sha256"].get(dtype, "unknown")[:12], None),
    ):
        own = model_hash(model, model.dtype)[:12] if own is None else own
        if theirs != own:
            raise MsltError(
                f"{folder}: ramps of another model: {what} {theirs} there, {own} here; load them onto "
                f"{described['model']}, or train ramps for this one"
            )


def model_hash(model: nn.Module, dtype: torch.dtype) -> str:
    """Of names, shapes and values of all weights, rounded to `dtype`, whatever the device. Rounding cannot be undone,
    so ramps keep the hash in each of TYPES, and are compared in the one that the model is in."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        sha256.update(f"{name} {list(tensor.shape)}".encode())
        sha256.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()
