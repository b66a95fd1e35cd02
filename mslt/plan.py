"""The plan: a list of stages as plain data. Everything a run will do is decided here, before the first tensor.

Layers are indexed from 0, as in Hugging Face's keys. A slot is a part that trains or stays frozen as one:
`embeddings`, `layer.0` … `layer.{depth-1}`, `pooler`, `mlm_head` (transform and bias; the decoder's weight is tied
to the word embeddings and belongs to `embeddings`), `nsp_head`.
"""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import model_validator

from mslt.config import CardConfig, DataConfig, ModelConfig, OptimizerConfig
from mslt.errors import MsltError
from mslt.files import canonical_json, sha256_text
from mslt.growth import Sources
from mslt.validation import Frozen, NonNegativeInt, PositiveInt

HEAD_SLOTS = ("pooler", "mlm_head", "nsp_head")
NEXT_SENTENCE_SLOTS = ("pooler", "nsp_head")  # without next-sentence prediction no gradient reaches them


def layer_slots(first_index: int, end_index: int) -> tuple[str, ...]:
    return tuple(f"layer.{index}" for index in range(first_index, end_index))


def all_slots(depth: int) -> tuple[str, ...]:
    return ("embeddings", *layer_slots(0, depth), *HEAD_SLOTS)


def lowest_graph_layer(trainable: tuple[str, ...], depth: int) -> int:
    """The boundary: the lowest layer that needs a graph, -1 for the embeddings, `depth` when only heads train.

    Hidden state k (0 is the embedding output, k+1 the output of layer k) carries a graph exactly when k exceeds it.
    """
    if "embeddings" in trainable:
        return -1
    return min((int(slot.split(".")[1]) for slot in trainable if slot.startswith("layer.")), default=depth)


class LearningRate(Frozen):
    """Linear warm-up, then the peak, then linear to 0 over `decay_steps`: a schedule of `total_steps`, entered by this
    stage at `first_step`. The stage's own first `rewarmup_steps` rise from 0 to it."""

    peak: float
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt
    total_steps: PositiveInt
    first_step: NonNegativeInt
    rewarmup_steps: NonNegativeInt


class Stage(Frozen):
    """One stretch of training with a fixed depth and a fixed trainable set.

    `sources` has one entry for each layer: the index of the layer of the stage before that it copies, or `random`.
    `optimizer_state` is `carry` where the moments of the stage before go on, `reset` where they start at 0.
    `first_sample` is the position in the data: samples consumed before this stage, counted on over stages.
    """

    depth: PositiveInt
    sources: Sources
    trainable: tuple[str, ...]
    frozen_dropout: bool
    frozen_precision: Literal["exact", "int8"]
    optimizer_state: Literal["reset", "carry"]
    steps: PositiveInt
    learning_rate: LearningRate
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    sequence_length: PositiveInt
    first_sample: NonNegativeInt
    seed: NonNegativeInt

    @model_validator(mode="after")
    def slots_exist(self) -> "Stage":
        if len(self.sources) != self.depth:
            raise ValueError(f"sources has {len(self.sources)} entries for depth {self.depth}")
        unknown = set(self.trainable) - set(all_slots(self.depth))
        if unknown:
            raise ValueError(f"trainable names no slot of a {self.depth}-layer model: {', '.join(sorted(unknown))}")
        if not self.trainable:
            raise ValueError("trainable is empty: nothing would be learned")
        return self

    @property
    def frozen(self) -> tuple[str, ...]:
        return tuple(slot for slot in all_slots(self.depth) if slot not in self.trainable)


def micro_batch_size(stage: Stage, world_size: int) -> int:
    """The largest divisor of a worker's share that is not over the plan's micro-batch: accumulation follows."""
    share, rest = divmod(stage.batch_size, world_size)
    if rest:
        raise MsltError(
            f"training.batch_size {stage.batch_size} is not a multiple of the {world_size} workers; "
            f"take another number of --workers or another batch size"
        )
    return max(size for size in range(1, min(stage.micro_batch_size, share) + 1) if share % size == 0)


