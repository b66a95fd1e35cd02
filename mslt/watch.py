"""What a person sees of a run: a progress bar (or a line at each log point) and TensorBoard. Rank 0 only."""

import logging
import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from mslt import metrics
from mslt.cost import operations, step_total
from mslt.logs import LOG
from mslt.plan import Plan
from mslt.rundir import RunDir

_NO_SCALARS = ("kind", "stage", "step")


class Watch:
    """One stage's eyes. TensorBoard holds each stage as a run of its own, over the steps of the whole run."""

    def __init__(self, plan: Plan, run: RunDir, stage_index: int, first_step: int) -> None:
        """`first_step` is the step inside the stage from which it is trained now; what stood behind it is dropped."""
        self.plan = plan
        self.run = run
        self.stage_index = stage_index
        self.stage = plan.stages[stage_index]
        self._first_step, self._started = first_step, time.perf_counter()
        metrics.rewind(run.metrics, stage_index + 1, plan.first_step(stage_index) + first_step if first_step else -1)
        self._board = SummaryWriter(
            str(run.tensorboard / f"stage-{stage_index + 1}"),
            purge_step=plan.first_step(stage_index) + first_step + (first_step > 0),
        )
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            texts = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
            columns = texts[0], BarColumn(), MofNCompleteColumn(), texts[1]
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self._title(), total=self.stage.steps, completed=first_step, note="")
            self._bar.start()

    def advance(self, done_steps: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done_steps)

    def log(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl and TensorBoard, and tell the reader."""
        metrics.append(self.run.metrics, record)
        for name, value in record.items():
            if name not in _NO_SCALARS:
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        self._board.flush()
        done_steps = record["step"] - self.plan.first_step(self.stage_index)
        note = "  ".join(
            f"{head.upper()} {record[f'{head}_loss']:.4f}" for head in ("mlm", "nsp") if f"{head}_loss" in record
        )
        if record["kind"] == "train":
            note += f"  {record['samples_per_s']:,.0f} samples/s  left: {self._left(done_steps)}"
        else:
            note = f"held-out {note}"
        LOG.log(
            logging.INFO if self._bar is None else logging.DEBUG,
            f"{self._title()}  step {done_steps:,}/{self.stage.steps:,}  {note}",
        )
        if self._bar is not None:
            self._bar.update(self._task, note=note)
            if record["kind"] == "evaluation":
                self._bar.console.print(f"{self._title()}, step {done_steps:,}: {note}")

    def close(self) -> None:
        self._board.close()
        if self._bar is not None:
            self._bar.stop()

    def _title(self) -> str:
        return f"stage {self.stage_index + 1}/{len(self.plan.stages)} ({self.stage.depth} layers)"

    def _left(self, done_steps: int) -> str:
        """Time left for the stage, and for the run by the operations that its later stages take."""
        step_s = (time.perf_counter() - self._started) / max(done_steps - self._first_step, 1)
        stage_s = step_s * (self.stage.steps - done_steps)
        model = self.plan.model
        costs = operations(model, self.stage.sequence_length, self.plan.data.max_predictions)
        later = sum(stage.steps * step_total(costs, model, stage) for stage in self.plan.stages[self.stage_index + 1 :])
        run_s = stage_s + step_s * later / step_total(costs, model, self.stage)
        return f"{timedelta(seconds=round(stage_s))}, run {timedelta(seconds=round(run_s))}"
