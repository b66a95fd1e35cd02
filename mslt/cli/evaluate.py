"""`mslt evaluate`: is the model any good?"""

import typer

from mslt.cli import evaluate_glue, evaluate_mlm, evaluate_squad

app = typer.Typer(help="Score a checkpoint: held-out losses, and fine-tuned on tasks.", no_args_is_help=True)
for name, verb, short_help, example in (
    ("mlm", evaluate_mlm.mlm, "Measure held-out losses.", "--shards data/shards"),
    ("glue", evaluate_glue.glue, "Fine-tune and score on GLUE.", "--task RTE --preset quick"),
    ("squad", evaluate_squad.squad, "Fine-tune and score on SQuAD.", "--train train-v2.0.json --dev dev-v2.0.json"),
):
    app.command(name, short_help=short_help, epilog=f"Example: mslt evaluate {name} runs/bert-base {example}")(verb)
