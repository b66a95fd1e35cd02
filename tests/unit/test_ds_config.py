"""DeepSpeed's configuration: what belongs to the recipe is refused, what is shipped is read, and what we complete it to
is what DeepSpeed takes it for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mslt.config import parse_recipe
from mslt.engine.ds_config import complete, read_engine_config, remarks, zero_stage
from mslt.errors import MsltError
from mslt.plan import Plan, autocast_dtype
from mslt.schedule import make_plan

CONFIGS = Path(__file__).parents[2] / "ds_configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OWNED = {
    "train_batch_size": (8, "training.batch_size"),
    "train_micro_batch_size_per_gpu": (8, "training.micro_batch_size"),
    "gradient_accumulation_steps": (2, "training.micro_batch_size"),
    "gradient_clipping": (1.0, "training.clip_norm"),
    "optimizer": ({"type": "Lamb"}, "optimizer"),
    "scheduler": ({"type": "WarmupLR"}, "schedule"),
}


def write(folder: Path, config: Any) -> str:
    path = folder / "engine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_is_read(name: str) -> None:
    config = read_engine_config(name)
    assert config == json.loads((CONFIGS / f"{name}.json").read_text())
    assert config == read_engine_config(str(CONFIGS / f"{name}.json"))


def test_a_configuration_for_every_stage_and_precision_is_shipped() -> None:
    dtypes = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
    assert set(SHIPPED) == {f"zero{stage}_{precision}" for stage in range(4) for precision in dtypes}
    for name in SHIPPED:
        config, precision = read_engine_config(name), name[-4:]
        assert zero_stage(config) == int(name[4])
        assert autocast_dtype(config) == dtypes[precision]
        assert config["communication_data_type"] == precision


def test_what_is_not_said_is_fp32_without_zero(tmp_path: Path) -> None:
    for said in ({}, {"zero_optimization": {}}, {"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}):
        config = read_engine_config(write(tmp_path, said))
        assert config == said
        assert zero_stage(config) == 0
        assert autocast_dtype(config) is None


@pytest.mark.parametrize("key", OWNED)
def test_number_of_the_recipe_is_refused_by_name(tmp_path: Path, key: str) -> None:
    value, owner = OWNED[key]
    with pytest.raises(MsltError, match=rf"engine.json: 1 mistake\n  {key}: belongs to the recipe, under .*{owner}"):
        read_engine_config(write(tmp_path, {key: value}))


@pytest.mark.parametrize(("section", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_precision_that_rounds_the_masters_is_refused(tmp_path: Path, section: str, dtype: str) -> None:
    with pytest.raises(MsltError, match=f'{section}: rounds .* "torch_autocast": .*"{dtype}"'):
        read_engine_config(write(tmp_path, {section: {"enabled": True}}))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stage_is_read(tmp_path: Path, stage: int) -> None:
    config = read_engine_config(write(tmp_path, {"zero_optimization": {"stage": stage}}))
    assert config == {"zero_optimization": {"stage": stage}}
    assert zero_stage(config) == stage


@pytest.mark.parametrize("stage", [4, -1, "1", 1.5, None])
def test_zero_stage_that_does_not_exist_is_refused(tmp_path: Path, stage: Any) -> None:
    with pytest.raises(MsltError, match=rf"zero_optimization.stage: Input should be 0, 1, 2 or 3, not {stage!r}"):
        read_engine_config(write(tmp_path, {"zero_optimization": {"stage": stage}}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reduce_bucket_size", 0),
        ("reduce_bucket_size", 5e8),
        ("allgather_bucket_size", 7),
        ("overlap_comm", "perhaps"),
        ("compute_grad_norm", True),
        ("offload_optimizer", {"device": "cpu"}),
        ("round_robin_gradients", True),
        ("sub_group_size", 1000),
    ],
)
def test_what_zero_must_not_be_told_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(MsltError, match=rf"1 mistake\n  zero_optimization\.{key}: "):
        read_engine_config(write(tmp_path, {"zero_optimization": {"stage": 1, key: value}}))


@pytest.mark.parametrize(("key", "value"), [("prescale_gradients", True), ("gradient_predivide_factor", 2.0)])
def test_how_the_sum_of_gradients_is_divided_is_not_for_a_file(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(MsltError, match=rf"1 mistake\n  {key}: unknown key"):
        read_engine_config(write(tmp_path, {key: value}))


@pytest.mark.parametrize(
    "config",
    [
        {"managed_gradient_accumulation": False},
        {"gradient_allreduce_op": "sum"},
        {"amp": {"enabled": True}},
        {"communication_data_type": "fp17"},
        {"zero_optimization": "x"},
        {"zero_optimization": {"stage": None}},
        {"torch_autocast": {"enabled": True, "dtype": "float8"}},
    ],
)
def test_a_key_that_would_change_the_gradient_or_nothing_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(MsltError, match=next(iter(config))):
        read_engine_config(write(tmp_path, config))


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    wrong = {key: value for key, (value, _) in OWNED.items()}
    with pytest.raises(MsltError) as caught:
        read_engine_config(write(tmp_path, {**wrong, "fp16": {}, "bf16": {}, "zero_optimization": {"stage": 4}}))
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        *OWNED,
        "bf16",
        "fp16",
        "zero_optimization.stage",
    ]


def test_what_is_no_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(MsltError, match=r"engine.json: not readable as JSON"):
        read_engine_config(write(tmp_path, "{"))
    with pytest.raises(MsltError, match=r"engine.json: 1 mistake"):
        read_engine_config(write(tmp_path, []))
    with pytest.raises(MsltError, match=f"zero9: not shipped with mslt; take one of {', '.join(SHIPPED)}"):
        read_engine_config("zero9")
    with pytest.raises(MsltError, match=r"none.json: no such file"):
        read_engine_config(str(tmp_path / "none.json"))


@pytest.mark.parametrize(("world_size", "share"), [(1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("name", SHIPPED)
def test_completed_configuration_carries_the_plans_numbers(
    tiny_plan: Plan, name: str, world_size: int, share: int
) -> None:
    config = read_engine_config(name)
    completed = complete(config, tiny_plan.stages[1], world_size)
    assert completed["train_micro_batch_size_per_gpu"] == share
    assert completed["gradient_accumulation_steps"] == 1
    assert completed["gradient_clipping"] == 0.0, "written out, for DeepSpeed's default clips"
    assert completed["communication_data_type"] == config["communication_data_type"]
    assert completed["zero_optimization"].items() >= config["zero_optimization"].items()
    assert not {"torch_autocast", "bf16", "fp16", "optimizer", "scheduler"} & completed.keys()
    assert config == read_engine_config(name), "what was given stays as it was"


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_takes_the_completed_configuration_for_what_it_says(tiny_plan: Plan, name: str) -> None:
    config = read_engine_config(name)
    taken = DeepSpeedConfig(complete(config, tiny_plan.stages[1], 1))
    zero = taken.zero_config
    assert taken.zero_optimization_stage == zero_stage(config)
    assert (taken.train_batch_size, taken.train_micro_batch_size_per_gpu, taken.gradient_accumulation_steps) == (
        8,
        8,
        1,
    )
    assert taken.gradient_clipping == 0.0
    assert taken.communication_data_type == DTYPES[name[-4:]]
    assert (zero.reduce_bucket_size, zero.allgather_bucket_size) == (5_000_000, 20_000_000)
    assert not zero.overlap_comm
    assert zero.compute_grad_norm is (zero_stage(config) in (0, 3)), "DeepSpeed refuses false there"
    assert (taken.prescale_gradients, taken.gradient_predivide_factor) == (False, 1.0)
    assert not taken.torch_autocast_enabled
    assert not taken.bfloat16_config.enabled
    assert not taken.float16_config.enabled
    assert taken.zero_allow_untested_optimizer
    assert not taken.timers_config.enabled


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_file_does_not_say_is_not_left_to_deepspeed(tiny_plan: Plan, stage: int) -> None:
    completed = complete({"zero_optimization": {"stage": stage}}, tiny_plan.stages[0], 1)["zero_optimization"]
    theirs = DeepSpeedZeroConfig(stage=stage)
    assert (completed["reduce_bucket_size"], completed["allgather_bucket_size"]) == (5_000_000, 20_000_000)
    assert theirs.reduce_bucket_size == theirs.allgather_bucket_size == 500_000_000, "2 GB, more than a BERT"
    assert completed["overlap_comm"] is False
    assert ("compute_grad_norm" in completed) == (stage in (1, 2))
    assert completed.get("compute_grad_norm", False) is False
    smaller = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}
    assert complete(smaller, tiny_plan.stages[0], 1)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert complete({}, tiny_plan.stages[0], 1)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(
    ("stage", "micro_batch_size", "world_size", "said"),
    [
        (0, 1, 2, []),
        (1, 1, 2, []),
        (2, 4, 2, []),  # one micro-batch
        (2, 1, 1, []),  # nothing to reduce
        (2, 1, 2, [r"ZeRO-2 reduces .*: 4 times the bytes of ZeRO-0 and 1"]),
        (2, 3, 2, [r"ZeRO-2 reduces .*: 2 times the bytes"]),  # 4 samples a worker, at most 3 at once: 2 and 2
        (3, 4, 2, [r"ZeRO-3 gathers frozen weights"]),
        (3, 2, 2, [r"ZeRO-3 reduces .*: 2 times the bytes", r"ZeRO-3 gathers frozen weights"]),
    ],
)
def test_what_costs_more_than_another_stage_is_said(
    tiny_recipe: dict[str, Any], stage: int, micro_batch_size: int, world_size: int, said: list[str]
) -> None:
    tiny_recipe["training"]["micro_batch_size"] = micro_batch_size
    plan = make_plan(parse_recipe(tiny_recipe, "r"), {"zero_optimization": {"stage": stage}})
    found = remarks(plan, world_size)
    assert len(found) == len(said)
    for line, pattern in zip(found, said, strict=True):
        assert re.match(pattern, line), line


def test_nothing_is_said_of_freezing_where_nothing_is_frozen(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["schedule"] = {"name": "full", "steps": 60}
    assert remarks(make_plan(parse_recipe(tiny_recipe, "r"), {"zero_optimization": {"stage": 3}}), 1) == []
