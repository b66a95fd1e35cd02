"""What does a run spend beside computing? Shares of its finished stages, from what they wrote down themselves.

    python -m benchmarks.step_loop RUN [--record FILE]

Data and logging are to take under 1 % of the step loop, saving under 2 %, and the change from one stage to the next
(its last checkpoint and model written, the next one's base made, read and handed to the engine) under 5 s. Exit status
1 where they take more. What is compiled is compiled in a stage's first step, which belongs to the loop. The run has to
be of this machine, and not resumed: a stage adds up its starts.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.record import hardware, heading, shape, table, this_command, write_record
from mslt.rundir import RunDir, read_plan, read_summaries

MOST_OF_LOOP = {"data": 0.01, "log": 0.01, "checkpoint": 0.02}
MOST_CHANGE_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    run = RunDir(options.run)
    plan, summaries = read_plan(run), read_summaries(run)
    rows, holds = [], True
    before_s = None
    for summary in summaries:
        spent = summary["spent_s"]
        shares = {kind: spent[kind] / spent["train"] for kind in MOST_OF_LOOP}
        change_s = None if before_s is None else before_s + spent["start"]
        before_s = spent["finish"]
        holds &= all(share < MOST_OF_LOOP[kind] for kind, share in shares.items())
        holds &= change_s is None or change_s < MOST_CHANGE_S
        rows.append([
            f"{summary['stage']}", f"{summary['depth']}", f"{summary['steps']:,}",
            f"{1000 * spent['train'] / summary['steps']:.1f}", *(f"{share:.2%}" for share in shares.values()),
            f"{spent['evaluation'] / spent['train']:.1%}", "" if change_s is None else f"{change_s:.2f}",
        ])  # fmt: skip
    columns = [
        "stage",
        "layers",
        "steps",
        "a step, ms",
        "data",
        "writing the log",
        "saving",
        "evaluation",
        "change to it, s",
    ]
    note = "Shares of the time of the step loop; evaluation and saving come on top of it."
    asked = "data and logging under 1 %, saving under 2 %, a change of stage under 5 s"
    verdict = f"- {'held' if holds else 'MISSED'}: {asked}"
    of_run = json.loads((run.path / "provenance.json").read_text())
    head = heading("What a run spends beside computing", this_command(), of_run, hardware())
    lines = [shape(plan, summaries[0]["world_size"]), note, "", *table(columns, rows), "", verdict]
    write_record(options.record, [*head, *lines])
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
