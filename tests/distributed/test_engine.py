"""The engine under the real launcher, against plain torch in one process."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mslt.config import parse_recipe
from mslt.cost import stage_cost
from mslt.data.loader import Samples
from mslt.data.shards import open_shards
from mslt.engine.ds_config import read_engine_config
from mslt.models import factory
from mslt.plan import Plan
from mslt.schedule import make_plan
from tests.distributed.oracle import train_plainly
from tests.distributed.runs import TIMEOUT_S

STEPS = 4
TINY_COLLECTIVES_BYTES = 16  # the count of masked positions (int64), and DeepSpeed's gradient norm (fp32)
ROOT = Path(__file__).parents[2]


def plan_of(sections: dict[str, Any], **model: float) -> Plan:
    sections = copy.deepcopy(sections)
    sections["model"] |= model
    recipe = parse_recipe(sections, "recipe for tests")
    return make_plan(recipe, read_engine_config(recipe.engine))


def probe(folder: Path, plan: Plan, stage_index: int, shards: Path, workers: int) -> list[tuple[Any, dict[str, Any]]]:
    """(weights, what was written down) of each rank after STEPS steps of the stage."""
    folder.mkdir()
    stage = plan.stages[stage_index]
    save_file(factory.initial_state(plan.model, stage.depth, seed=3), folder / "base.safetensors")
    job = {"plan": plan.model_dump(mode="json"), "stage_index": stage_index, "steps": STEPS, "shards": str(shards)}
    paths = {"base": str(folder / "base.safetensors"), "out": str(folder)}
    (folder / "job.json").write_text(json.dumps(job | paths))
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(workers), "--master_addr", "127.0.0.1"),
        *("--master_port", str(29600 + workers), "--no_local_rank", "--module", "tests.distributed.probe"),
        str(folder / "job.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT)
    assert (folder / f"rank-{workers - 1}.json").exists(), done.stdout + done.stderr
    return [
        (load_file(folder / f"rank-{rank}.safetensors"), json.loads((folder / f"rank-{rank}.json").read_text()))
        for rank in range(workers)
    ]


@pytest.mark.parametrize("stage_index", [0, 1])
def test_two_workers_reduce_the_trainable_gradients_alone_and_agree_bit_for_bit(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any], stage_index: int
) -> None:
    plan = plan_of(tiny_recipe)
    (weights, told), (other_weights, other_told) = probe(tmp_path / "probe", plan, stage_index, shards, workers=2)
    cost = stage_cost(plan.model, plan.stages[stage_index])
    for step in told["reduced"]:
        large = [size for size in step if size > TINY_COLLECTIVES_BYTES]
        assert sum(large) == cost.fp32_gradient_bytes
        assert sum(step) - sum(large) <= TINY_COLLECTIVES_BYTES
    assert told["counted"] == STEPS * cost.fp32_gradient_bytes
    assert told == other_told
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_accumulation_give_the_update_of_plain_torch(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any], workers: int
) -> None:
    # Dropout off, so that one batch of 8 and two or four micro-batches on one or two workers compute the same.
    plan = plan_of(tiny_recipe, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    stage = plan.stages[1]
    assert stage.micro_batch_size < stage.batch_size, "nothing would accumulate"
    ranks = probe(tmp_path / "probe", plan, 1, shards, workers)
    base = load_file(tmp_path / "probe" / "base.safetensors")
    samples = Samples(open_shards(shards, "train"), plan.data, stage.sequence_length, stage.seed)
    expected = train_plainly(plan, 1, base, samples, STEPS)
    for name, weight in expected.items():
        found = ranks[0][0][name]
        if name in ranks[0][1]["trained"]:
            assert not torch.equal(found, base[name]), f"{name} did not move"
            if not name.endswith("attention.self.key.bias"):  # its true gradient is 0: rounding, scaled up by LAMB
                torch.testing.assert_close(found, weight, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(found, base[name]), f"{name} is frozen"
