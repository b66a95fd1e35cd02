"""Which GPUs a torch build can use, and which have bf16, without a GPU."""

from typing import Any

import pytest
import torch

from mslt.engine.gpus import check_gpus, gpu_problems
from mslt.errors import MsltError

# torch.cuda.get_arch_list() of torch's wheels for x86-64 (pytorch/pytorch RELEASE.md, issue 182250).
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
V100 = ("Tesla V100-SXM2-32GB", (7, 0))
A100 = ("NVIDIA A100-SXM4-80GB", (8, 0))


def problems(capability: tuple[int, int], arch_list: list[str], autocast: str | None = None) -> list[str]:
    return gpu_problems("a GPU", capability, arch_list, "2.13.0+cu000", autocast)


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: list[Any], arch_list: list[str]) -> None:
    """torch sees these GPUs, (name, capability) each, and was built for this list."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arch_list)


def test_v100_is_refused_by_a_torch_without_its_kernels() -> None:
    (message,) = gpu_problems(*V100, CU130, "2.13.0+cu130", "float16")
    assert message.startswith("Tesla V100-SXM2-32GB, compute capability 7.0: torch 2.13.0+cu130 has no kernels for it")
    assert "only for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120;" in message
    assert 'pip install --force-reinstall "torch<2.15" --index-url https://download.pytorch.org/whl/cu126' in message


def test_v100_trains_in_fp16_and_fp32_but_not_in_bf16() -> None:
    assert gpu_problems(*V100, CU126, "2.13.0+cu126", "float16") == []
    assert gpu_problems(*V100, CU126, "2.13.0+cu126", None) == []
    (message,) = gpu_problems(*V100, CU126, "2.13.0+cu126", "bfloat16")
    assert "has no bf16; write `engine: zero0_fp16` or `engine: zero0_fp32`" in message


@pytest.mark.parametrize(
    ("capability", "arch_list"),
    [
        ((7, 5), CU130),
        ((8, 6), ["sm_80"]),
        ((8, 9), CU130),
        ((9, 0), CU130),
        ((9, 0), ["sm_90"]),
        ((9, 0), ["sm_90a"]),
        ((10, 3), CU130),
        ((10, 3), ["sm_100f"]),
        ((12, 1), CU130),
        ((9, 0), ["sm_70", "compute_70"]),  # PTX
        ((13, 0), [*CU130, "compute_120"]),
        ((10, 3), ["compute_100f"]),
        ((7, 0), []),  # torch does not say what it was built for
    ],
)
def test_kernels_that_run(capability: tuple[int, int], arch_list: list[str]) -> None:
    assert problems(capability, arch_list) == []


@pytest.mark.parametrize(
    ("capability", "arch_list"),
    [
        ((8, 0), ["sm_86"]),
        ((8, 0), ["sm_75", "sm_90"]),
        ((10, 0), CU126),
        ((9, 1), ["sm_90a"]),
        ((10, 0), ["compute_90a"]),
        ((11, 0), ["sm_100f"]),
        ((11, 0), ["compute_100f"]),
        ((7, 0), ["compute_75"]),
    ],
)
def test_kernels_that_do_not_run(capability: tuple[int, int], arch_list: list[str]) -> None:
    (message,) = problems(capability, arch_list)
    assert "has no kernels for it" in message


@pytest.mark.parametrize(
    ("capability", "remedy"),
    [
        ((3, 7), "no torch wheel"),
        ((5, 0), "whl/cu126"),
        ((7, 5), "13.0 wheels for x86-64 do: "),
        ((8, 0), "whl/cu130"),
        ((12, 1), "whl/cu130"),
        ((13, 0), "no torch wheel"),
    ],
)
def test_the_remedy_is_a_wheel_that_carries_the_capability(capability: tuple[int, int], remedy: str) -> None:
    (message,) = problems(capability, ["sm_90a"])
    assert remedy in message


def test_rocm_names_are_not_judged() -> None:
    assert problems((7, 0), ["gfx908", "gfx90a", "gfx1100"], "bfloat16") == []


def test_without_a_gpu_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [], CU130)
    check_gpus("bfloat16", 8)


def test_gpus_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [A100, A100], CU130)
    check_gpus("bfloat16", 8)


def test_equal_gpus_are_named_once_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [V100] * 8, CU130)
    with pytest.raises(MsltError) as refused:
        check_gpus("bfloat16", 8)
    lines = str(refused.value).splitlines()
    assert len(lines) == 2
    assert "no kernels" in lines[0]
    assert "no bf16" in lines[1]


def test_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [A100, V100], CU126)
    with pytest.raises(MsltError, match="V100") as refused:
        check_gpus("bfloat16", 8)
    assert "A100" not in str(refused.value)
    assert str(refused.value).endswith("or leave such a GPU out with CUDA_VISIBLE_DEVICES")


def test_only_gpus_that_workers_take_are_judged_and_none_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [A100, V100], CU126)
    check_gpus("bfloat16", 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_gpus("bfloat16", 2)
