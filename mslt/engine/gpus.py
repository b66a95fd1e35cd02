"""Can the installed torch use this machine's GPUs, and have they the precision asked for? Asked before a run starts.

Otherwise torch only warns, and the first kernel fails: "no kernel image is available for execution on the device".
"""

import os
import re
from typing import Literal

import torch

from mslt.errors import MsltError

BF16_FROM = (8, 0)  # Ampere; below it torch emulates bf16 (torch.cuda.is_bf16_supported)

# Which wheels of the torch versions that mslt takes carry which compute capabilities (lowest, highest). Since 2.11 only
# those for CUDA 12.6 go below 7.5, and 2.14 is the last with them. pytorch/pytorch: RELEASE.md, "PyTorch CUDA Support
# Matrix" of 2.11 to 2.14; torch.cuda.PYTORCH_RELEASES_CODE_CC of 2.13; issues 182250 and 190385.
_WHEELS = (
    ((5, 0), (7, 4), "the CUDA 12.6 wheels for x86-64 do, up to torch 2.14", '"torch<2.15"', "cu126"),
    ((7, 5), (7, 9), "the CUDA 13.0 wheels for x86-64 do", "torch", "cu130"),  # those for aarch64 begin at 8.0
    ((8, 0), (12, 9), "the CUDA 13.0 wheels do", "torch", "cu130"),
)
_INDEX = "https://download.pytorch.org/whl"
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


def check_gpus(autocast: Literal["bfloat16", "float16"] | None, num_workers: int) -> None:
    """MsltError, one for all GPUs that the workers take, where torch has no kernels for one or it lacks the precision.
    Without a GPU that torch can reach, or where DeepSpeed is told to use the CPU, nothing. Starts CUDA in this process.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return
    arch_list, version = torch.cuda.get_arch_list(), torch.__version__
    found = [
        gpu_problems(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), arch_list, version, autocast)
        for i in range(min(num_workers, torch.cuda.device_count()))
    ]
    if any(found):
        hide = [] if all(found) else ["or leave such a GPU out with CUDA_VISIBLE_DEVICES"]
        lines = dict.fromkeys(line for problems in found for line in problems)  # equal GPUs once
        raise MsltError("\n".join([*lines, *hide]))


def gpu_problems(
    name: str, capability: tuple[int, int], arch_list: list[str], torch_version: str, autocast: str | None
) -> list[str]:
    """What stands against training on this GPU with a torch built for `arch_list`, each with its remedy.

    A list with an entry that is not CUDA's (ROCm's gfx names) says nothing, nor does an empty one of the kernels.
    """
    built_for = [match for entry in arch_list if (match := _ARCHITECTURE.fullmatch(entry))]
    if len(built_for) < len(arch_list):
        return []
    gpu = f"{name}, compute capability {capability[0]}.{capability[1]}"
    problems = []
    if arch_list and not any(_runs(entry, capability) for entry in built_for):
        problems.append(
            f"{gpu}: torch {torch_version} has no kernels for it, only for {', '.join(arch_list)}; "
            + _remedy(capability)
        )
    if autocast == "bfloat16" and capability < BF16_FROM:
        problems.append(
            f"{gpu}: has no bf16; write `engine: zero0_fp16` or `engine: zero0_fp32` in a recipe that extends this one"
        )
    return problems


def _runs(built_for: re.Match[str], capability: tuple[int, int]) -> bool:
    """Binaries run on the same major version from their minor one on, PTX on everything from there on; suffix `a` is
    that capability only, `f` its major version. CUDA Programming Guide, 1.3 and 5.1."""
    kind, major, minor, suffix = built_for.groups()
    lowest = (int(major), int(minor))
    if suffix == "a":
        return capability == lowest
    return capability >= lowest and (capability[0] == lowest[0] or (kind == "compute" and not suffix))


def _remedy(capability: tuple[int, int]) -> str:
    for lowest, highest, wheels, wanted, index in _WHEELS:
        if lowest <= capability <= highest:
            # --force-reinstall: to pip, the same version for another CUDA is already there
            return f"{wheels}: pip install --force-reinstall {wanted} --index-url {_INDEX}/{index}"
    return "mslt knows of no torch wheel that does; build torch for it or take another GPU"
