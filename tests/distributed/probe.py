"""One worker of a test: a few steps of one stage through the engine, with every collective written down.

Started by the launcher with a JSON file: {plan, stage_index, steps, shards, base, out}. Rank r writes
out/rank-r.safetensors (all weights at the end) and out/rank-r.json: bytes handed to all_reduce at each step,
the engine's own count, and the ids it optimizes.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mslt.data.loader import Samples, training_batches
from mslt.data.shards import open_shards
from mslt.engine.engine import Engine, quiet, start_workers
from mslt.models import factory
from mslt.models.forward import PretrainingLoss
from mslt.models.freezing import freeze
from mslt.plan import Plan, lowest_graph_layer
from mslt.schedule import lr_at


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    plan = Plan.model_validate(job["plan"])
    stage = plan.stages[job["stage_index"]]
    quiet()
    workers = start_workers()

    reduced: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *arguments: object, **keywords: object) -> object:
        reduced.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *arguments, **keywords)

    torch.distributed.all_reduce = counted

    model = factory.build(plan.model, stage.depth, load_file(job["base"]))
    freeze(model, stage.trainable)
    module = PretrainingLoss(model, lowest_graph_layer(stage.trainable, stage.depth))
    first_step = plan.first_step(job["stage_index"])
    engine = Engine(module, stage, first_step, plan.optimizer, plan.clip_norm, plan.engine, workers)
    samples = Samples(open_shards(job["shards"], "train"), plan.data, stage.sequence_length, stage.seed)
    batches = training_batches(samples, stage, workers.rank, workers.size, 0, 0)
    per_step = []
    for step in range(job["steps"]):
        reduced.clear()
        engine.train_step(next(batches), step, lr_at(stage, step))
        per_step.append(list(reduced))
    out = Path(job["out"])
    save_file(engine.export_state(), out / f"rank-{workers.rank}.safetensors")
    about = {"reduced": per_step, "counted": engine.reduced_bytes, "trained": sorted(engine.trainable())}
    (out / f"rank-{workers.rank}.json").write_text(json.dumps(about))
    engine.close()
    workers.barrier()


if __name__ == "__main__":
    main()
