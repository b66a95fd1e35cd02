"""Writes api.md beside it, what a user's code may build on, from the docstrings; and in recipe.md, below its mark, the
keys of a training recipe, from mslt/config.py.

python docs/make_api.py
"""

import dataclasses
import importlib
import inspect
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mslt.config import Recipe
from mslt.engine.ds_config import AutocastSection, EngineConfig, ZeroSection
from mslt.growth import SCHEDULES, ListedStage

MODULES = (
    "mslt.growth", "mslt.config", "mslt.schedule", "mslt.plan", "mslt.cost", "mslt.rundir", "mslt.data.shards",
    "mslt.models.layer_stack", "mslt.models.surgery", "mslt.heads.off_ramp", "mslt.heads.exit_rule",
    "mslt.heads.early_exit", "mslt.heads.pooling", "mslt.heads.layer_probe", "mslt.evaluate.pool",
)  # fmt: skip
MARK = "<!-- Made by `python docs/make_api.py` from here on. -->\n"
HEADER = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]


def main() -> None:
    folder = Path(__file__).parent
    (folder / "api.md").write_text(reference())
    page = folder / "recipe.md"
    page.write_text(with_keys(page.read_text()))


# api.md


def reference() -> str:
    """The page: a section a module, an entry a public class or function, in the order of the source."""
    lines = [
        "# API",
        "",
        "From the docstrings, by `python docs/make_api.py`. Shapes stand where they matter.",
    ]
    for name in MODULES:
        module = importlib.import_module(name)
        lines += ["", f"## {name}", "", text_of(module)]
        for each_name, each in public(module):
            lines += ["", f"### `{each_name}{signature(each)}`"]
            lines += ["", text_of(each)] if text_of(each) else []
            for method_name, method in inspect.getmembers(each, inspect.isfunction) if inspect.isclass(each) else ():
                if not method_name.startswith("_") and method.__module__ == name and text_of(method):
                    lines += ["", f"- `.{method_name}{signature(method)}`: {' '.join(text_of(method).split())}"]
    return "\n".join(lines) + "\n"


def public(module: ModuleType) -> list[tuple[str, object]]:
    """What is defined in the module itself under a public name, and says what it is for."""
    found = [
        (name, each)
        for name, each in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(each) or inspect.isclass(each))
        and each.__module__ == module.__name__
        and text_of(each)
    ]
    return sorted(found, key=lambda pair: inspect.getsourcelines(pair[1])[1])


def text_of(each: object) -> str:
    own = each.__dict__.get("__doc__") if inspect.isclass(each) else each.__doc__
    text = inspect.cleandoc(own) if own else ""
    return "" if inspect.isclass(each) and text.startswith(f"{each.__name__}(") else text  # a dataclass's signature


def signature(each: object) -> str:
    try:
        plain = inspect.signature(each)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    names: list[str] = []
    for name, parameter in plain.parameters.items():
        if name == "self":
            continue
        if parameter.kind == parameter.KEYWORD_ONLY and not any(each.startswith("*") for each in names):
            names.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        names.append(f"{stars}{name}{default_of(parameter)}")
    return f"({', '.join(names)})"


def default_of(parameter: inspect.Parameter) -> str:
    """`=0.1`; of what has no short text of its own `=…`."""
    value = parameter.default
    if value is parameter.empty:
        return ""
    plain = isinstance(value, str | int | float | tuple | None)
    is_made = callable(value) or isinstance(value, BaseModel) or dataclasses.is_dataclass(value)
    return f"={value!r}" if plain and not is_made else "=…"


# recipe.md


def with_keys(page: str) -> str:
    """The page with what stands below its mark made anew."""
    above, mark, _ = page.partition(MARK)
    assert mark, f"recipe.md has no line {MARK!r}"
    return above + mark + "\n".join(keys()) + "\n"


def keys() -> Iterator[str]:
    """A table for each section, of the schedules' own options, and of an engine's file."""
    for name, section in Recipe.model_fields.items():
        kind = section.annotation
        if not (inspect.isclass(kind) and issubclass(kind, BaseModel)):
            yield from ["", f"## `{name}`", "", *table({name: section})]
            yield from ["", "A file of your own may set these, as DeepSpeed's configuration has them:", ""]
            yield from ["| key | value | default |", "| --- | --- | --- |"]
            yield from (line for line in engine_keys() if line)
            continue
        yield from ["", f"## `{name}`", "", one_line(text_of(kind)), "", *table(kind.model_fields)]
        if name == "schedule":
            yield from ["", "Options of each schedule; [schedules.md](schedules.md) says what they do:", ""]
            yield from ["| schedule | option | value | default |", "| --- | --- | --- | --- |"]
            for schedule, function in SCHEDULES.items():
                for option in list(inspect.signature(function, eval_str=True).parameters.values())[2:]:
                    default = "required" if option.default is option.empty else code(option.default)
                    yield f"| `{schedule}` | `{option.name}` | {words(option.annotation)} | {default} |"
            for option_name, field in ListedStage.model_fields.items():
                yield f"| `stages` | `stages[].{option_name}` | {of_field(field)} | {default_text(field)} |"


def engine_keys() -> Iterator[str]:
    sections = {"zero_optimization": ZeroSection, "torch_autocast": AutocastSection}
    for name, field in EngineConfig.model_fields.items():
        if name not in sections:
            yield f"| `{name}` | {of_field(field)} | {default_text(field)} |"
        for key, inner in sections[name].model_fields.items() if name in sections else ():
            yield f"| `{name}.{key}` | {of_field(inner)} | {default_text(inner)} |"


def table(fields: dict[str, FieldInfo]) -> list[str]:
    return HEADER + [
        f"| `{name}` | {of_field(field)} | {default_text(field)} | {one_line(field.description or '')} |"
        for name, field in fields.items()
    ]


def default_text(field: FieldInfo) -> str:
    return "required" if field.is_required() else code(field.default)


def code(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    if isinstance(value, float) and "e" in str(value) and "." not in str(value):
        return f"`{str(value).replace('e', '.0e')}`"  # without a point YAML reads text
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def one_line(text: str) -> str:
    return " ".join(text.split())


def of_field(field: FieldInfo) -> str:
    return words(field.annotation, field.metadata)


def words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What may be written for a value: its type and its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *own = arguments
        return words(inner, [*metadata, *(m for each in own for m in getattr(each, "metadata", [each]))])
    if origin in (Union, types.UnionType):
        return " or ".join(words(each, metadata) for each in arguments)
    if origin is Literal:
        return ", ".join(code(each) for each in arguments)
    if annotation is type(None):
        return "`null`"
    least = next((each.min_length for each in metadata if hasattr(each, "min_length")), None)
    if origin is tuple:
        each = words(arguments[0])
        if arguments[1:] == (Ellipsis,):
            return f"list of {least or 0} or more, each: {each}"
        return f"list of {len(arguments)}: {', then '.join(words(argument) for argument in arguments)};"
    named = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}.get(annotation, "section")
    return " ".join([named, ", ".join(bounds(metadata))]).strip()


def bounds(metadata: Iterable[Any]) -> list[str]:
    texts = {"gt": "over {}", "ge": "from {}", "lt": "below {}", "le": "up to {}", "multiple_of": "multiple of {}"}
    return [
        text.format("2⁶³" if getattr(each, name) == 2**63 else getattr(each, name))
        for each in metadata
        for name, text in texts.items()
        if getattr(each, name, None) is not None
    ]


if __name__ == "__main__":
    main()