class Plan(Frozen):
    """What a run directory holds it to: two plans with the same digest give the same model.

    `shards_sha256` is the hash of the shards' manifest, None while no shards were looked at.
    `engine` is the DeepSpeed configuration that the engine adds to (ZeRO stage, precision, communication).
    """

    model: ModelConfig
    data: DataConfig
    shards_sha256: str | None
    optimizer: OptimizerConfig
    clip_norm: float
    skip_bad_batches: NonNegativeInt
    compile: Literal["none", "frozen", "all"]
    engine: dict[str, Any]
    stages: tuple[Stage, ...]
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def sources_exist(self) -> "Plan":
        depth = 0
        for number, stage in enumerate(self.stages, 1):
            missing = [source for source in stage.sources if source != "random" and source >= depth]
            if missing:
                raise ValueError(f"stages.{number}: sources {missing} do not exist in the {depth} layers before it")
            depth = stage.depth
        return self

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def first_step(self, stage_index: int) -> int:
        """Optimizer steps of all stages before `stage_index`."""
        return sum(stage.steps for stage in self.stages[:stage_index])

    def deciding(self) -> dict[str, Any]:
        """Everything that decides what is learned. Where the shards lie does not, nor how many bad batches are borne,
        nor what a model card says, nor what only rounds otherwise and draws other dropout masks: how many samples are
        computed at once, and compiled layers."""
        stages = {"__all__": {"micro_batch_size"}}
        free: Any = {"data": {"shards"}, "skip_bad_batches": True, "compile": True, "card": True, "stages": stages}
        return self.model_dump(mode="json", exclude=free)

    def can_be_shared_by(self, world_size: int) -> bool:
        """Whether every batch can be dealt out to so many workers."""
        return all(stage.batch_size % world_size == 0 for stage in self.stages)

    def digest(self) -> str:
        return sha256_text(canonical_json(self.deciding()))


def with_micro_batches(plan: Plan, sizes: Iterable[int]) -> Plan:
    """The plan with these micro-batches, one for each stage."""
    stages = zip(plan.stages, sizes, strict=True)
    return plan.model_copy(
        update={"stages": tuple(stage.model_copy(update={"micro_batch_size": size}) for stage, size in stages)}
    )


def difference(old: Plan, new: Plan) -> list[str]:
    """One line for each deciding value that differs, as `path: old → new`."""
    before, after = _leaves(old.deciding()), _leaves(new.deciding())
    return [
        f"{path}: {before.get(path, '(absent)')} → {after.get(path, '(absent)')}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested plain data as one flat dict; lists of scalars stay whole, lists of stages count from 1."""
    if isinstance(value, dict) and value:
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        children = [(str(number), child) for number, child in enumerate(value, 1)]
    else:
        return {path: value}
    return {
        leaf: found
        for key, child in children
        for leaf, found in _leaves(child, f"{path}.{key}" if path else key).items()
    }


def autocast_dtype(engine: dict[str, Any]) -> Literal["bfloat16", "float16"] | None:
    """The type that matrix products are computed in, None for fp32."""
    section = engine.get("torch_autocast", {})
    return section["dtype"] if section.get("enabled") else None


def _runs(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 0, 1) as `0-2,0-1`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def sources_in_words(sources: Sources) -> str:
    """`0-2,0-2`, or `random`."""
    copied = tuple(source for source in sources if source != "random")
    if len(copied) == len(sources):
        return _runs(copied)
    return ",".join(map(str, sources)) if copied else "random"


def trainable_in_words(stage: Stage) -> str:
    """`all`, or `layers 3-5, heads`."""
    if not stage.frozen:
        return "all"
    layers = tuple(index for index in range(stage.depth) if layer_slots(index, index + 1)[0] in stage.trainable)
    others = [slot for slot in ("embeddings", *HEAD_SLOTS) if slot in stage.trainable]
    heads = ["heads" if set(HEAD_SLOTS) <= set(others) else ", ".join(others)]
    return f"layers {_runs(layers)}, {heads[0]}"
