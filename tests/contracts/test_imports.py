"""The code's shape: imports go down, one door to DeepSpeed, one file that knows Hugging Face's attributes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = (
    "errors", "files", "validation", "growth", "config", "plan", "schedule", "cost", "hardware", "forecast", "rundir",
    "metrics", "provenance", "nodes", "logs", "orphans", "pulse", "failures",
)  # fmt: skip
FLOORS = [
    {"mslt", *(f"mslt.{name}" for name in PLAIN)},
    {"mslt.data"},
    {"mslt.models", "mslt.heads", "mslt.model_card"},
    {"mslt.engine"},
    {
        "mslt.train",
        "mslt.measure",
        "mslt.study",
        "mslt.watch",
        "mslt.launcher",
        "mslt.meeting",
        "mslt.links",
        "mslt.doctor",
        "mslt.rounds",
        "mslt.supervisor",
        "mslt.preflight",
        "mslt.report",
        "mslt.evaluate",
    },
    {"mslt.cli"},
]
# What plain files never import, themselves or through a file of ours.
HEAVY = {
    "numpy", "torch", "transformers", "deepspeed", "tokenizers", "datasets", "pyarrow", "safetensors", "tensorboard",
    "matplotlib", "optuna",
}  # fmt: skip
DEEPSPEEDS_DOOR = "mslt.engine.engine"
# What each part of the engine may import of the others; `engine` puts them together, `ds_config` is plain.
ENGINE: dict[str, tuple[str, ...]] = {
    "checkpoint": (), "clock": (), "gpus": (), "pieces": (), "reduction": (), "apex": ("pieces",),
    "optimizer": ("apex", "pieces"),
}  # fmt: skip
ATTRIBUTES_HOME = "mslt.models.families"
HF_ATTRIBUTES = re.compile(
    r"\.(bert|seq_relationship|predictions|word_embeddings|token_type_embeddings|position_embeddings|decoder)\b"
    r"|\.encoder\.layer\b|\.cls\.(predictions|seq)|\.(embeddings|pooler)\b"
    r"|\.(base_model|embeddings_project|roberta|electra|out_proj)\b"
)
HF_KEYS = re.compile(
    r"\b(bert|encoder\.layer|cls\.predictions|cls\.seq_relationship)\.|word_embeddings|seq_relationship"
)
DATA_PREP_MAY_IMPORT = ("mslt.data", "mslt.errors", "mslt.files", "mslt.provenance", "mslt.validation")


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_name(path): path for package in ("mslt", "data_prep") for path in (ROOT / package).rglob("*.py")}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}
OURS = [name for name in TREES if name.split(".")[0] == "mslt"]


def imports(tree: ast.AST) -> set[str]:
    """Every module a tree imports: of `from a import b` it is `a.b` where that is a file of ours, else `a`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            found |= {full if (full := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func)
            if name.endswith("import_module") or name == "__import__":
                found.add(str(node.args[0].value))
    return found


def nested_imports(tree: ast.AST) -> list[int]:
    """Lines of imports inside functions."""
    return [
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def hf_paths(tree: ast.AST) -> list[str]:
    """Attribute chains and key names of Hugging Face's models; docstrings may speak of them."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and HF_ATTRIBUTES.search(ast.unparse(node)):
            found.append(ast.unparse(node))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            and HF_KEYS.search(node.value)
        ):
            found.append(node.value)
    return found


def floor_of(module: str) -> int:
    parts = module.split(".")
    names = {module, ".".join(parts[:2])}
    floors = [number for number, members in enumerate(FLOORS) if names & members]
    assert len(floors) == 1, f"{module}: give it a floor in this test"
    return floors[0]


def package_of(module: str) -> str:
    return module.split(".")[0]


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """A way from a module back to itself, empty where there is none."""
    finished: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(graph.get(module, set())):
            if found := walk(other, [*way, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


def reached(module: str) -> Iterator[tuple[str, str]]:
    """(file of ours, package it imports) for all that importing `module` loads."""
    waiting, seen = [module], {module}
    while waiting:
        current = waiting.pop()
        for other in imports(TREES[current]):
            if other not in FILES:
                yield current, package_of(other)
            elif other not in seen:
                seen.add(other)
                waiting.append(other)


def test_there_is_something_to_check() -> None:
    assert len(OURS) > 35
    assert {"mslt.train", "mslt.data.order", "mslt.cli.main", "data_prep.prepare", DEEPSPEEDS_DOOR} <= set(TREES)
    assert {f"mslt.engine.{name}" for name in (*ENGINE, "engine", "ds_config")} == {
        name for name in TREES if name.startswith("mslt.engine.")
    }


@pytest.mark.parametrize("module", OURS)
def test_imports_go_down(module: str) -> None:
    for other in imports(TREES[module]):
        if package_of(other) == "mslt":
            assert floor_of(other) <= floor_of(module), f"{module} imports {other} from a floor above"
        elif other in FILES:
            assert floor_of(module) == len(FLOORS) - 1, f"{module} imports {other}; only the command line may"


@pytest.mark.parametrize("name", ENGINE)
def test_parts_of_the_engine_know_nothing_of_the_whole(name: str) -> None:
    found = {other for other in imports(TREES[f"mslt.engine.{name}"]) if other.startswith("mslt.engine")}
    assert found <= {f"mslt.engine.{other}" for other in ENGINE[name]}


@pytest.mark.parametrize("module", [m for m in OURS if floor_of(m) == 0] + ["mslt.engine.ds_config"])
def test_plain_files_import_nothing_heavy(module: str) -> None:
    for by, package in reached(module):
        assert package not in HEAVY, f"{module} reaches {package} through {by}"


def test_the_plan_command_reaches_nothing_heavy() -> None:
    top_level = {
        name: ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for name, tree in TREES.items()
    }
    waiting, seen = ["mslt.cli.main"], {"mslt.cli.main"}
    while waiting:
        current = waiting.pop()
        for other in imports(top_level[current]):
            assert package_of(other) not in HEAVY, f"{current} imports {other}"
            if other in FILES and other not in seen:
                seen.add(other)
                waiting.append(other)
    assert "mslt.schedule" in seen


def test_no_imports_go_round() -> None:
    graph = {name: {other for other in imports(tree) if other in FILES} for name, tree in TREES.items()}
    assert cycle_in(graph) == []


@pytest.mark.parametrize("path", [*FILES.values(), *(ROOT / "launch").glob("*.py")], ids=lambda path: path.stem)
def test_deepspeed_has_one_door(path: Path) -> None:
    imported = {package_of(name) for name in imports(ast.parse(path.read_text()))}
    assert ("deepspeed" in imported) == (path == FILES[DEEPSPEEDS_DOOR])


@pytest.mark.parametrize("module", [name for name in OURS if name.startswith("mslt.evaluate.")])
def test_evaluation_knows_nothing_of_the_engine(module: str) -> None:
    assert not [name for name in imports(TREES[module]) if name.startswith("mslt.engine")]


@pytest.mark.parametrize("module", OURS)
def test_hugging_faces_attributes_have_one_home(module: str) -> None:
    found = hf_paths(TREES[module])
    assert bool(found) == (module == ATTRIBUTES_HOME), found


@pytest.mark.parametrize("module", [m for m in TREES if not m.startswith("mslt.cli")])
def test_imports_stand_at_the_top(module: str) -> None:
    assert nested_imports(TREES[module]) == []


@pytest.mark.parametrize("module", [name for name, path in FILES.items() if path.name == "__init__.py"])
def test_init_files_say_nothing_but_the_version(module: str) -> None:
    body = TREES[module].body
    if module == "mslt":
        assert [ast.unparse(node).split(" = ")[0] for node in body[1:]] == ["__version__"]
        assert ast.get_docstring(TREES[module])
    else:
        assert body == []


@pytest.mark.parametrize("module", [m for m in TREES if package_of(m) == "data_prep"])
def test_data_prep_needs_little_of_mslt(module: str) -> None:
    for other in imports(TREES[module]):
        if package_of(other) == "mslt":
            assert other == "mslt" or any(
                other == may or other.startswith(f"{may}.") for may in DATA_PREP_MAY_IMPORT
            ), other


# The checks themselves


@pytest.mark.parametrize(
    "code",
    [
        "import deepspeed",
        "import deepspeed.comm as dist",
        "from deepspeed.ops import lamb",
        "def f():\n    from deepspeed import zero",
        "import importlib\nimportlib.import_module('deepspeed.runtime')",
        "from importlib import import_module\nimport_module('deepspeed')",
        "__import__('deepspeed')",
        "try:\n    import deepspeed\nexcept ImportError:\n    pass",
    ],
)
def test_any_spelling_of_an_import_is_seen(code: str) -> None:
    assert "deepspeed" in {package_of(name) for name in imports(ast.parse(code))}


@pytest.mark.parametrize(
    "code",
    [
        "model.bert.encoder.layer[0]",
        "x = self.model.cls.predictions(h)",
        "for layer in encoder.encoder.layer: pass",
        "model.pooler",
        "m.embeddings.word_embeddings.weight",
        "state['bert.embeddings.LayerNorm.weight']",
        "name.startswith('cls.predictions.')",
        "f'bert.encoder.layer.{index}'",
    ],
)
def test_any_spelling_of_an_attribute_path_is_seen(code: str) -> None:
    assert hf_paths(ast.parse(code))


@pytest.mark.parametrize("code", ["special_ids.cls", "'pooler'", "'bert'", "'bert-base'", '"""of bert.pooler."""'])
def test_words_that_are_no_attribute_path_are_let_be(code: str) -> None:
    assert not hf_paths(ast.parse(code))


def test_a_cycle_is_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert nested_imports(ast.parse("class A:\n    def f(self):\n        import os")) == [3]
