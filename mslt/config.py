"""The recipe: what a user writes, checked once, before anything is touched.

A recipe is a YAML file. `extends: NAME` starts from another recipe; a section written here replaces the whole
section there. Recipes shipped with mslt are found by name, others by path.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mslt.errors import MsltError
from mslt.validation import Frozen, read_yaml, validate

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Frozen):
    """The full-depth encoder, under the names of Hugging Face's config. Defaults: Devlin et al. 2019."""

    family: Literal["bert"] = "bert"
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt = 512
    type_vocab_size: PositiveInt = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    @model_validator(mode="after")
    def heads_divide_width(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class DataConfig(Frozen):
    """Which shards, and how documents become samples (Devlin et al. 2019, section 3.1 and A.2)."""

    shards: str
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 128
    max_predictions: PositiveInt = 20
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    short_sequence_probability: Probability = 0.1
    evaluation_samples: PositiveInt = 4096


class MsltSchedule(Frozen):
    """Multi-stage layerwise training: k growing stages, then all layers for `retrain_share` of the steps."""

    name: Literal["mslt"]
    k: PositiveInt
    steps: PositiveInt
    retrain_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    learning_rate: Literal["global", "per_stage"] = "global"
    frozen_dropout: bool = True


class FullSchedule(Frozen):
    """The ordinary way, and the baseline: every layer from the first step to the last."""

    name: Literal["full"]
    steps: PositiveInt


class TrainingConfig(Frozen):
    """`batch_size` counts samples of one optimizer step over all workers; `micro_batch_size` is the most that one
    worker computes at once. `clip_norm` 0 switches clipping off."""

    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    seed: NonNegativeInt = 0


class OptimizerConfig(Frozen):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2). `learning_rate` is the peak of the schedule."""

    name: Literal["lamb"] = "lamb"
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: NonNegativeInt
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class WatchConfig(Frozen):
    """How often, in steps. Nothing here changes what is learned, so it may differ when a run is resumed.
    `evaluate_every` 0 evaluates at the borders of stages only."""

    log_every: PositiveInt = 100
    evaluate_every: NonNegativeInt = 0
    checkpoint_every: PositiveInt = 1000
    loader_workers: NonNegativeInt = 0


class Recipe(Frozen):
    model: ModelConfig
    data: DataConfig
    schedule: Annotated[MsltSchedule | FullSchedule, Field(discriminator="name")]
    training: TrainingConfig
    optimizer: OptimizerConfig
    engine: str = "zero0_fp32"
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def sections_agree(self) -> "Recipe":
        mistakes = []
        depth, schedule = self.model.num_hidden_layers, self.schedule
        if isinstance(schedule, MsltSchedule):
            if depth % schedule.k:
                divisors = ", ".join(str(k) for k in range(2, depth + 1) if depth % k == 0)
                mistakes.append(
                    f"schedule.k: {schedule.k} does not divide model.num_hidden_layers {depth}; take one of {divisors}"
                )
            elif schedule.steps * (1 - schedule.retrain_share) < schedule.k:
                mistakes.append(
                    f"schedule.steps: {schedule.steps} steps leave no step for some of the {schedule.k} growing "
                    f"stages after retrain_share {schedule.retrain_share}; raise steps or lower k"
                )
            elif schedule.steps * schedule.retrain_share < 0.5:
                mistakes.append(
                    f"schedule.retrain_share: {schedule.retrain_share} of {schedule.steps} steps is no step; raise one"
                )
        if self.optimizer.warmup_steps >= schedule.steps:
            mistakes.append(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is not below schedule.steps {schedule.steps}"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            mistakes.append(
                f"data.sequence_length: {self.data.sequence_length} is over model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        if self.data.max_predictions >= self.data.sequence_length:
            mistakes.append(
                f"data.max_predictions: {self.data.max_predictions} is not below data.sequence_length "
                f"{self.data.sequence_length}"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe at a path (`*.yaml`) or, without that ending, one of those shipped with mslt."""
    return validate(Recipe, _read_sections(name_or_path, seen=()), f"recipe {name_or_path}")


def _read_sections(name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name_or_path in seen:
        raise MsltError(f"recipe {name_or_path}: extends itself ({' → '.join((*seen, name_or_path))})")
    path = find_shipped("recipes", name_or_path, ".yaml")
    sections = read_yaml(path)
    if not isinstance(sections, dict):
        raise MsltError(f"{path}: holds no sections (model, data, schedule, …)")
    parent = sections.pop("extends", None)
    if parent is None:
        return sections
    return {**_read_sections(str(parent), (*seen, name_or_path)), **sections}


def find_shipped(kind: Literal["recipes", "ds_configs"], name_or_path: str, ending: str) -> Path:
    """A file by path when it has the ending, else by name among those shipped (installed, or in a checkout)."""
    if name_or_path.endswith(ending):
        path = Path(name_or_path)
        if not path.is_file():
            raise MsltError(f"{path}: no such file; give a path, or the name of one shipped with mslt without {ending}")
        return path
    package = Path(__file__).parent
    checkout = {"recipes": package.parent / "launch" / "recipes", "ds_configs": package.parent / "ds_configs"}[kind]
    folder = package / kind if (package / kind).is_dir() else checkout
    path = folder / f"{name_or_path}{ending}"
    if not path.is_file():
        known = ", ".join(sorted(entry.stem for entry in folder.glob(f"*{ending}")))
        raise MsltError(f"{name_or_path}: not shipped with mslt; take one of {known}, or a path ending in {ending}")
    return path
