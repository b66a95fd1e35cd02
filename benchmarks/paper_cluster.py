"""What does the formula of `mslt plan` say of the paper's cluster: 32 V100s, on a network it does not name?

    python -m benchmarks.paper_cluster [--record FILE]

Nothing is measured here. Yang et al. 2020 (arXiv:2011.13635, table 3) give steps and hours of BERT-Base and Large, from
which the hours of 1,000,000 steps follow; precision and network are not given.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.config import load_recipe
from mslt.forecast import forecasts
from mslt.hardware import FP32_EFFICIENCY, GPUS, HALF_EFFICIENCY, Cluster, cluster_costs
from mslt.provenance import provenance
from mslt.schedule import make_plan

NUM_GPUS, LINKS_GBPS = 32, (10, 25, 50, 100, 200)
PRECISIONS: dict[str, tuple[str | None, int]] = {"fp32": (None, 4), "fp16": ("float16", 2)}


@dataclass(frozen=True)
class Reported:
    """Hours of 1,000,000 steps."""

    full_h: float
    mslt_h: float


PAPER = {
    "bert-base": Reported(full_h=41 / 0.48, mslt_h=40.0),  # 480,000 steps in 41 h; 1,000,000 in 40 h
    "bert-large": Reported(full_h=42 / 0.23, mslt_h=42 / 0.5),  # 230,000 and 500,000 steps in 42 h
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    rows = []
    for name, paper in PAPER.items():
        recipe = load_recipe(name)
        plan = make_plan(recipe, {})
        for precision, (autocast, gradient_bytes) in PRECISIONS.items():
            for link_gbps in LINKS_GBPS:
                costs = cluster_costs(plan, Cluster(NUM_GPUS, "v100", link_gbps), None, autocast, gradient_bytes)
                costs = replace(costs, overlap=0.0)  # DeepSpeed without ZeRO reduces after the backward pass
                hours = {one.name: one.total_s / 3600 for one in forecasts(recipe, costs)}
                full_h, mslt_h = hours["full"], hours["mslt, k=4"]
                shown = (f"{full_h:.1f}", f"{mslt_h:.1f}", f"{full_h / mslt_h:.2f}×")
                rows.append([f"{name}, {precision}, {link_gbps} Gb/s", *shown])
        reported = (f"{paper.full_h:.1f}", f"{paper.mslt_h:.1f}", f"{paper.full_h / paper.mslt_h:.2f}×")
        rows.append([f"**{name}, as reported**", *reported])
    card = GPUS["v100"]
    note = (
        f"Predicted hours of 1,000,000 steps of 1,024 samples on {NUM_GPUS} V100s (peaks {card.fp32_tflops} TFLOP/s in "
        f"fp32, {card.half_tflops} in fp16, of which {FP32_EFFICIENCY:.0%} and {HALF_EFFICIENCY:.0%} are taken to be "
        "reached), a ring all-reduce after the backward pass over the slowest link, k=4, a fifth of the steps to "
        "retrain. The reported hours follow from table 3 of the paper. No one row's precision and network fits both "
        "models."
    )
    head = heading("The paper's cluster, predicted", this_command(), provenance(), f"none needed ({hardware()})")
    write_record(options.record, [*head, note, "", *table(["", "full, h", "mslt, h", "speedup"], rows)])


if __name__ == "__main__":
    main()
