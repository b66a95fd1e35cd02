"""Command lines: as pages show them, parsed without running them; and run in this process."""

import re
import shlex
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from mslt.cli.main import app
from mslt.errors import MsltError


def fenced(page: Path, *languages: str) -> list[str]:
    """Blocks of a Markdown page in one of these languages."""
    marks = "|".join(languages)
    return re.findall(rf"^```(?:{marks})\n(.*?)^```$", page.read_text(), flags=re.S | re.M)


def lines_of_mslt(page: Path) -> list[str]:
    """What a reader may type that begins with `mslt`. On the pages of the story `bash` is what it runs."""
    lines = "\n".join(fenced(page, "bash", "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("mslt ")]


def refuse_unknown_options(line: str) -> None:
    """Parse a line down to its verb: an unknown command, option or value raises click's error."""
    program, *words = shlex.split(line.replace("…", ""), comments=True)
    assert program == "mslt"
    command, context = typer.main.get_command(app), None
    while True:
        context = command.make_context("mslt", list(words), parent=context)
        if not hasattr(command, "commands"):
            return
        words = [*context._protected_args, *context.args]
        command, words = command.commands[words[0]], words[1:]


def run(*words: object) -> Any:
    """Run `mslt` in this process: its result, or the MsltError that it would print."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, MsltError):
        raise result.exception
    assert result.exception is None, result.output
    return result
