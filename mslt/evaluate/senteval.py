"""SentEval's probing tasks on every hidden state of a checkpoint: accuracy, that of a control task, and intervals.

L hidden states (layers + 1), K sets of labels.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from mslt.data import keyed
from mslt.errors import MsltError
from mslt.evaluate.intervals import packed, wilson
from mslt.evaluate.opening import (
    digest,
    locate,
    open_config,
    open_fitting_tokenizer,
    open_model,
    refuse_without_layers,
    tokenizer_digest,
)
from mslt.evaluate.positions import refuse_over_positions
from mslt.evaluate.probe_features import open_features, standardized, write_features
from mslt.evaluate.probe_tasks import TASKS, ProbeRows
from mslt.evaluate.result import FORMAT, finished
from mslt.files import canonical_json, lock_alone, sha256_text, write_json
from mslt.heads.layer_probe import Features, ProbeTraining, train_probes
from mslt.heads.off_ramp import Pooling
from mslt.models import families
from mslt.plan import lowest_graph_layer
from mslt.provenance import provenance
from mslt.rundir import RunDir, evaluation_folder, read_plan

Classifier = Literal["mlp", "logistic"]
Progress = Callable[[str, int, int], None]  # what is done, how much of it is, of how much
MAX_TOKENS, REPETITIONS = 128, 3
LOGISTIC_C = 0.1


@dataclass(frozen=True)
class Settings:
    """`classifier` mlp is SentEval's search, logistic one fit by L-BFGS with C = 0.1, the same in every repetition but
    for the control's labels. With `standardize` each feature has mean 0 and deviation 1 over the training rows.
    SentEval leaves it out; but [CLS] hardly varies in low layers, and a probe then tells where features are large, not
    where knowledge is. `max_tokens` None: 128, or the model's positions."""

    pooling: Pooling = "cls"
    classifier: Classifier = "mlp"
    standardize: bool = True
    repetitions: int = REPETITIONS
    max_tokens: int | None = None
    max_train_rows: int | None = None
    seed: int = 0

    @property
    def protocol(self) -> str:
        """For titles."""
        features = "standardized features" if self.standardize else "features as they are"
        return f"{self.classifier} on {features}, {self.pooling}"

    @property
    def name(self) -> str:
        """Of a folder of results."""
        return f"senteval-{self.pooling}-{self.classifier}" + ("" if self.standardize else "-raw")


@dataclass(frozen=True)
class Checkpoint:
    """`name` is short, for tables; `source` is what transformers opens. Of a run's stage `title` says more, and so many
    of its lowest hidden states stayed as the stage before had left them."""

    name: str
    source: str
    title: str = ""
    num_frozen: int = 0

    @property
    def label(self) -> str:
        """Of a row that it has for itself."""
        return self.title or self.name

    def folder(self, kind: str, out: Path | None) -> Path:
        """Where results of a kind of probe lie: beside the checkpoint, or below `out`."""
        return evaluation_folder(self.source) / kind if out is None else out / self.name / kind


def checkpoints_of(arguments: Sequence[str], all_stages: bool = False) -> list[Checkpoint]:
    """What the arguments name, by the last two parts of its path or its run and stage; with `all_stages` every finished
    stage of the runs that they are. MsltError for what is no run, and for two of one name."""
    found: list[Checkpoint] = []
    for argument in arguments:
        if all_stages:
            run = RunDir(Path(argument))
            done = [index for index in range(len(read_plan(run).stages)) if run.stage(index).is_done()]
            if not done:
                raise MsltError(f"{argument}: no stage of this run is finished; wait for the first")
            found += [_of_stage(run, index) for index in done]
        else:
            source, origin = locate(argument)
            path = Path(source).resolve() if Path(source).is_dir() else Path(source)
            found.append(Checkpoint(_folder_name(path), source) if origin is None else _of_stage(*origin))
    by_name: dict[str, str] = {}
    for each in found:
        if by_name.setdefault(each.name, each.source) != each.source:
            raise MsltError(f"{by_name[each.name]}, {each.source}: are both called {each.name} in tables; rename a "
                            "folder")  # fmt: skip
    return found


def _folder_name(path: Path) -> str:
    return "-".join(part for part in path.parts[-2:] if part != path.anchor)


def _of_stage(run: RunDir, index: int) -> Checkpoint:
    plan, name = read_plan(run), f"{run.path.resolve().name}-stage-{index + 1}"
    stage = plan.stages[index]
    title = f"{name}: {stage.depth} layers, step {plan.first_step(index) + stage.steps:,}"
    num_frozen = 1 + lowest_graph_layer(stage.trainable, stage.depth)
    return Checkpoint(name, str(run.stage(index).model), title, num_frozen)


