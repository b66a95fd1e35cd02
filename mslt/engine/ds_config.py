"""DeepSpeed's configuration: what only the engine knows, from a file, plus the numbers that the plan owns.

Plain, so that `mslt plan` can read it. Low precision is `torch_autocast` on fp32 parameters: the masters are the
parameters, so a stage boundary loses nothing. DeepSpeed's own `bf16` and `fp16` sections round the masters at every
initialisation, and under ZeRO-0 they take a hidden optimizer step and leave the fp16 loss unscaled.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from mslt.config import find_shipped
from mslt.errors import MsltError
from mslt.plan import Stage
from mslt.validation import Frozen, mistakes, refuse

# Numbers with another owner, and where that is.
_OWNED_BY_THE_RECIPE = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size (accumulation follows from it)",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer and schedule (the loop writes the rate)",
}


class ZeroSection(Frozen):
    stage: Literal[0] = 0


class AutocastSection(Frozen):
    enabled: bool
    dtype: Literal["bfloat16", "float16"]


class EngineConfig(Frozen):
    """The keys of DeepSpeed's that may be set. Others are refused: some change the gradient without a word
    (`gradient_allreduce_op`, `managed_gradient_accumulation`), some are ignored under ZeRO-0."""

    zero_optimization: ZeroSection = ZeroSection()
    torch_autocast: AutocastSection | None = None
    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0


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


def complete(config: dict[str, Any], stage: Stage, clip_norm: float, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize is given. To DeepSpeed a worker's share of the batch is one micro-batch: our engine
    accumulates over its parts and reduces once. Clipping is always written out: DeepSpeed's default became 1.0."""
    return {
        **config,
        "train_micro_batch_size_per_gpu": stage.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it stops the GPU twice a step; the clock does not
    }
