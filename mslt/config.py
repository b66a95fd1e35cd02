"""The recipe: what a user writes, checked once, before anything is touched.

A recipe is a YAML file. `extends: NAME` starts from another recipe; a section written here replaces the whole
section there. Recipes shipped with mslt are found by name, others by path.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mslt.errors import MsltError
from mslt.growth import find_schedule, option_mistakes, stages_of
from mslt.validation import Frozen, FrozenType, NonNegativeInt, PositiveInt, mistakes, read_yaml, refuse

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
    type_vocab_size: Annotated[int, Field(ge=2, strict=True)] = 2
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0)] = 0.02

    @model_validator(mode="after")
    def heads_divide_width(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class DataConfig(Frozen):
    """Which shards, and how documents become samples (Devlin et al. 2019, section 3.1 and A.2).

    Without `next_sentence_prediction` a sample is one run of sentences instead of a pair (Liu et al. 2019, section
    4.2), and neither pooler nor NSP head is trained; with `short_sequence_probability` 0, as there, it pads least.
    """

    shards: str
    max_predictions: PositiveInt = 20
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    short_sequence_probability: Probability = 0.1
    whole_word_masking: bool = False
    next_sentence_prediction: bool = True
    evaluation_samples: PositiveInt = 4096


class ScheduleConfig(Frozen):
    """How the encoder grows: a schedule of mslt.growth by name, with its options beside the keys that all have.

    `learning_rate` is one schedule over all steps, or one for each stage; `rewarmup_steps` lets the global one rise
    anew from 0 when a later stage begins. `frozen_dropout` keeps the dropout of frozen layers; `frozen_precision` int8
    computes those without a graph in 8-bit integers, which is not exact (mslt.models.int8). `optimizer_state` says
    what becomes of the optimizer's moments when a stage begins: `reset` to 0, or `carry` those of the stage before, by
    name, copied layers with their source's.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    steps: PositiveInt
    learning_rate: Literal["global", "per_stage"] = "global"
    rewarmup_steps: NonNegativeInt = 0
    frozen_dropout: bool = True
    frozen_precision: Literal["exact", "int8"] = "exact"
    optimizer_state: Literal["reset", "carry"] = "reset"

    @property
    def options(self) -> dict[str, Any]:
        """What belongs to this schedule alone."""
        return self.model_extra or {}


class TrainingConfig(Frozen):
    """`batch_size` counts samples of one optimizer step over all workers; `micro_batch_size` is the most that one
    worker computes at once, `auto` what is fastest in each stage, measured before the run. `clip_norm` 0 switches
    clipping off. `skip_bad_batches` is how many steps of a stage may be left out because their gradient is not finite;
    one more stops the run (fp16's overflows do not count). `compile` says which layers torch.compile makes code for
    when a stage begins; the others, and held-out evaluation, are eager."""

    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 128
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | Literal["auto"]
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    skip_bad_batches: NonNegativeInt = 0
    compile: Literal["none", "frozen", "all"] = "none"
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0


