"""The device an evaluation runs on."""

import torch

from mslt.errors import MsltError


def open_device(name: str | None) -> torch.device:
    """By default the first CUDA GPU, or the CPU. MsltError where there is no such device here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise MsltError(f"--device {name}: cannot be used here ({said}); give cpu, cuda, cuda:1 …") from None
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
