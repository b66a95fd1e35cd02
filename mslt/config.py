"""The recipe: what a user writes, checked once, before anything is touched. docs/recipe.md is made from this file.

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


class Section(Frozen):
    """A section of the recipe; the text below a key says what it means."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ModelConfig(Section):
    """The full-depth encoder, under the names of Hugging Face's config. Defaults: Devlin et al. 2019."""

    family: Literal["bert"] = "bert"
    """The kind of model to pretrain."""
    num_hidden_layers: PositiveInt
    """Layers of the last stage."""
    hidden_size: PositiveInt
    """Width; a multiple of `num_attention_heads`."""
    num_attention_heads: PositiveInt
    """Heads of each layer."""
    intermediate_size: PositiveInt
    """Width between the two dense layers of a feed-forward block."""
    vocab_size: PositiveInt
    """Entries of the word embeddings; at least those of the shards' tokenizer."""
    max_position_embeddings: PositiveInt = 512
    """Positions that the model has; positions beyond `training.sequence_length` are never trained."""
    type_vocab_size: Annotated[int, Field(ge=2, strict=True)] = 2
    """Token types; sentence pairs need two."""
    hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    """Activation of the feed-forward blocks and of the MLM head."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout of the embeddings and of what a block adds."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout of attention weights."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    """Added to the variance in LayerNorm."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of random weights."""

    @model_validator(mode="after")
    def heads_divide_width(self) -> "ModelConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class DataConfig(Section):
    """Which shards, and how documents become samples (Devlin et al. 2019, section 3.1 and A.2)."""

    shards: str
    """Folder that `mslt data prepare` wrote, from the working folder; `--shards` replaces it."""
    max_predictions: PositiveInt = 20
    """The most masked tokens of a sample; below `training.sequence_length`."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of a sample's tokens that are to be predicted: of these 80 % become [MASK], 10 % a random token, 10 %
    stay."""
    short_sequence_probability: Probability = 0.1
    """How often a document's samples get a shorter length, drawn at random; 0 pads least."""
    whole_word_masking: bool = False
    """Mask all pieces of a word together."""
    next_sentence_prediction: bool = True
    """Samples are pairs of sentences, and pooler and NSP head train. Without it a sample is one run of sentences (Liu
    et al. 2019, section 4.2), and both keep their random start."""
    evaluation_samples: PositiveInt = 4096
    """Held-out samples of an evaluation, the first of the validation split; all where there are fewer."""


class ScheduleConfig(Section):
    """How the encoder grows: a schedule by name, with its own options beside the keys that all have."""

    model_config = ConfigDict(extra="allow")

    name: str
    """A schedule of mslt, `module:function`, or an entry point of the group `mslt.schedules`."""
    steps: PositiveInt
    """Optimizer steps of all stages together."""
    learning_rate: Literal["global", "per_stage"] = "global"
    """`global` is one warm-up and one decay over all steps; `per_stage` has both in every stage."""
    rewarmup_steps: NonNegativeInt = 0
    """With `global`: so many steps at the beginning of each later stage rise from 0 to the rate of the schedule."""
    frozen_dropout: bool = True
    """Keep the dropout of frozen layers."""
    frozen_precision: Literal["exact", "int8"] = "exact"
    """`int8` computes frozen layers in 8-bit integers, which is not exact, and needs `training.compile`."""
    optimizer_state: Literal["reset", "carry"] = "reset"
    """The optimizer's moments when a stage begins: 0, or those of the stage before, a copied layer's from its
    source."""

    @property
    def options(self) -> dict[str, Any]:
        """What belongs to this schedule alone."""
        return self.model_extra or {}


class TrainingConfig(Section):
    """Batches, and how a step is computed."""

    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 128
    """Tokens of a sample; at most `model.max_position_embeddings`."""
    batch_size: PositiveInt
    """Samples of one optimizer step over all workers; a multiple of their number."""
    micro_batch_size: PositiveInt | Literal["auto"]
    """The most samples that one worker computes at once; `auto` is what is fastest in each stage, measured before the
    run."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient of all trainable parameters; 0 switches clipping off."""
    skip_bad_batches: NonNegativeInt = 0
    """How many steps of a stage may be left out because their gradient is not finite; one more stops the run. The
    overflows of fp16 do not count."""
    compile: Literal["none", "frozen", "all"] = "none"
    """The layers that torch.compile makes code for when a stage begins; held-out evaluation stays eager, and so does
    everything where there is no compiler."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Of weights, order of the data, masks and dropout."""


class OptimizerConfig(Section):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2) or AdamW, and the learning rate's schedule."""

    name: Literal["lamb", "adamw"] = "lamb"
    """Which of them."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The peak: reached after `warmup_steps`, kept, and brought to 0 over the last `decay_share` of the steps."""
    warmup_steps: NonNegativeInt
    """Steps in which the rate rises linearly to the peak; below `schedule.steps`."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """1 falls from the warm-up on (Devlin et al. 2019); 0.2 is warm-up, stable, decay."""
    beta1: Probability = 0.9
    """Of the first moment."""
    beta2: Probability = 0.999
    """Of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of matrices; biases and LayerNorm do not decay."""
    bias_correction: bool = True
    """`false` as in the BERT code of LAMB's authors."""
    trust_ratio_bounds: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] | None = None
    """LAMB alone: lowest and highest trust ratio, such as [0.01, 10], the bounds of DeepSpeed's FusedLamb."""
    normalize_gradient: bool = False
    """Divide the gradient by its norm over all tensors instead of clipping it (NVLAMB: NVIDIA 2019, "Pretraining BERT
    with layer-wise adaptive learning rates", developer blog)."""
    implementation: Literal["foreach", "apex"] = "foreach"
    """`foreach` runs everywhere; `apex` is NVIDIA's FusedLAMB, on GPUs without ZeRO, where it is installed and shows at
    the start that it makes the same update."""

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


class WatchConfig(Section):
    """How often, in steps. Nothing here changes what is learned, so it may differ when a run is resumed."""

    log_every: PositiveInt = 100
    """Steps from one line of `metrics.jsonl` to the next."""
    evaluate_every: NonNegativeInt = 0
    """Steps from one held-out evaluation to the next; 0 evaluates at the borders of stages only."""
    checkpoint_every: PositiveInt = 1000
    """Steps from one checkpoint inside a stage to the next."""
    loader_workers: NonNegativeInt = 0
    """Processes of each worker that load data; 0 loads in the worker itself."""


class CardConfig(Section):
    """What the model card of every stage says beside what is known: names as the Hugging Face hub has them."""

    license: str = "unknown"
    """Such as `apache-2.0`; the author's to choose, none is assumed."""
    language: str | None = None
    """Such as `en`."""


class Recipe(Section):
    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    engine: str = "zero0_fp32"
    """One of those shipped, by name, or the path of a JSON file of your own."""
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
