"""What `mslt pool train` does: heads of one task, seed by seed, written as files; on encoders fine-tuned for more or
fewer epochs where that is asked for (BERTVision, Figure 1)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mslt.errors import MsltError
from mslt.evaluate.fine_tune import FineTuning, counted, fine_tune, num_steps
from mslt.evaluate.fine_tune import Tell as Progress
from mslt.evaluate.opening import digest
from mslt.evaluate.pool import (
    Backbone,
    BatchOf,
    Diverged,
    Pooled,
    from_cache,
    frozen,
    head_settings,
    on_the_fly,
    open_whole,
    rows_of_epochs,
    score_heads,
    score_whole,
    speedup_of_layers,
    states_of,
    train_heads,
    whole_batch_of,
)
from mslt.evaluate.pool_cache import StatesCache, make_cache
from mslt.evaluate.pool_data import Collate, PoolTask, collate_of, rows_digest
from mslt.evaluate.result import finished
from mslt.files import lock_alone, write_json
from mslt.heads.pooling import (
    HeadSettings,
    PadStates,
    Pooler,
    Tokens,
    new_head,
    refuse_unfit,
    save_head,
    sizes_of,
    states_of_all,
)
from mslt.models.checkpoint import save_fine_tuned
from mslt.provenance import provenance

Tell = Callable[[str], None]
BACKBONE = "backbone"


@dataclass(frozen=True)
class CacheOptions:
    """Below `folder` each task's training rows have a folder of their own."""

    folder: Path
    dtype: str = "bf16"
    max_gb: float = 10.0


@dataclass(frozen=True)
class Heads:
    """All heads that are asked for: every pooler with every width, and each of them with every seed. Those of a seed
    share every pass."""

    training: FineTuning
    poolers: tuple[Pooler, ...] = ("adapter",)
    adapter_widths: tuple[int, ...] = (16,)
    layers: str = "all"
    tokens: Tokens = "flatten"
    pad_states: PadStates = "zero"
    skip: bool = False
    seeds: tuple[int, ...] = (0,)

    def settings(self, task: PoolTask, backbone: Backbone) -> list[HeadSettings]:
        """MsltError where one of them cannot be, and for several in fp16."""
        config = backbone.model.config
        states = states_of(self.layers, config.num_hidden_layers)
        every = [
            head_settings(task, config.hidden_size, states, pooler, width, self.tokens, self.pad_states, self.skip)
            for pooler, width in product(self.poolers, self.adapter_widths)
        ]
        for each in every:
            refuse_unfit(each, config.num_hidden_layers)
        if self.training.precision == "fp16" and len(every) > 1:
            raise MsltError(
                "--precision fp16: the loss is scaled for all heads of a pass, and one that overflows would stop the "
                "others; give bf16 or fp32, or one --pooler and one --adapter-width at a time"
            )
        return every


def name_of(task: str, settings: HeadSettings, seed: int) -> str:
    """A head's folder."""
    return f"{task}-{settings.kind}-{settings.adapter_width}-seed-{seed}"


def open_cache(
    backbone: Backbone,
    task: PoolTask,
    collate: Collate,
    states: range,
    cache: CacheOptions,
    progress: Progress = lambda doing, done, total: None,
) -> StatesCache:
    """Of the training rows, made where it is not there."""
    return make_cache(
        cache.folder / task.name, backbone.model, backbone.described["backbone_sha256"], task.train, collate, states,
        cache.dtype, cache.max_gb, lambda done, total: progress(f"hidden states of {task.name}", done, total),
    )  # fmt: skip


def train_batches(task: PoolTask, collate: Collate, states: range, cache: StatesCache | None) -> BatchOf:
    """Batches of the training rows: their hidden states computed each time, or those of a cache."""
    if cache is None:
        return on_the_fly(task.train, collate)
    return from_cache(cache, task.train, collate, states)


def make_heads(
    backbone: Backbone,
    task: PoolTask,
    heads: Heads,
    out: Path,
    cache: CacheOptions | None = None,
    progress: Progress = lambda doing, done, total: None,
) -> list[dict[str, Any]]:
    """Train, score and write every head into a folder of its own below `out`; what their descriptions say, with the
    folder. Diverged, when all others are written, where one of them says nothing that is finite."""
    every = heads.settings(task, backbone)
    collate = backbone.collate(task, heads.pad_states == "keep")
    made: list[dict[str, Any]] = []
    diverged: list[str] = []
    states = states_of_all(every)
    kept = None if cache is None else open_cache(backbone, task, collate, states, cache, progress)
    batch_of = train_batches(task, collate, states, kept)
    last_state = states.stop - 1
    speedup = None
    if last_state < backbone.model.config.num_hidden_layers:
        speedup = speedup_of_layers(backbone.model, collate, last_state)
    rows = range(len(task.train))
    for seed in heads.seeds:
        training = replace(heads.training, seed=seed)
        whole = Pooled(backbone.model, [new_head(settings, backbone.model, seed) for settings in every])
        telling = counted(batch_of, f"{task.name}, seed {seed}", num_steps(len(rows), training), progress)
        for _ in train_heads(whole, rows, telling, training, [training.learning_rate] * len(every)):
            pass
        scores = score_heads(whole, task, collate, training.precision)
        for settings, head, by_split in zip(every, whole.heads, scores, strict=True):
            folder = out / name_of(task.name, settings, seed)
            if by_split is None:
                diverged.append(folder.name)
                continue
            described = save_head(
                folder, head, backbone.described,  # type: ignore[arg-type]
                task=task.name, labels=list(task.labels), max_tokens=task.num_tokens, metric=task.metric,
                scores=by_split, headline=task.headline(by_split), sizes=sizes_of(settings, backbone.model).as_plain(),
                speedup_of_layers=speedup, training=asdict(training), rows=len(rows),
                rows_sha256=rows_digest(task.train), reading=task.reading,
            )  # fmt: skip
            made.append({"folder": str(folder), **described})
    if diverged:
        raise Diverged(
            f"{', '.join(diverged)}: diverged, and not written; the other {len(made)} heads are in {out}. Train these "
            "anew with a lower --learning-rate, or --precision fp32"
        )
    return made


