"""What `--help` shows: fits 80 columns, every command with a line in its list and an example that parses."""

from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from mslt.cli.main import app
from tests.command_lines import refuse_unknown_options


def commands(command: typer.core.TyperCommand, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of the program itself, of its groups and of their verbs."""
    yield words
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*words, name))


@pytest.mark.parametrize("words", list(commands(typer.main.get_command(app))), ids=" ".join)
def test_help_fits_and_shows_an_example(words: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    if "Commands:" in lines:
        assert not [line for line in lines[lines.index("Commands:") :] if line.endswith("...")], "cut"
        return
    start = shown.index("Example: ")
    example = " ".join(shown[start:].removeprefix("Example: ").split())
    assert example.split()[: len(words) + 1] == ["mslt", *words]
    refuse_unknown_options(example)
