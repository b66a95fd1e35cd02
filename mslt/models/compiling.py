"""Layers as compiled code. All layers of a kind share it: torch compiles the first, and the others find it made."""

from functools import cache

import torch
from transformers import PreTrainedModel

from mslt.models import families


@cache
def why_no_compiler(device_type: str) -> str | None:
    """What torch.compile lacks to make code for this kind of device, None where it works."""
    try:
        torch.compile(lambda x: (x + 1).relu().sum())(torch.ones(64, device=device_type))
    except RuntimeError as error:  # of all that Dynamo and Inductor raise
        return str(error).strip().splitlines()[0]
    return None


def compile_layers(model: PreTrainedModel, slots: tuple[str, ...]) -> None:
    """Compile the layers among `slots` for the shapes that they see first, in place, when they are first called: apart
    for those with a graph and those without."""
    # Torch stops compiling a function after eight kinds of call, and every stage and micro-batch may be one.
    torch._dynamo.config.recompile_limit = 1000
    modules = families.slot_modules(model)
    for slot in slots:
        if slot.startswith("layer."):
            modules[slot].compile(dynamic=False)
