"""DeepSpeed's configuration: what only the engine knows, from a file, plus the numbers that the plan owns.

Plain, so that `mslt plan` can read it. Low precision is `torch_autocast` on fp32 parameters: the masters are the
parameters, so a stage boundary loses nothing. DeepSpeed's own `bf16` and `fp16` sections round the masters at every
initialisation, and under ZeRO-0 they take a hidden optimizer step and leave the fp16 loss unscaled.
"""

import json
from typing import Any

from mslt.config import find_shipped
from mslt.errors import MsltError
from mslt.plan import Stage

# Numbers with another owner, and where that is.
_OWNED_BY_THE_RECIPE = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size (accumulation follows from it)",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer and schedule (the loop writes the rate)",
}


def read_engine_config(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed configuration by path (`*.json`) or shipped name; MsltError lists every mistake in it."""
    path = find_shipped("ds_configs", name_or_path, ".json")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise MsltError(f"engine {path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise MsltError(f"engine {path}: is no JSON object with DeepSpeed's sections")
    mistakes = [
        f"{key}: belongs to the recipe, under {owner}; remove it here"
        for key, owner in _OWNED_BY_THE_RECIPE.items()
        if key in config
    ]
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if section in config:
            mistakes.append(
                f'{section}: rounds the fp32 masters at every stage; write "torch_autocast": '
                f'{{"enabled": true, "dtype": "{dtype}"}} instead'
            )
    if zero_stage(config) != 0:
        mistakes.append(f"zero_optimization.stage: {zero_stage(config)} is not supported yet; take 0")
    if mistakes:
        raise MsltError(f"engine {path}:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))
    return config


def zero_stage(config: dict[str, Any]) -> int:
    return int(config.get("zero_optimization", {}).get("stage", 0))


def complete(config: dict[str, Any], stage: Stage, clip_norm: float, world_size: int) -> dict[str, Any]:
    """What deepspeed.initialize is given. To DeepSpeed a worker's share of the batch is one micro-batch: our engine
    accumulates over its parts and reduces once. Clipping is always written out: DeepSpeed's default became 1.0."""
    return {
        **config,
        "train_micro_batch_size_per_gpu": stage.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "steps_per_print": 10**9,
    }
