"""The command line: one verb per file, heavy imports inside the verb."""

import os
import sys

import typer

from mslt.cli import attention, compare, data, doctor, evaluate, exit, grow, plan, pool, probe, report, reproduce, train
from mslt.errors import MsltError

app = typer.Typer(
    help="Pretrain BERT-like encoders in stages: grow, freeze what is trained, retrain the whole at the end.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("doctor")(doctor.doctor)
app.command("grow")(grow.grow)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("attention")(attention.attention)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(exit.app, name="exit")
app.add_typer(pool.app, name="pool")
app.add_typer(probe.app, name="probe")


def main() -> None:
    """The console script. A user's mistake, or a full disk, is one message on stderr and exit status 2; of a run that
    was told to leave 75."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of connections; what counts is said here
    try:
        app()
    except (MsltError, OSError) as error:
        print(f"mslt: {error}", file=sys.stderr)
        sys.exit(error.exit_status if isinstance(error, MsltError) else MsltError.exit_status)


if __name__ == "__main__":
    main()
