"""The command line: one verb per file, heavy imports inside the verb."""

import sys

import typer

from mslt.cli import compare, data, grow, plan, train
from mslt.errors import MsltError

app = typer.Typer(
    help="Pretrain BERT-like encoders in stages: grow, freeze what is trained, retrain the whole at the end.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("grow")(grow.grow)
app.command("compare")(compare.compare)
app.add_typer(data.app, name="data")


def main() -> None:
    """The console script. A user's mistake, or a full disk, is one message on stderr and exit status 2."""
    try:
        app()
    except (MsltError, OSError) as error:
        print(f"mslt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