# Encoders fine-tuned for more or fewer epochs


@dataclass(frozen=True)
class BackboneTraining:
    """How the encoder is fine-tuned before it is frozen; `epochs` below 1 are a share of the rows."""

    epochs: tuple[float, ...]
    training: FineTuning
    new_pooler: bool = False


def tuned_backbone(
    checkpoint: str,
    task: PoolTask,
    tuning: BackboneTraining,
    num_epochs: float,
    fresh: Backbone,
    folder: Path,
    device: str,
    progress: Progress = lambda doing, done, total: None,
) -> tuple[Backbone, dict[str, Any]]:
    """The encoder fine-tuned on the task and frozen, its model written to `folder`; and the scores of its own head."""
    rows, whole_epochs = rows_of_epochs(len(task.train), num_epochs, tuning.training.seed)
    training = replace(tuning.training, num_epochs=whole_epochs)
    model = open_whole(checkpoint, task, training.seed, tuning.new_pooler).to(device)
    collate = collate_of(task, model.config, fresh.tokenizer)
    batch_of = counted(
        whole_batch_of(task.train, collate), f"{task.name}, {num_epochs:g} epochs", num_steps(len(rows), training),
        progress,
    )  # fmt: skip
    for _ in fine_tune(model, rows, batch_of, training):
        pass
    scores = score_whole(model, task, collate, training.precision)
    save_fine_tuned(folder, model, fresh.tokenizer, {"checkpoint": checkpoint, "task": task.name,
                                                     "epochs": num_epochs, "training": asdict(training)})  # fmt: skip
    return frozen(str(folder), model, fresh.tokenizer, device), scores


def curve(
    checkpoint: str,
    task: PoolTask,
    heads: Heads,
    tuning: BackboneTraining,
    fresh: Backbone,
    out: Path,
    device: str,
    tell: Tell,
    progress: Progress = lambda doing, done, total: None,
) -> list[dict[str, Any]]:
    """Figure 1: for each number of epochs the fine-tuned model's score and those of heads on its frozen encoder. Every
    point is written when it is done, and not done again. MsltError for epochs that cannot be, before anything is
    trained."""
    heads.settings(task, fresh)
    for num_epochs in tuning.epochs:
        rows_of_epochs(len(task.train), num_epochs, tuning.training.seed)
    settings = {
        "checkpoint": digest(checkpoint), "task": task.name, "data_sha256": task.digests(),
        "max_tokens": task.num_tokens, "reading": task.reading, "heads": _plain(heads),
        "backbone": asdict(tuning.training), "new_pooler": tuning.new_pooler,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with lock_alone(out / ".lock", f"{out}: another process trains there; wait for it, or name another"):
        return [
            _point(checkpoint, task, heads, tuning, num_epochs, fresh, out, device, {**settings, "epochs": num_epochs},
                   tell, progress)
            for num_epochs in tuning.epochs
        ]  # fmt: skip


def _point(
    checkpoint: str, task: PoolTask, heads: Heads, tuning: BackboneTraining, num_epochs: float, fresh: Backbone,
    out: Path, device: str, settings: dict[str, Any], tell: Tell, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """One of the curve, made where it is not there."""
    folder = out / f"{task.name}-epochs-{num_epochs:g}"
    found = finished(folder / "point.json", settings)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        backbone, scores = tuned_backbone(checkpoint, task, tuning, num_epochs, fresh, folder / BACKBONE, device,
                                          progress)  # fmt: skip
        made = make_heads(backbone, task, heads, folder, None, progress)
        found = {
            "task": task.name, "metric": task.metric, "epochs": num_epochs, "whole": scores,
            "whole_headline": task.headline(scores),
            "heads": [{name: each[name] for name in _OF_A_HEAD} for each in made],
            "settings": settings, "provenance": provenance(),
        }  # fmt: skip
        write_json(folder / "point.json", found)
    best = ", ".join(f"{each['headline']:.3f}" for each in found["heads"])
    tell(f"{task.name}, {num_epochs:g} epochs: fine-tuned {found['whole_headline']:.3f}, heads {best}")
    return found


_OF_A_HEAD = ("folder", "task", "metric", "settings", "sizes", "scores", "headline", "training", "speedup_of_layers")


def _plain(heads: Heads) -> dict[str, Any]:
    """As it stands in JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(heads).items()}