@dataclass(frozen=True)
class Planned:
    """What is to be probed, and by task the settings and the result, None where it is still to do."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    protocol: str
    described: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any] | None]


def plan_checkpoint(checkpoint: Checkpoint, data: dict[str, ProbeRows], settings: Settings, folder: Path) -> Planned:
    """What lies in `folder` already is not done again. MsltError for a checkpoint or results that do not fit."""
    config = open_config(checkpoint.source)
    tokenizer = open_fitting_tokenizer(config, checkpoint.source)
    max_tokens = settings.max_tokens or min(MAX_TOKENS, families.num_positions(config))
    refuse_over_positions(config, checkpoint.source, max_tokens, "--max-tokens")
    common = {"format": FORMAT, "checkpoint": digest(checkpoint.source), "tokenizer": tokenizer_digest(tokenizer),
              **asdict(settings), "max_tokens": max_tokens}  # fmt: skip
    if settings.classifier == "logistic":
        common["repetitions"] = 1  # all others would be the same
    described = {
        name: {**common, "task": name, "rows": _digest(rows), "search": _search(settings.classifier, name)}
        for name, rows in data.items()
    }
    results = {name: finished(folder / f"{name}.json", described[name]) for name in data}
    return Planned(checkpoint, tokenizer, folder, settings.protocol, described, results)


def probe_checkpoint(
    planned: Planned,
    data: dict[str, ProbeRows],
    device: torch.device,
    progress: Progress,
    keep_features: bool = False,
) -> list[dict[str, Any]]:
    """The results of the tasks, in the folder a file for each."""
    results, folder, source = dict(planned.results), planned.folder, planned.checkpoint.source
    if None not in results.values():
        return [result for result in results.values() if result is not None]
    model, missing = open_model(source, AutoModel)
    refuse_without_layers(source, missing)
    model.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    for name, described in planned.described.items():
        if results[name] is None:
            found = _probe_task(
                name, data[name], model, planned.tokenizer, described, folder, progress, keep_features
            )  # fmt: skip
            result = {"settings": described, "checkpoint": source, "protocol": planned.protocol, **found,
                      "provenance": provenance()}  # fmt: skip
            write_json(folder / f"{name}.json", result)
            results[name] = result
    return [result for result in results.values() if result is not None]


def _probe_task(
    name: str,
    rows: ProbeRows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    described: dict[str, Any],
    folder: Path,
    progress: Progress,
    keep_features: bool,
) -> dict[str, Any]:
    path = folder.parent / f"features-{described['pooling']}" / f"{name}.npy"
    with lock_alone(folder.parent / ".features.lock", None):  # another classifier may be at work beside this one
        num_cut = _extract(path, name, rows, model, tokenizer, described, progress, keep_features)
        features = open_features(path)
    if described["standardize"]:
        features = standardized(features, rows.splits["tr"])
    runs = [
        _one_run(name, features, rows, described["classifier"],
                 keyed.torch_seed(described["seed"], "probe_repetition", turn), model.device,
                 lambda done, total, turn=turn: progress(f"{name}: probes, {turn}", done, total))  # type: ignore[misc]
        for turn in range(1, described["repetitions"] + 1)
    ]  # fmt: skip
    del features
    with lock_alone(folder.parent / ".features.lock", None):
        if not (_claim(path) or {"keep": False})["keep"]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
    num_test = len(rows.splits["te"])
    accuracy, control, dev = (
        [statistics.fmean(of_layer) for of_layer in zip(*(run[kind] for run in runs), strict=True)]
        for kind in ("accuracy", "control", "dev")
    )
    intervals = [wilson(share, num_test) for share in accuracy]
    return {
        "task": name,
        "rows": {split: len(indices) for split, indices in rows.splits.items()},
        "classes": len(rows.classes),
        "majority": rows.majority,
        "majority_of_test": rows.majority_of_test,
        "dev": dev,
        "accuracy": accuracy,
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "control": control,
        "selectivity": [real - shuffled for real, shuffled in zip(accuracy, control, strict=True)],
        "runs": runs,
        "num_cut": num_cut,
    }


def _extract(
    path: Path,
    name: str,
    rows: ProbeRows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    described: dict[str, Any],
    progress: Progress,
    keep: bool,
) -> int:
    """Write the features, unless these lie there, and whether they are to stay: once asked for, they do. How many
    sentences were cut."""
    claim = path.with_suffix(".json")
    made_of = {key: described[key] for key in ("checkpoint", "tokenizer", "rows", "pooling", "max_tokens")}
    before = _claim(path)
    if before is not None and before["made_of"] == made_of:
        if keep and not before["keep"]:
            write_json(claim, before | {"keep": True})
        return int(before["num_cut"])
    path.parent.mkdir(exist_ok=True)
    claim.unlink(missing_ok=True)
    num_cut = write_features(
        model, tokenizer, rows.texts, path, described["pooling"], described["max_tokens"],
        lambda done, total: progress(f"{name}: sentences", done, total),
    )  # fmt: skip
    write_json(claim, {"made_of": made_of, "num_cut": num_cut, "keep": keep})
    return num_cut


def _claim(path: Path) -> dict[str, Any] | None:
    """What the features in a file are of, beside it; None where they are not there whole, or that is not."""
    try:
        open_features(path)
        found = json.loads(path.with_suffix(".json").read_text())
        return {name: found[name] for name in ("made_of", "num_cut", "keep")}
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError):
        return None


def _one_run(
    name: str,
    features: Features,
    rows: ProbeRows,
    classifier: Classifier,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Real and shuffled labels, of every hidden state."""
    labels_KR = np.stack([rows.labels, shuffled(rows, seed)])
    if classifier == "logistic":
        right_KLR, dev = logistic_probes(features, labels_KR, rows.splits, progress)
        return {"seed": seed, **_told(right_KLR), "dev": dev}
    training = ProbeTraining(num_hidden=TASKS[name].num_hidden)
    found = train_probes(
        features, torch.from_numpy(labels_KR), rows.splits, len(rows.classes), training, seed, progress, device
    )
    return {"seed": seed, **_told(found.right.numpy()), "dev": found.dev[0].tolist(), "l2": found.l2[0].tolist(),
            "epochs": found.epochs[0].tolist()}  # fmt: skip


