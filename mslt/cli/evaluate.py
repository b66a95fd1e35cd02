"""`mslt evaluate`: is the model any good?"""

import typer

from mslt.cli import evaluate_glue, evaluate_mlm, evaluate_squad

app = typer.Typer(help="Score a checkpoint: held-out losses, and fine-tuned on tasks.", no_args_is_help=True)
app.command("mlm")(evaluate_mlm.mlm)
app.command("glue")(evaluate_glue.glue)
app.command("squad")(evaluate_squad.squad)
