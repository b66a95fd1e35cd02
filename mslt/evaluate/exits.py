"""Early exit on a task of GLUE: ramps trained, and the logits of all exits over a split, once.

A folder of exits holds `ramps.safetensors`, `ramps.json`, the tokenizer, `model/` where that was trained here, and
`training.json`: what of, and how, so that the same command goes on where it was stopped.

R rows, B batch, E exits, D width, C labels.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from mslt.errors import MsltError
from mslt.evaluate.device import device_name
from mslt.evaluate.fine_tune import FineTuning, Tell, counted, fine_tune, num_steps, predict
from mslt.evaluate.glue import EVALUATION_BATCH, Cell, Source, collate, num_characters, opened, training_rows
from mslt.evaluate.glue_data import Row, read_split
from mslt.evaluate.glue_scores import answers_of, scores
from mslt.evaluate.glue_tasks import PRESETS as PRESETS_OF_GLUE
from mslt.evaluate.glue_tasks import TASKS, Metric, Task
from mslt.evaluate.opening import digest, locate, open_config, open_fitting_tokenizer, open_model, tokenizer_digest
from mslt.evaluate.positions import refuse_over_positions
from mslt.evaluate.result import refuse_other, refused_if_damaged
from mslt.files import sha256_text, write_json
from mslt.heads.early_exit import DESCRIPTION, MODEL, EarlyExitModel, read_description
from mslt.heads.exit_rule import ExitRule
from mslt.heads.off_ramp import RampOptions
from mslt.models import families
from mslt.models.checkpoint import save_fine_tuned
from mslt.provenance import provenance
from mslt.rundir import RunDir, read_plan

TRAINING = "training.json"
KEPT_BYTES = 2 << 30  # of what ramps read; beyond it is computed in every epoch


@dataclass(frozen=True)
class RampTraining:
    """`stage_1` fine-tunes a model that is not yet; `ramps` trains the ramps, the model frozen. With `joint` the ramps'
    settings train both at once, by Σ i L_i / Σ i over the exits i from 1 (PABEE, equation 7). `distillation` is the
    share of the last exit's answer, instead of the label, in a ramp's loss. `backbone_dropout` keeps the frozen model's
    dropout on, as the paper's code does."""

    stage_1: FineTuning
    ramps: FineTuning
    max_tokens: int = 128
    joint: bool = False
    distillation: float = 0.0
    backbone_dropout: bool = False
    options: RampOptions = field(default_factory=RampOptions)


def _of_the_paper(name: str) -> RampTraining:
    """Both stages alike, each with an optimizer and a schedule of its own."""
    preset = PRESETS_OF_GLUE[name]
    stage = FineTuning(
        learning_rate=preset.learning_rates[0],
        batch_size=preset.batch_sizes[0],
        num_epochs=preset.num_epochs,
        seed=42,
        warmup_share=preset.warmup_share,
        weight_decay=preset.weight_decay,
    )
    return RampTraining(stage, stage)


_PAPER, _ROBERTA = _of_the_paper("deebert"), _of_the_paper("deebert-roberta")
_TUNED = FineTuning(learning_rate=5e-5, batch_size=32, num_epochs=2, seed=42)
_RAMPS = FineTuning(learning_rate=1e-3, batch_size=32, num_epochs=3, seed=42, warmup_share=0.0, weight_decay=0.0)
PRESETS = {
    # Xin et al. 2020 (arXiv:2004.12993), section 4.1 and the scripts beside its code.
    "paper": _PAPER,
    "paper-roberta": _ROBERTA,
    # Its code's ramps begin from the pooler before the fine-tuning, of RoBERTa, which has none, at random, and the
    # frozen model's dropout stays on.
    "paper-code": replace(_PAPER, backbone_dropout=True, options=RampOptions("pretrained")),
    "paper-code-roberta": replace(_ROBERTA, backbone_dropout=True, options=RampOptions("random")),
    # Ours.
    "quick": RampTraining(_TUNED, _RAMPS),
}