def _told(right_KLR: np.ndarray) -> dict[str, Any]:
    """Of real and shuffled labels, the test rows that were right: how many, and of the real ones which."""
    accuracy, control = right_KLR.mean(-1).tolist()
    return {"accuracy": accuracy, "control": control, "right": [packed(right_R) for right_R in right_KLR[0]]}


def _search(classifier: Classifier, task: str) -> dict[str, Any]:
    """The numbers a probe is trained by, as JSON has them."""
    if classifier == "logistic":
        return {"C": LOGISTIC_C}
    training = asdict(ProbeTraining(num_hidden=TASKS[task].num_hidden))
    return {**training, "l2": list(training["l2"])}


def shuffled(rows: ProbeRows, seed: int) -> np.ndarray:
    """The control's labels: those of each split in another order, so that there is nothing to learn but how often each
    occurs. A probe that does better on them leaks or is biased; how much it could learn by heart is not seen so (for
    that Hewitt and Liang 2019, arXiv:1909.03368, give each word a label of its own)."""
    labels = rows.labels.copy()
    for split, indices in rows.splits.items():
        order = np.argsort(keyed.bits(seed, f"control_{split}", np.arange(len(indices))), kind="stable")
        labels[indices] = labels[indices[order]]
    return labels


def logistic_probes(
    features: Features,
    labels_KR: np.ndarray,
    splits: dict[str, np.ndarray],
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, list[float]]:
    """Which test rows were right [K, L, R], and the accuracy on the dev rows of the first labels [L]."""
    L = len(features.shift_LD)
    right_KLR = np.zeros((len(labels_KR), L, len(splits["te"])), bool)
    dev: list[float] = []
    for k in range(L):
        x_RD = torch.addcmul(features.shift_LD[k], features.rows_RLD[:, k].float(), features.scale_LD[k]).numpy()
        for of, labels_R in enumerate(labels_KR):
            fit = LogisticRegression(C=LOGISTIC_C, max_iter=1000).fit(x_RD[splits["tr"]], labels_R[splits["tr"]])
            right_KLR[of, k] = fit.predict(x_RD[splits["te"]]) == labels_R[splits["te"]]
            if of == 0:
                dev.append(float(fit.score(x_RD[splits["va"]], labels_R[splits["va"]])))
        progress(k + 1, L)
    return right_KLR, dev


def _digest(rows: ProbeRows) -> str:
    splits = {split: indices.tolist() for split, indices in rows.splits.items()}
    return sha256_text(canonical_json([rows.texts, rows.labels.tolist(), rows.classes, splits]))
