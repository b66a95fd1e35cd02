"""`mslt evaluate`: is the model any good?"""

import typer

from mslt.cli import evaluate_glue, evaluate_mlm, evaluate_squad

app = typer.Typer(help="Score a checkpoint: held-out losses, and fine-tuned on tasks.", no_args_is_help=True)
app.command(
    "mlm",
    short_help="Measure held-out losses.",
    epilog="Example: mslt evaluate mlm runs/bert-base --shards data/shards",
)(evaluate_mlm.mlm)
app.command(
    "glue",
    short_help="Fine-tune and score on GLUE.",
    epilog="Example: mslt evaluate glue runs/bert-base --task RTE --preset quick",
)(evaluate_glue.glue)
app.command(
    "squad",
    short_help="Fine-tune and score on SQuAD.",
    epilog="Example: mslt evaluate squad runs/bert-base --train train-v2.0.json --dev dev-v2.0.json",
)(evaluate_squad.squad)
