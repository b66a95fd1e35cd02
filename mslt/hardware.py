"""What a described cluster would take for a step: peak rates from data sheets, and the share of them that is reached.

Peaks are dense, in TFLOP/s, with fp32 accumulation; fp32 is torch's default, without TF32. Sources: NVIDIA's data
sheets, as tabled in Lightning-AI/pytorch-lightning `src/lightning/fabric/utilities/throughput.py` (V100, T4, A100, L4,
H100; GeForce tensor rates there are those without tensor cores, twice those are taken), and the vendor's pages for the
RTX 3090 and 4090, L40S and H200.
"""

import re
from dataclasses import dataclass, replace
from itertools import pairwise

from mslt.cost import StepCosts, operations, scaled
from mslt.errors import MsltError
from mslt.plan import Plan, micro_batch_size

# What BERT-Large at 128 positions reached of the peak in plain PyTorch: V100 30 to 43 % in fp16, 61 to 77 % in fp32,
# A100 32 to 45 % in fp16 (NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT, README of 2019 to 2021).
HALF_EFFICIENCY, FP32_EFFICIENCY = 0.35, 0.65
# Moved for a parameter by LAMB in fp32: weight, gradient and two moments read, moments and update written; weight and
# update read for their norms, and again to write the weight.
LAMB_BYTES = 4 * (4 + 3 + 2 + 2 + 1)


_VARIANTS = {"pcie", "nvl", "ti", "super", "laptop", "d", "mig"}  # another card under nearly the same name


@dataclass(frozen=True)
class Gpu:
    fp32_tflops: float
    half_tflops: float
    memory_gb_per_s: float


GPUS = {
    "v100": Gpu(15.7, 125, 900),
    "t4": Gpu(8.1, 65, 320),
    "rtx3090": Gpu(35.6, 71, 936),
    "rtx4090": Gpu(82.6, 165.2, 1008),
    "a10": Gpu(31.2, 125, 600),
    "l4": Gpu(30.3, 121, 300),
    "l40s": Gpu(91.6, 362, 864),
    "a100": Gpu(19.5, 312, 2039),
    "h100": Gpu(66.9, 989.4, 3350),
    "h200": Gpu(66.9, 989.4, 4800),
}

WITHOUT_BF16 = ("v100", "t4")  # before compute capability 8.0


def tabled(device_name: str) -> Gpu | None:
    """The entry for a name as torch.cuda.get_device_name gives it; None for what is not tabled, variants included."""
    words = re.split(r"[\s-]+", device_name.lower())
    joined = [*words, *(first + second for first, second in pairwise(words))]  # RTX 3090
    return None if _VARIANTS & set(words) else next((card for name, card in GPUS.items() if name in joined), None)


@dataclass(frozen=True)
class Cluster:
    """`gpu` is a name of GPUS, None for GPUs like those here; `link_gbps` gigabits a second over the slowest link."""

    num_gpus: int
    gpu: str | None
    link_gbps: float | None


def cluster_costs(
    plan: Plan, cluster: Cluster, measured: tuple[StepCosts, int] | None, autocast: str | None, gradient_bytes: int
) -> StepCosts:
    """Seconds of a step there: from the table, or from costs `measured` on so many workers here. A ring all-reduces
    `gradient_bytes` for each parameter over the slowest link, beside the backward pass of the last micro-batch and the
    frozen layers of the next step's first; its latency is left out.

    MsltError for a GPU that is not tabled, and for a batch that is no multiple of the GPUs.
    """
    if measured is None:
        assert cluster.gpu is not None
        costs = _described_costs(plan, cluster.gpu, cluster.num_gpus, autocast)
    else:
        costs, num_workers = measured
        costs = scaled(costs, num_workers / cluster.num_gpus)
    sent = 2 * (cluster.num_gpus - 1) / cluster.num_gpus * gradient_bytes
    seconds = 0.0 if cluster.link_gbps is None else sent / (cluster.link_gbps * 1e9 / 8)
    stage = plan.stages[-1]
    last_micro_batch = micro_batch_size(stage, cluster.num_gpus) * cluster.num_gpus / stage.batch_size
    return replace(costs, reduce_once=0.0, reduce_parameter=seconds, overlap=last_micro_batch)


def _described_costs(plan: Plan, gpu: str, num_gpus: int, autocast: str | None) -> StepCosts:
    """Without communication and loading. Tensor cores are as fast in fp16 as in bf16, which some GPUs lack."""
    if gpu not in GPUS:
        raise MsltError(f"GPU {gpu}: no figures of it; take one of {', '.join(GPUS)}, or measure on one")
    card, stage = GPUS[gpu], plan.stages[-1]
    tflops = card.fp32_tflops * FP32_EFFICIENCY if autocast is None else card.half_tflops * HALF_EFFICIENCY
    per_sample = operations(plan.model, stage.sequence_length, plan.data.max_predictions)
    seconds = stage.batch_size / num_gpus / (tflops * 1e12)
    update_s = LAMB_BYTES / (card.memory_gb_per_s * 1e9)
    return replace(scaled(per_sample, seconds), optimizer_parameter=update_s)
