"""Writes api.md beside it: what a user's code may build on, from the docstrings.

python docs/make_api.py
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

MODULES = (
    "mslt.growth", "mslt.config", "mslt.schedule", "mslt.plan", "mslt.cost", "mslt.rundir", "mslt.data.shards",
    "mslt.models.layer_stack", "mslt.models.surgery", "mslt.heads.off_ramp", "mslt.heads.exit_rule",
    "mslt.heads.early_exit", "mslt.heads.pooling", "mslt.heads.layer_probe", "mslt.evaluate.pool",
)  # fmt: skip


def main() -> None:
    Path(__file__).with_name("api.md").write_text(reference())


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
    names = [
        f"{'*' * (p.kind == p.VAR_POSITIONAL) + '**' * (p.kind == p.VAR_KEYWORD)}{name}" for name, p in
        plain.parameters.items() if name != "self"
    ]  # fmt: skip
    return f"({', '.join(names)})"


if __name__ == "__main__":
    main()