class OptimizerConfig(Frozen):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2) or AdamW. `learning_rate` is the peak of the schedule: it
    is reached after `warmup_steps`, kept, and falls to 0 over the last `decay_share` of the steps. The default, 1,
    falls from the warm-up on (Devlin et al. 2019); 0.2 is warm-up, stable, decay.

    Variants of LAMB: `bias_correction` false as in the authors' BERT code; `trust_ratio_bounds` (lowest, highest), as
    DeepSpeed's FusedLamb does with (0.01, 10); `normalize_gradient` divides the gradient by its norm over all tensors
    before anything else, instead of clipping it (NVLAMB: NVIDIA 2019, "Pretraining BERT with layer-wise adaptive
    learning rates", developer blog). `implementation` foreach runs everywhere; apex is NVIDIA's FusedLAMB, on GPUs
    without ZeRO, where it is installed and shows at the start that it makes the same update.
    """

    name: Literal["lamb", "adamw"] = "lamb"
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: NonNegativeInt
    decay_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    bias_correction: bool = True
    trust_ratio_bounds: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] | None = None
    normalize_gradient: bool = False
    implementation: Literal["foreach", "apex"] = "foreach"

    @model_validator(mode="after")
    def options_fit(self) -> "OptimizerConfig":
        if self.trust_ratio_bounds is not None:
            lowest, highest = self.trust_ratio_bounds
            if self.name != "lamb":
                raise ValueError(f"trust_ratio_bounds is for lamb; {self.name} has no trust ratio; remove it")
            if lowest > highest:
                raise ValueError(f"trust_ratio_bounds {lowest}, {highest}: the lowest comes first")
        if self.implementation == "apex" and (
            self.name != "lamb" or self.trust_ratio_bounds is not None or not self.weight_decay
        ):
            raise ValueError(
                "implementation apex is for lamb with weight_decay and without trust_ratio_bounds (FusedLAMB adapts "
                "what decays); write foreach"
            )
        return self


class WatchConfig(Frozen):
    """How often, in steps. Nothing here changes what is learned, so it may differ when a run is resumed.
    `evaluate_every` 0 evaluates at the borders of stages only."""

    log_every: PositiveInt = 100
    evaluate_every: NonNegativeInt = 0
    checkpoint_every: PositiveInt = 1000
    loader_workers: NonNegativeInt = 0


class CardConfig(Frozen):
    """What the model card of every stage says beside what is known: names as the Hugging Face hub has them, such as
    `apache-2.0` and `en`. A licence is the author's to choose: none is assumed."""

    license: str = "unknown"
    language: str | None = None


class Recipe(Frozen):
    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    engine: str = "zero0_fp32"
    watch: WatchConfig = WatchConfig()
    card: CardConfig = CardConfig()


def parse_recipe(sections: Any, where: str) -> Recipe:
    """The recipe of these sections; MsltError lists every mistake in them and between them."""
    refuse([*mistakes(Recipe, sections), *_disagreements(sections)], where)
    return Recipe.model_validate(sections)


def _disagreements(sections: Any) -> Iterator[str]:
    """What does not fit together, as far as the sections concerned are right in themselves, unknown keys apart."""

    def right(name: str, kind: type[FrozenType]) -> FrozenType | None:
        section = sections.get(name) if isinstance(sections, dict) else None
        if not isinstance(section, dict):
            return None
        if kind.model_config["extra"] == "forbid":
            section = {key: section[key] for key in kind.model_fields if key in section}
        return None if mistakes(kind, section) else kind.model_validate(section)

    model, data, optimizer = right("model", ModelConfig), right("data", DataConfig), right("optimizer", OptimizerConfig)
    training, schedule = right("training", TrainingConfig), right("schedule", ScheduleConfig)
    if schedule is not None:
        yield from (f"schedule.{line}" for line in _schedule_mistakes(schedule, model))
    if schedule is not None and optimizer is not None and optimizer.warmup_steps >= schedule.steps:
        yield f"optimizer.warmup_steps: {optimizer.warmup_steps} is not below schedule.steps {schedule.steps}"
    if model is not None and training is not None and training.sequence_length > model.max_position_embeddings:
        yield (
            f"training.sequence_length: {training.sequence_length} is over model.max_position_embeddings "
            f"{model.max_position_embeddings}"
        )
    in_int8 = schedule is not None and schedule.frozen_precision == "int8"
    if in_int8 and training is not None and training.compile == "none":
        yield "schedule.frozen_precision: int8 is slower than exact until it is compiled; set training.compile: frozen"
    if data is not None and training is not None and data.max_predictions >= training.sequence_length:
        yield (
            f"data.max_predictions: {data.max_predictions} is not below training.sequence_length "
            f"{training.sequence_length}"
        )


def _schedule_mistakes(schedule: ScheduleConfig, model: ModelConfig | None) -> list[str]:
    """What is wrong with the options, or, with right ones, with the stages that they make."""
    try:
        function = find_schedule(schedule.name)
        found = option_mistakes(function, schedule.options)
        if not found and model is not None:
            _, *later = stages_of(function, model.num_hidden_layers, schedule.steps, schedule.options)
            shortest = min((stage.steps for stage in later), default=schedule.rewarmup_steps + 1)
            if schedule.rewarmup_steps >= shortest:
                found.append(f"rewarmup_steps: {schedule.rewarmup_steps} is not below a stage's {shortest} steps")
    except ValueError as error:
        found = [str(error)]
    if schedule.rewarmup_steps and schedule.learning_rate == "per_stage":
        found.append("rewarmup_steps: learning_rate per_stage warms up in every stage already; remove one of the two")
    return found


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe at a path (`*.yaml`) or, without that ending, one of those shipped with mslt."""
    path = find_shipped("recipes", name_or_path, ".yaml")
    return parse_recipe(_read_sections(path, seen=()), f"recipe {name_or_path}")


def _read_sections(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise MsltError(f"recipe {path}: extends itself ({' → '.join(map(str, (*seen, path)))})")
    sections = read_yaml(path)
    if not isinstance(sections, dict):
        raise MsltError(f"{path}: holds no sections (model, data, schedule, …)")
    parent = sections.pop("extends", None)
    if parent is None:
        return sections
    if str(parent).endswith(".yaml"):
        parent = path.parent / str(parent)  # a path counts from the file that says it
    return {**_read_sections(find_shipped("recipes", str(parent), ".yaml"), (*seen, path)), **sections}


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
