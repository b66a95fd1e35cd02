"""What every growth schedule keeps, ours and a user's: depths that follow, steps that add up, no layer untrained."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mslt.config import parse_recipe
from mslt.errors import MsltError
from mslt.growth import SCHEDULES, Growth, find_schedule, option_mistakes, stages_of
from mslt.plan import HEAD_SLOTS, Plan, all_slots, layer_slots
from mslt.schedule import lr_at, make_plan, trainable_slots

# A late growth of the last layer alone, three times over: what a user would write.
OWN = """
from typing import Annotated

from pydantic import Field

from mslt.growth import Growth, random_layers, split_steps


def last_layer_thrice(depth: int, steps: int, *, early_share: Annotated[float, Field(gt=0, lt=1)] = 0.5):
    \"\"\"Train all but two layers first, then copy the last one upwards.\"\"\"
    first = depth - 2
    if first < 1:
        raise ValueError(f"early_share: model.num_hidden_layers {depth} leaves no layer to begin with")
    early, late = split_steps(steps, (early_share, 1 - early_share))
    return [
        Growth(sources=random_layers(first), steps=early),
        Growth(sources=(*range(first), first - 1, first - 1), steps=late, freeze="below"),
    ]
"""
# What a user may get wrong, and a generator, which is right.
FAILURES = """
from mslt.growth import Growth, random_layers


def one_parameter(depth): ...
def any_options(depth, steps, **options): ...
def without_annotation(depth, steps, *, share=0.5): ...
def positional_option(depth, steps, share: float = 0.5): ...
def returns_none(depth, steps): ...
def returns_nothing(depth, steps): return []
def returns_tuples(depth, steps): return [(random_layers(depth), steps)]
def raises_type_error(depth, steps): return depth + "layers"
def raises_key_error(depth, steps): return {}["shares"]
def raises_zero_division(depth, steps): return steps // (depth - depth)
def raises_index_error(depth, steps): return [][depth]
def raises_attribute_error(depth, steps): return depth.layers
def freezes_top(depth, steps): return [Growth(sources=random_layers(depth), steps=steps, freeze="top")]
def halves(depth, steps): return [Growth(sources=random_layers(depth), steps=steps / 2)] * 2
def unknown_annotation(depth, steps, *, share: "Portion" = 0.5): ...
def no_plain_annotation(depth, steps, *, share: Exception = None): ...
def insists(depth, steps): assert depth == 3
def copies_a_name(depth, steps): return [Growth(sources=["last"] * depth, steps=steps)]


def one_by_one(depth, steps):
    yield Growth(sources=random_layers(1), steps=steps - 1)
    yield Growth(sources=(0,) * depth, steps=1)
