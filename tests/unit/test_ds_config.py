"""DeepSpeed's configuration: what belongs to the recipe is refused, what is shipped is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from mslt.engine.ds_config import complete, read_engine_config
from mslt.errors import MsltError
from mslt.plan import Plan

CONFIGS = Path(__file__).parents[2] / "ds_configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))
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


def test_a_configuration_for_every_precision_is_shipped() -> None:
    assert {"zero0_fp32", "zero0_bf16", "zero0_fp16"} <= set(SHIPPED)
    dtypes = {name: read_engine_config(name).get("torch_autocast", {}).get("dtype") for name in SHIPPED}
    assert dtypes["zero0_fp32"] is None
    assert dtypes["zero0_bf16"] == "bfloat16"
    assert dtypes["zero0_fp16"] == "float16"


@pytest.mark.parametrize("key", OWNED)
def test_number_of_the_recipe_is_refused_by_name(tmp_path: Path, key: str) -> None:
    value, owner = OWNED[key]
    with pytest.raises(MsltError, match=rf"engine.json: 1 mistake\n  {key}: belongs to the recipe, under .*{owner}"):
        read_engine_config(write(tmp_path, {key: value}))


@pytest.mark.parametrize(("section", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_precision_that_rounds_the_masters_is_refused(tmp_path: Path, section: str, dtype: str) -> None:
    with pytest.raises(MsltError, match=f'{section}: rounds .* "torch_autocast": .*"{dtype}"'):
        read_engine_config(write(tmp_path, {section: {"enabled": True}}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stage_that_is_not_supported_is_refused(tmp_path: Path, stage: int) -> None:
    with pytest.raises(MsltError, match=rf"zero_optimization.stage: Input should be 0, not {stage}"):
        read_engine_config(write(tmp_path, {"zero_optimization": {"stage": stage}}))


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
        read_engine_config(write(tmp_path, {**wrong, "fp16": {}, "bf16": {}, "zero_optimization": {"stage": 1}}))
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
def test_completed_configuration_carries_the_plans_numbers(tiny_plan: Plan, world_size: int, share: int) -> None:
    config = {"zero_optimization": {"stage": 0}, "communication_data_type": "fp32"}
    completed = complete(config, tiny_plan.stages[1], 0.0, world_size)
    assert completed.items() >= config.items()
    assert completed["train_micro_batch_size_per_gpu"] == share
    assert completed["gradient_accumulation_steps"] == 1
    assert completed["gradient_clipping"] == 0.0, "written out, for DeepSpeed's default clips"
    assert config == {"zero_optimization": {"stage": 0}, "communication_data_type": "fp32"}
