"""The command line: one verb per file, heavy imports inside the verb."""

import os
import sys

import typer

from mslt.cli import attention, compare, data, doctor, evaluate, exit, grow, plan, pool, probe, report, reproduce, train
from mslt.errors import MsltError

app = typer.Typer(
    help="Pretrain BERT-like encoders in stages: grow, freeze what is trained, retrain the whole at the end.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, verb, short_help, example in (
    ("plan", plan.plan, "Show a recipe's stages; with --measure, hours.", "bert-base --measure --shards data/shards"),
    ("train", train.train, "Train a recipe, or go on where it stopped.", "bert-base --shards data/shards"),
    ("doctor", doctor.doctor, "Check every machine before a run.", "bert-base --shards data/shards --hostfile hosts"),
    ("grow", grow.grow, "Copy, stack, drop or add layers of a checkpoint.", "runs/bert-base short --drop-top 2"),
    ("compare", compare.compare, "Show runs side by side, or run a study.",
     "runs/bert-base-full runs/bert-base --picture curves.png"),
    ("report", report.report, "Write one page about runs.", "runs/bert-base-full runs/bert-base --out report.html"),
    ("reproduce", reproduce.reproduce, "List the papers' tables and figures.", "mslt-t2"),
    ("attention", attention.attention, "Show where heads look, or how alike layers are.",
     'runs/bert-base --text "The cat sat." --picture maps.png'),
):  # fmt: skip
    app.command(name, short_help=short_help, epilog=f"Example: mslt {name} {example}")(verb)
app.add_typer(data.app, name="data", short_help="Text to token shards, and a look inside.")
app.add_typer(evaluate.app, name="evaluate", short_help="Score a checkpoint on held-out text, GLUE and SQuAD.")
app.add_typer(exit.app, name="exit", short_help="Early exit: leave at the first layer that is sure.")
app.add_typer(pool.app, name="pool", short_help="One small head on all hidden states.")
app.add_typer(probe.app, name="probe", short_help="What each layer knows.")


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
