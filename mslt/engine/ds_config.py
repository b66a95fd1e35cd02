"""DeepSpeed's configuration: what only the engine knows, from a file, plus the numbers that the plan owns.

Plain, so that `mslt plan` can read it. Low precision is autocast on fp32 parameters: the masters are the parameters,
so a stage boundary loses nothing. DeepSpeed's own `bf16` and `fp16` sections round the masters at every initialisation,
and under ZeRO-0 they take a hidden optimizer step and leave the fp16 loss unscaled. Its `torch_autocast` keeps the
masters, but under ZeRO-1 to 3 in fp16 it clips the gradient before unscaling it, never lowers the scale after an
overflow, and lets each rank decide alone whether to step. So `torch_autocast` is read here and done by mslt.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from mslt.config import find_shipped
from mslt.errors import MsltError
from mslt.plan import Plan, Stage, micro_batch_size
from mslt.validation import Frozen, PositiveInt, mistakes, refuse

# Numbers with another owner, and where that is.
_OWNED_BY_THE_RECIPE = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size (accumulation follows from it)",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer and schedule (the loop writes the rate)",
}


# DeepSpeed allocates a bucket in every backward pass; its default of 5e8 elements is 2 GB, more than a BERT. And the
# smaller they are, the sooner the first gradients travel (torch's DDP: 25 MB).
_REDUCED_TOGETHER, _GATHERED_TOGETHER = 5_000_000, 20_000_000


class ZeroSection(Frozen):
    """Bucket sizes are in elements. `overlap_comm` reduces beside the backward pass, on GPUs, with a second bucket."""

    stage: Literal[0, 1, 2, 3] = 0
    reduce_bucket_size: PositiveInt = _REDUCED_TOGETHER
    allgather_bucket_size: Annotated[int, Field(gt=0, strict=True, multiple_of=2)] = _GATHERED_TOGETHER
    overlap_comm: bool = False


class AutocastSection(Frozen):
    enabled: bool
    dtype: Literal["bfloat16", "float16"]


class EngineConfig(Frozen):
    """The keys of DeepSpeed's that may be set. Others are refused: some change the gradient without a word
    (`gradient_allreduce_op`, `managed_gradient_accumulation`), some are ignored."""

    zero_optimization: ZeroSection = ZeroSection()
    torch_autocast: AutocastSection | None = None
    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"


def read_engine_config(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed configuration by path (`*.json`) or shipped name; MsltError lists every mistake in it."""
    path = find_shipped("ds_configs", name_or_path, ".json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MsltError(f"engine {path}: not readable as JSON: {error}") from None
    found = []
    if isinstance(config, dict):
        for key, owner in _OWNED_BY_THE_RECIPE.items():
            if config.pop(key, None) is not None:
                found.append(f"{key}: belongs to the recipe, under {owner}; remove it here")
        for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            if config.pop(section, None) is not None:
                found.append(
                    f'{section}: rounds the fp32 masters at every stage; write "torch_autocast": '
                    f'{{"enabled": true, "dtype": "{dtype}"}} instead'
                )
    refuse([*found, *mistakes(EngineConfig, config)], f"engine {path}")
    return EngineConfig.model_validate(config).model_dump(mode="json", exclude_unset=True)


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def reduced_dtype(config: dict[str, Any]) -> Literal["float32", "bfloat16", "float16"]:
    """The type in which gradients are added up over the ranks."""
    names: dict[str, Literal["float32", "bfloat16", "float16"]]
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return names[config.get("communication_data_type", "fp32")]


def reduced_bytes(config: dict[str, Any]) -> int:
    """Bytes of one gradient element in the all-reduce."""
    return 4 if reduced_dtype(config) == "float32" else 2


def bucket_elements(config: dict[str, Any]) -> int:
    """The most gradient elements that travel together."""
    return ZeroSection.model_validate(config.get("zero_optimization", {})).reduce_bucket_size


def remarks(plan: Plan, world_size: int) -> list[str]:
    """What a user of this ZeRO stage should know before the run: it trains the same, but costs more than another."""
    stage, found = zero_stage(plan.engine), []
    times = max(s.batch_size // world_size // micro_batch_size(s, world_size) for s in plan.stages)
    if stage >= 2 and times > 1 and world_size > 1:
        found.append(
            f"ZeRO-{stage} reduces the gradient after every micro-batch: {times} times the bytes of ZeRO-0 and 1 in "
            "each step; raise training.micro_batch_size, or take a zero1 engine"
        )
    if stage == 3 and any(s.frozen for s in plan.stages):
        found.append(
            "ZeRO-3 gathers frozen weights in every step: freezing makes only the reduced gradients fewer; and every "
            "stage takes a launch of its own. zero0 to zero2 are for models that fit a GPU"
        )
    return found


def complete(config: dict[str, Any], stage: Stage, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize is given. To DeepSpeed a worker's share of the batch is one micro-batch: our engine
    tells it at which part to reduce. Clipping is the optimizer's; it is written out because DeepSpeed's default clips.
    """
    zero = ZeroSection.model_validate(config.get("zero_optimization", {})).model_dump()
    if zero["stage"] in (1, 2):
        zero["compute_grad_norm"] = False  # or DeepSpeed leaves out a step that is not finite, and says nothing
    return {
        **{key: value for key, value in config.items() if key != "torch_autocast"},
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": stage.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it stops the GPU twice a step; the clock does not
    }