"""
# Name, options, and the multiple that the depth must be of.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("full", {}, 1),
    *(("mslt", {"k": k, "retrain_share": share}, k) for k in (1, 2, 3, 4) for share in (0.1, 0.5)),
    *(("mslt", {"k": 3, "freeze": freeze}, 3) for freeze in ("none", "below", "embeddings")),
    ("mslt", {"k": 2, "new_layers": "random"}, 2),
    ("stacking", {}, 4),
    ("stacking", {"shares": [3, 7], "freeze": "below"}, 2),
    ("stacking", {"shares": [1, 1, 1, 1], "freeze": "embeddings"}, 8),
    ("interleave", {}, 4),
    ("interleave", {"shares": [3, 7], "freeze": "below"}, 2),
    ("one_shot", {"start_depth": 1}, 2),
    ("one_shot", {"start_depth": 2, "shallow_share": 0.8, "new_layers": "random"}, 3),
    ("one_shot", {"start_depth": 3, "freeze": "below"}, 4),
    ("stages", {"stages": [{"sources": "random,random", "share": 1}, {"sources": "0-1,random,0", "share": 3}]}, 0),
    ("own_schedules:last_layer_thrice", {"early_share": 0.7}, 3),
]


@pytest.fixture(autouse=True)
def own_module(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_schedules.py").write_text(OWN)
    (folder / "own_failures.py").write_text(FAILURES)
    (folder / "own_broken.py").write_text("def f(depth, steps:\n")
    monkeypatch.syspath_prepend(str(folder))


def planned(tiny_sections: dict[str, Any], name: str, options: dict[str, Any], depth: int, steps: int) -> Plan:
    model = tiny_sections["model"] | {"num_hidden_layers": depth}
    schedule = {"name": name, "steps": steps, **options}
    return make_plan(parse_recipe({**tiny_sections, "model": model, "schedule": schedule}, "recipe"), {})


@pytest.mark.parametrize(("name", "options", "multiple"), CASES, ids=lambda value: str(value)[:40])
@settings(deadline=None, max_examples=25, print_blob=True)
@given(times=st.integers(1, 4), steps=st.integers(40, 10**6))
def test_every_schedule_keeps_the_contract(
    tiny_sections: dict[str, Any], name: str, options: dict[str, Any], multiple: int, times: int, steps: int
) -> None:
    depth = multiple * times or 4
    stages = stages_of(find_schedule(name), depth, steps, options)
    assert stages == stages_of(find_schedule(name), depth, steps, options), "the same input, another plan"
    assert sum(stage.steps for stage in stages) == steps
    assert min(stage.steps for stage in stages) >= 1
    depths = [len(stage.sources) for stage in stages]
    assert depths == sorted(depths)
    assert depths[-1] == depth
    assert stages[0].sources == ("random",) * depths[0]

    plan = planned(tiny_sections, name, options, depth, steps)
    assert [stage.sources for stage in plan.stages] == [stage.sources for stage in stages]
    assert set(plan.stages[0].trainable) == set(all_slots(depths[0]))
    learned: list[bool] = []  # of each layer, whether it or what it was copied from has trained
    for stage in plan.stages:
        assert set(HEAD_SLOTS) <= set(stage.trainable)
        before, learned = learned, []
        for source, slot in zip(stage.sources, layer_slots(0, stage.depth), strict=True):
            learned.append(slot in stage.trainable or (source != "random" and before[source]))
    assert all(learned)
    for index in range(1, len(plan.stages)):
        before_stage, stage = plan.stages[index - 1 : index + 1]
        assert stage.first_sample == before_stage.first_sample + before_stage.steps * before_stage.batch_size
        border = sum(each.steps for each in plan.stages[:index])
        one_step = 0.01 / 5 if border <= 5 else 0.01 / (steps - 5)  # of the warm-up, or of the fall
        assert abs(lr_at(stage, 0) - lr_at(before_stage, before_stage.steps - 1)) <= 1.0001 * one_step


@pytest.mark.parametrize(
    ("name", "options", "sources"),
    [
        ("stacking", {}, [("random",) * 2, (0, 1, 0, 1), (0, 1, 2, 3, 0, 1, 2, 3)]),
        ("interleave", {}, [("random",) * 2, (0, 0, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3)]),
        ("one_shot", {"start_depth": 1}, [("random",), (0,) * 8]),
        ("one_shot", {"start_depth": 3}, [("random",) * 3, (0, 1, 2, 0, 1, 2, 0, 1)]),
        ("one_shot", {"start_depth": 6, "new_layers": "random"}, [("random",) * 6, (*range(6), "random", "random")]),
        ("mslt", {"k": 2, "new_layers": "random"}, [("random",) * 4, (*range(4), *["random"] * 4), tuple(range(8))]),
        ("stages", {"stages": [{"sources": "random,random,random", "share": 1}, {"sources": "0-2,0-2,1,random",
         "share": 1}]}, [("random",) * 3, (0, 1, 2, 0, 1, 2, 1, "random")]),
    ],
)  # fmt: skip
def test_layers_come_from_where_the_paper_says(name: str, options: dict[str, Any], sources: list[Any]) -> None:
    assert [stage.sources for stage in stages_of(find_schedule(name), 8, 80, options)] == sources


def test_steps_are_divided_as_written() -> None:
    def steps(name: str, total: int, **options: Any) -> list[int]:
        return [stage.steps for stage in stages_of(find_schedule(name), 12, total, options)]

    assert steps("stacking", 400_000) == [50_000, 70_000, 280_000]
    assert steps("stacking", 10, shares=[1, 1, 1]) == [3, 4, 3]
    assert steps("one_shot", 10, shallow_share=0.8) == [8, 2]
    listed = [{"sources": ",".join(["random"] * 12), "share": 3}, {"sources": "0-11", "share": 1}]
    assert steps("stages", 100, stages=listed) == [75, 25]


@pytest.mark.parametrize(
    ("sources", "freeze", "trainable"),
    [
        ((0, 1, 2, 0, 1, 2), "below", (*layer_slots(3, 6), *HEAD_SLOTS)),
        ((0, 1, 2, 0, 1, 2), "embeddings", (*layer_slots(0, 6), *HEAD_SLOTS)),
        ((0, 1, 2, 0, 1, 2), "none", all_slots(6)),
        ((0, 0, 1, 1), "below", (*layer_slots(1, 4), *HEAD_SLOTS)),
        ((1, 0), "below", (*layer_slots(0, 2), *HEAD_SLOTS)),
        ((0, 1, "random"), "below", (*layer_slots(2, 3), *HEAD_SLOTS)),
        ((0, 1), "below", HEAD_SLOTS),
    ],
)
def test_below_freezes_what_stands_where_it_stood(sources: Any, freeze: Any, trainable: tuple[str, ...]) -> None:
    assert trainable_slots(Growth(sources=sources, steps=1, freeze=freeze)) == trainable


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "mslt", "k": 3}, "schedule.k: 3 does not divide model.num_hidden_layers 4; take one of 1, 2, 4"),
        ({"name": "mslt"}, "schedule.k: missing"),
        ({"name": "mslt", "k": 2, "kk": 2}, "schedule.kk: unknown key; remove it or mend its spelling"),
        ({"name": "full", "k": 2}, "schedule.k: unknown key; remove it or mend its spelling"),
        ({"name": "mslt", "k": 2, "freeze": "all"}, "schedule.freeze: Input should be 'none', 'below' or"),
        ({"name": "mslt", "k": 2, "new_layers": "zero"}, "schedule.new_layers: Input should be 'copy' or 'random'"),
        ({"name": "stacking", "shares": [1, 1, 1, 1]}, "schedule.shares: 4 stages double the depth 3 times, and 8"),
        ({"name": "stacking", "shares": [1]}, "schedule.shares: Tuple should have at least 2 items"),
        ({"name": "stacking", "shares": [1, -1]}, "schedule.shares.1: Input should be greater than 0"),
        ({"name": "stacking", "shares": [1, 1e9]}, "schedule.steps: 60 are too few for these options"),
        ({"name": "one_shot", "start_depth": 4}, "schedule.start_depth: 4 is not below model.num_hidden_layers 4"),
        ({"name": "one_shot", "shallow_share": 1}, "schedule.shallow_share: Input should be less than 1"),
        ({"name": "stages", "stages": []}, "schedule.stages: Tuple should have at least 1 item"),
        ({"name": "stages", "stages": [{"sources": "0-3", "share": 1}]}, "schedule.name: stage 1 copies layers"),
        ({"name": "stages", "stages": [{"sources": "random", "share": 1}]}, "schedule.name: the last stage has 1 lay"),
        ({"name": "stages", "stages": [{"sources": "3-0", "share": 1}]}, "schedule.sources '3-0': '3-0' is no layer"),
        ({"name": "stages", "stages": [{"sources": "random,random,random,random", "share": 1, "freeze": "below"}]},
         "schedule.freeze: the first stage is new and cannot freeze (below); write none"),
        ({"name": "stages", "stages": [{"share": 1}]}, "schedule.stages.0.sources: missing"),
        ({"name": "nowhere:f"}, "schedule.name: 'nowhere:f' cannot be loaded (No module named 'nowhere')"),
        ({"name": "own_schedules:none"}, "schedule.name: 'own_schedules:none' cannot be loaded"),
        ({"name": "os:environ"}, "schedule.name: 'os:environ' is no function (depth, steps, *, options with"),
        ({"name": ":f"}, "schedule.name: ':f' is none of full, mslt, stacking"),
        ({"name": "own_broken:f"}, "schedule.name: 'own_broken:f' cannot be loaded ("),
        ({"name": "grow"}, "schedule.name: 'grow' is none of full, mslt, stacking, one_shot, interleave, stages"),
        ({"name": "own_schedules:last_layer_thrice", "early_share": 2}, "schedule.early_share: Input should be less"),
        ({"name": "mslt", "k": 2, "learning_rate": "per_stage", "rewarmup_steps": 3}, "schedule.rewarmup_steps: "),
        # 24, 24 and 12 steps: the later stages' fewest count, and the first stage's do not.
        ({"name": "mslt", "k": 2, "rewarmup_steps": 12}, "schedule.rewarmup_steps: 12 is not below a stage's 12 steps"),
        ({"name": "one_shot", "shallow_share": 0.1, "rewarmup_steps": 54},
         "schedule.rewarmup_steps: 54 is not below a stage's 54 steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tiny_recipe: dict[str, Any], schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(MsltError) as refusal:
        parse_recipe({**tiny_recipe, "schedule": {"steps": 60, **schedule}}, "recipe")
    assert str(refusal.value).splitlines()[1].strip().startswith(message)


def test_all_mistakes_of_a_schedule_are_listed_at_once(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["schedule"] = {"name": "mslt", "steps": 60, "retrain_share": 7, "freeze": "x", "z": 1}
    with pytest.raises(MsltError) as refusal:
        parse_recipe(tiny_recipe, "recipe")
    assert [line.split(":")[0].strip() for line in str(refusal.value).splitlines()[1:]] == [
        "schedule.k", "schedule.retrain_share", "schedule.freeze", "schedule.z",
    ]  # fmt: skip


def test_a_schedule_that_breaks_the_contract_is_refused() -> None:
    def short(depth: int, steps: int) -> list[Growth]:
        return [Growth(sources=("random",) * depth, steps=steps - 1)]

    with pytest.raises(ValueError, match="name: the stages have 9 steps, and not 10"):
        stages_of(short, 2, 10, {})


@pytest.mark.parametrize("function", ["one_parameter", "any_options", "without_annotation", "positional_option"])
def test_a_users_function_of_another_form_is_refused(tiny_recipe: dict[str, Any], function: str) -> None:
    tiny_recipe["schedule"] = {"name": f"own_failures:{function}", "steps": 60}
    with pytest.raises(MsltError) as refusal:
        parse_recipe(tiny_recipe, "recipe")
    (line,) = str(refusal.value).splitlines()[1:]
    says = "is no function (depth, steps, *, options with annotations)"
    assert line == f"  schedule.name: 'own_failures:{function}' {says}"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("returns_none", "the schedule failed on 4 layers and 60 steps: TypeError(\"'NoneType' object is not iterable"),
        ("returns_nothing", "the schedule returned no list of mslt.growth.Growth"),
        ("returns_tuples", "the schedule returned no list of mslt.growth.Growth"),
        ("raises_type_error", "the schedule failed on 4 layers and 60 steps: TypeError("),
        ("raises_key_error", "the schedule failed on 4 layers and 60 steps: KeyError('shares')"),
        ("raises_zero_division", "the schedule failed on 4 layers and 60 steps: ZeroDivisionError("),
        ("raises_index_error", "the schedule failed on 4 layers and 60 steps: IndexError("),
        ("raises_attribute_error", "the schedule failed on 4 layers and 60 steps: AttributeError("),
        ("freezes_top", "a stage's freeze is wrong: Input should be 'none', 'below' or 'embeddings'"),
        ("copies_a_name", "a stage's sources.0"),
    ],
)
def test_how_a_users_function_fails_is_said(tiny_recipe: dict[str, Any], function: str, message: str) -> None:
    tiny_recipe["schedule"] = {"name": f"own_failures:{function}", "steps": 60}
    with pytest.raises(MsltError) as refusal:
        parse_recipe(tiny_recipe, "recipe")
    said = str(refusal.value)
    assert said.splitlines()[1].startswith(f"  schedule.name: {message}")
    assert "too few" not in said


@pytest.mark.parametrize(
    "name",
    ["own_failures:halves", "own_failures:unknown_annotation", "own_failures:no_plain_annotation",
     "own_failures:insists", ".own_schedules:last_layer_thrice"],
)  # fmt: skip
def test_what_else_a_user_may_get_wrong_is_refused(tiny_recipe: dict[str, Any], name: str) -> None:
    tiny_recipe["schedule"] = {"name": name, "steps": 60}
    with pytest.raises(MsltError, match=r"schedule\.name: "):
        parse_recipe(tiny_recipe, "recipe")


def test_a_users_function_may_yield_its_stages(tiny_sections: dict[str, Any]) -> None:
    plan = planned(tiny_sections, "own_failures:one_by_one", {}, 4, 60)
    assert [(stage.sources, stage.steps) for stage in plan.stages] == [(("random",), 59), ((0,) * 4, 1)]


def test_an_anew_warm_up_below_every_later_stage_is_allowed(tiny_sections: dict[str, Any]) -> None:
    """Of 60 steps mslt has 24, 24 and 12; one stage alone has no later one."""
    for name, options in (("mslt", {"k": 2, "rewarmup_steps": 11}), ("full", {"rewarmup_steps": 100})):
        assert planned(tiny_sections, name, options, 4, 60).steps == 60


def test_an_installed_package_offers_its_schedule_by_name(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    (tmp_path / "own_schedules.py").write_text(OWN)
    metadata = tmp_path / "own_schedules-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-schedules\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mslt.schedules]\nlast_layer = own_schedules:last_layer_thrice\n")
    code = (
        "import sys; from mslt.growth import find_schedule, stages_of\n"
        "print([g.sources for g in stages_of(find_schedule('last_layer'), 4, 10, {})], 'torch' in sys.modules)\n"
        "try: find_schedule('other')\nexcept ValueError as e: print(e)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == "[('random', 'random'), (0, 1, 1, 1)] False"
    assert "interleave, stages, last_layer" in done.stdout


def test_options_are_checked_by_the_annotations_of_the_function() -> None:
    assert option_mistakes(SCHEDULES["one_shot"], {"start_depth": 2.5}) == [
        "start_depth: Input should be a valid integer, not 2.5"
    ]
    assert len([line for line in OWN.splitlines() if line]) <= 20, "a user's own schedule takes about 20 lines"


def test_schedules_of_the_page_are_right(tiny_sections: dict[str, Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()
    written = [yaml.safe_load(line.split("`")[1]) for line in page.splitlines() if line.startswith("| `{name: ")]
    assert {section["name"] for section in written} == {*SCHEDULES, "my_package.my_module:my_function"}
    for section in written:
        if section["name"] in SCHEDULES:
            options = {key: value for key, value in section.items() if key != "name"}
            depth = 4 if section["name"] == "stages" else 12
            assert planned(tiny_sections, section["name"], options, depth, 400).steps == 400