class AllExits(nn.Module):
    """Every exit's logits, [B, E, C], and the loss of the ramps or, with `settings.joint`, of the whole. What the ramps
    of a frozen model read may be handed in as `read_BED`, with the last exit's `last_BC`."""

    def __init__(self, exits: EarlyExitModel, settings: RampTraining) -> None:
        super().__init__()
        self.exits = exits
        self.settings = settings

    @property
    def device(self) -> torch.device:
        return self.exits.device

    def train(self, mode: bool = True) -> "AllExits":
        super().train(mode)
        if not (self.settings.joint or self.settings.backbone_dropout):
            self.exits.model.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        read_BED: torch.Tensor | None = None,
        last_BC: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        if read_BED is not None and last_BC is not None:
            ramps = [ramp(read_BED[:, k]) for k, ramp in enumerate(self.exits.ramps)]
            logits_EBC = torch.stack([*ramps, last_BC])
        else:
            assert input_ids is not None
            logits_EBC = self.exits.all_logits(input_ids, attention_mask, token_type_ids).float()
        loss = None if labels is None else self._loss(logits_EBC, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_EBC.transpose(0, 1))

    def _loss(self, logits_EBC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        losses = exit_losses(logits_EBC, labels_B, self.settings.distillation)
        if not self.settings.joint:
            return losses[:-1].sum()  # a sum, not a mean: section 3.1
        weights = torch.arange(1, len(losses) + 1, device=losses.device)
        return (weights * losses).sum() / weights.sum()


def exit_losses(logits_EBC: torch.Tensor, labels_B: torch.Tensor, distillation: float) -> torch.Tensor:
    """[E], each a mean over the rows: cross entropy, or with one label the squared error. Of a ramp `distillation` is
    the share of its divergence from the last exit's answer (FastBERT, Liu et al. 2020, arXiv:2004.02178, eq. 7)."""
    is_regression = logits_EBC.shape[-1] == 1
    last_BC = logits_EBC[-1].detach()
    losses = []
    for k, logits_BC in enumerate(logits_EBC):
        loss = mse_loss(logits_BC[:, 0], labels_B) if is_regression else cross_entropy(logits_BC, labels_B)
        if distillation and k < len(logits_EBC) - 1:
            taught = (
                mse_loss(logits_BC, last_BC)
                if is_regression
                else kl_div(logits_BC.log_softmax(-1), last_BC.log_softmax(-1), reduction="batchmean", log_target=True)
            )
            loss = (1 - distillation) * loss + distillation * taught
        losses.append(loss)
    return torch.stack(losses)


def train_exits(
    exits: EarlyExitModel,
    rows: Sequence[Row],
    batch_of: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
    training: RampTraining,
    tell: Tell,
) -> None:
    """Train in place: the ramps alone, or with `training.joint` everything. A frozen model gets no gradient. `tell` is
    called with (what, batches done, batches in all)."""
    exits.model.requires_grad_(training.joint)
    whole = AllExits(exits, training)
    if training.joint or training.backbone_dropout or not _fits(exits, len(rows)):
        _train(whole, rows, batch_of, training.ramps, "all exits" if training.joint else "ramps", tell)
    else:
        read_RED, last_RC = _read_once(exits, rows, batch_of, tell)
        labels = torch.tensor([row.label for row in rows])  # of a regression fp32, else int64

        def kept(indices: Sequence[int]) -> dict[str, torch.Tensor]:
            chosen = torch.as_tensor(indices)
            return {"read_BED": read_RED[chosen], "last_BC": last_RC[chosen], "labels": labels[chosen]}

        _train(whole, range(len(rows)), kept, training.ramps, "ramps", tell)
    exits.requires_grad_(True).eval()


def _train(
    model: Any, rows: Sequence[Any], batch_of: Callable[..., Any], settings: FineTuning, doing: str, tell: Tell
) -> None:
    for _ in fine_tune(model, rows, counted(batch_of, doing, num_steps(len(rows), settings), tell), settings):
        pass


def _fits(exits: EarlyExitModel, num_rows: int) -> bool:
    return num_rows * len(exits.ramps) * exits.model.config.hidden_size * 4 <= KEPT_BYTES


class _Read(nn.Module):
    """What ramps read, [B, E - 1, D], and the last exit's logits [B, C], without a graph."""

    def __init__(self, exits: EarlyExitModel) -> None:
        super().__init__()
        self.exits = exits

    @property
    def device(self) -> torch.device:
        return self.exits.device

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        *read, (k, h_BTD) = self.exits.walk(input_ids, attention_mask, token_type_ids)
        return {"read": torch.stack([each for _, each in read], 1), "last": self.exits.exit_heads[k](h_BTD)}


def _read_once(
    exits: EarlyExitModel, rows: Sequence[Row], batch_of: Callable[[Sequence[Row]], dict[str, torch.Tensor]], tell: Tell
) -> tuple[torch.Tensor, torch.Tensor]:
    counting = counted(batch_of, "what ramps read, once", -(-len(rows) // EVALUATION_BATCH), tell)
    said = predict(_Read(exits), rows, counting, EVALUATION_BATCH, "fp32", num_characters)
    return torch.stack([read for read, _ in said]), torch.stack([last for _, last in said])


def exit_logits_of(
    exits: EarlyExitModel,
    rows: Sequence[Row],
    batch_of: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
    tell: Tell = lambda doing, done, total: None,
) -> torch.Tensor:
    """[E, R, C] fp32 on the CPU, in the order of the rows. MsltError where they are not finite."""
    whole = AllExits(exits, PRESETS["quick"])
    counting = counted(batch_of, "all exits", -(-len(rows) // EVALUATION_BATCH), tell)
    said = predict(whole, rows, counting, EVALUATION_BATCH, "fp32", num_characters)
    logits_ERC = torch.stack([logits_EC for (logits_EC,) in said], 1)
    if not logits_ERC.isfinite().all():
        raise MsltError("logits: are not finite; the weights are damaged, or the training diverged")
    return logits_ERC


@dataclass(frozen=True)
class Opened:
    """A folder of exits, opened for a task."""

    folder: Path
    exits: EarlyExitModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    max_tokens: int

    def batch_of(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return collate(self.task, self.tokenizer, rows, self.max_tokens)

    def scores(self, logits_RC: torch.Tensor, rows: Sequence[Row]) -> dict[str, float]:
        return scores(self.task, answers_of(self.task, logits_RC.numpy()), [row.label for row in rows])  # type: ignore[misc]

    @property
    def metric(self) -> Metric:
        """What the paper reports of the task; of those that it has not, the usual."""
        return PRESETS_OF_GLUE["quick"].headline(self.task.name)


def open_exits(folder: Path, task_name: str | None, device: str) -> Opened:
    """MsltError for a folder without ramps, another model, and a task with other labels."""
    described = read_description(folder)
    exits = EarlyExitModel.from_pretrained(folder)
    name = task_name or described.get("task")
    if name not in TASKS:
        raise MsltError(f"{folder}: is of no task; name one of {', '.join(TASKS)} by --task")
    task = TASKS[name]
    refuse_labels(str(folder), exits.model, task)
    if described.get("task", name) != name:
        raise MsltError(f"{folder}: its ramps were trained on {described['task']}, not on {name}; leave --task out, or "
                        f"train ramps on {name}")  # fmt: skip
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else None  # else the ramps were saved by hand
    tokenizer = open_fitting_tokenizer(exits.model.config, str(exits.model.name_or_path), own)
    exits.to(device)
    longest = families.num_positions(exits.model.config)
    return Opened(folder, exits, tokenizer, task, min(described.get("max_tokens", 128), longest))


def refuse_labels(source: str, model: PreTrainedModel, task: Task) -> None:
    """MsltError where a classifier has other labels than the task, or names them in another order. Names that are not
    the task's, like LABEL_0, cannot tell."""
    wanted = max(len(task.labels), 1)
    if model.config.num_labels != wanted:
        raise MsltError(
            f"{source}: its classifier has {model.config.num_labels} labels, {task.name} takes {wanted}; name the task "
            "that it was fine-tuned on, or begin from a checkpoint that is not fine-tuned"
        )
    own = [str(model.config.id2label[index]) for index in range(wanted)]
    names, wanted_names = ([re.sub(r"[^a-z0-9]", "", name.lower()) for name in each] for each in (own, task.labels))
    if names != wanted_names and sorted(names) == sorted(wanted_names):
        raise MsltError(
            f"{source}: its classifier answers in the order {', '.join(own)}, {task.name} counts its labels in the "
            f"order {', '.join(task.labels)}; put the rows of its output layer, and id2label and label2id in its "
            "config.json, into the task's order, or begin from a checkpoint that is not fine-tuned"
        )


def make_exits(
    source: Source,
    task: Task,
    training: RampTraining,
    out: Path,
    device: str,
    tell: Tell,
    poolers_from: str | None = None,
) -> dict[str, Any]:
    """Train exits for a task and write them to `out`: both stages for a checkpoint that is no classifier yet, the ramps
    alone for one that is. What `out` holds of the same settings is not done again. MsltError for what does not fit,
    before anything is trained, and for a training that diverged."""
    if out.exists() and not (out / TRAINING).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise MsltError(f"{out}: is there, and no empty folder; name another")
    if not 0 <= training.distillation <= 1:
        raise MsltError(f"distillation {training.distillation}: is a share; give 0 to 1")
    config = open_config(source.checkpoint)
    is_tuned = families.is_classifiers_config(config)
    cell = Cell(task.name, training.stage_1, training.max_tokens, False, "accuracy")
    if is_tuned:
        tokenizer = open_fitting_tokenizer(config, source.checkpoint, source.tokenizer)
        model, missing = open_model(source.checkpoint, AutoModelForSequenceClassification)
        if missing:
            raise MsltError(f"{source.checkpoint}: lacks weights ({', '.join(missing[:3])}); it is damaged")
        refuse_labels(source.checkpoint, model, task)
        refuse_over_positions(config, source.checkpoint, training.max_tokens, "--max-tokens")
    else:
        tokenizer, model = opened(source, task, cell)
    poolers = poolers_of(training.options.initial, poolers_from, config.num_hidden_layers)
    EarlyExitModel.from_finetuned(model, training.options, poolers=poolers)  # its mistakes, now
    rows = training_rows(source, task)
    stages = "joint" if training.joint else "ramps" if is_tuned else "both"
    described = {
        "task": task.name, "max_tokens": training.max_tokens, "rows": len(rows), "began_from": source.checkpoint,
        "stages": stages, "training": asdict(training),
    }  # fmt: skip
    settings = {
        "checkpoint": digest(source.checkpoint), "poolers": poolers_from, "tokenizer": tokenizer_digest(tokenizer),
        "data": rows_digest(rows), "task": task.name, **asdict(training),
    }  # fmt: skip
    if (out / TRAINING).is_file():
        _refuse_other(out / TRAINING, settings)
        if (out / DESCRIPTION).is_file():
            EarlyExitModel.from_pretrained(out)  # whole, or an error
            return described
    model.to(device)

    def batch_of(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return collate(task, tokenizer, rows, training.max_tokens)

    def save(tuned: PreTrainedModel) -> None:
        save_fine_tuned(out / MODEL, tuned, tokenizer, {"checkpoint": source.checkpoint, "task": task.name})

    if stages == "both":
        if not (out / MODEL).is_dir():  # else a stopped command left it
            _train(model, rows, batch_of, training.stage_1, "fine-tuning", tell)
            _refuse_diverged(model, "give a lower --learning-rate")
            _claim(out, settings)
            save(model)
        model, _ = open_model(str(out / MODEL), AutoModelForSequenceClassification)
        model.to(device)
    exits = EarlyExitModel.from_finetuned(model, training.options, training.ramps.seed, poolers)
    train_exits(exits, rows, batch_of, training, tell)
    lower = {
        "joint": "give a lower --learning-rate",
        "ramps": "give a lower --ramp-learning-rate",
        "both": f"train ramps on {out / MODEL} with a lower --ramp-learning-rate, into another --out",
    }
    _refuse_diverged(exits if training.joint else exits.ramps, lower[stages])
    _claim(out, settings)
    tokenizer.save_pretrained(out)
    if stages == "joint":
        save(model)
    elif stages == "ramps":
        model.config._name_or_path = str(Path(source.checkpoint).resolve() if Path(source.checkpoint).is_dir()
                                         else source.checkpoint)  # fmt: skip
    exits.save_pretrained(out, **described)
    return described


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """From here on the folder is of these settings."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / TRAINING, settings)


def _refuse_other(path: Path, settings: dict[str, Any]) -> None:
    """MsltError where the folder is of other settings."""
    with refused_if_damaged(path, f"move {path.parent} away, and the same command makes it anew"):
        before = _flat(json.loads(path.read_text()))
    refuse_other(path, before, _flat(settings))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of settings as ramps.learning_rate, so that a difference is named by itself."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}.{each}": own for each, own in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _refuse_diverged(trained: nn.Module, remedy: str) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in trained.parameters()):
        raise MsltError(f"the training diverged: weights are not finite; {remedy}")


def poolers_of(initial: str, poolers_from: str | None, depth: int) -> list[PreTrainedModel]:
    """The models whose poolers ramps begin from: one for all, or of a run the stage whose own layers a ramp stands on,
    the first that is as deep."""
    if initial not in ("pretrained", "stages"):
        return []
    if poolers_from is None:
        what = "the checkpoint before its fine-tuning" if initial == "pretrained" else "the run"
        raise MsltError(f"--ramp-init {initial}: where from? Name {what} by --ramp-init-from")
    if initial == "pretrained":
        return [_pooled(locate(poolers_from)[0])]
    run = RunDir(Path(poolers_from))
    plan = read_plan(run)
    depths = {index: stage.depth for index, stage in enumerate(plan.stages) if run.stage(index).is_done()}
    if max(depths.values(), default=0) < depth - 1:
        raise MsltError(f"{poolers_from}: its finished stages have up to {max(depths.values(), default=0)} layers, the "
                        f"ramps stand behind {depth - 1}; name the run that the model was pretrained in")  # fmt: skip
    chosen = [next(index for index in depths if depths[index] > k) for k in range(depth - 1)]
    opened_stages = {index: _pooled(str(run.stage(index).model)) for index in dict.fromkeys(chosen)}
    return [opened_stages[index] for index in chosen]


def _pooled(source: str) -> PreTrainedModel:
    open_config(source)
    model, missing = open_model(source, AutoModel)
    if any(families.is_pooler(name) for name in missing):
        raise MsltError(f"{source}: holds no pooler; begin from the fine-tuned one, or at random")
    return model


def heldout(task: Task, data_dir: Path | None, is_subset: bool, split: str) -> list[Row]:
    """The rows of a split with labels. MsltError for a split that the task has not, or that has no labels."""
    known = ("train", *task.validation)
    if split not in known:
        raise MsltError(f"--split {split}: {task.name} has {', '.join(known)} with labels")
    return read_split(task, split, data_dir, is_subset)


def rows_digest(rows: Sequence[Row]) -> str:
    return sha256_text(repr(rows))


def identity(opened: Opened) -> dict[str, str]:
    """What tells these exits on this task from others."""
    described = read_description(opened.folder)
    return {
        "task": opened.task.name,
        "model_sha256": described["model_sha256"]["float32"],
        "ramps_sha256": described["ramps_sha256"],
    }


def origin(opened: Opened, rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """Where what is found of these rows comes from: the command's settings, model, ramps, tokenizer, data, device,
    versions."""
    return {
        "settings": settings,
        "model": read_description(opened.folder)["model"],
        **identity(opened),
        "tokenizer": tokenizer_digest(opened.tokenizer),
        "data": {"rows": len(rows), "sha256": rows_digest(rows)},
        "device": device_name(opened.exits.device),
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }


@torch.no_grad()
def run_exits(
    opened: Opened,
    rows: Sequence[Row],
    rule: ExitRule,
    batch_size: int,
    progress: Callable[[int, int], None],
    check_every: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [R, C] and exits [R] of rows that really leave, in the order of the rows; those of like length share a
    batch."""
    order = sorted(range(len(rows)), key=lambda index: num_characters(rows[index]))
    logits_RC = torch.empty(len(rows), max(len(opened.task.labels), 1))
    exit_R = torch.empty(len(rows), dtype=torch.int64)
    for first in range(0, len(rows), batch_size):
        indices = order[first : first + batch_size]
        batch = opened.batch_of([rows[index] for index in indices])
        batch.pop("labels", None)
        inputs = {name: tensor.to(opened.exits.device) for name, tensor in batch.items()}
        found = opened.exits(**inputs, rule=rule, check_every=check_every)
        logits_RC[indices], exit_R[indices] = found.logits.cpu(), found.exit_layer.cpu()
        progress(first + len(indices), len(rows))
    return logits_RC, exit_R
