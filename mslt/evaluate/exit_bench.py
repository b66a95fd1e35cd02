"""What early exit saves by the clock, beside what the layers it skips should save."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from mslt.evaluate.exit_sweep import as_plain
from mslt.evaluate.exits import Opened
from mslt.evaluate.glue_data import Row
from mslt.heads.exit_rule import ExitRule, counts, expected_saving

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Timed:
    """Over the same batches in the same turns: seconds of the plain model and of early exit, a turn each. Medians
    make the saving."""

    rule: ExitRule
    batch_size: int
    num_rows: int
    expected_saving: float
    num_leaving: list[int]
    plain_s: list[float]
    early_s: list[float]

    @property
    def measured_saving(self) -> float:
        return 1 - median(self.early_s) / median(self.plain_s)

    @property
    def speedup(self) -> float:
        return median(self.plain_s) / median(self.early_s)

    @property
    def speedups(self) -> list[float]:
        """Turn by turn."""
        return [plain / early for plain, early in zip(self.plain_s, self.early_s, strict=True)]


def batches_of(opened: Opened, rows: Sequence[Row], batch_size: int) -> list[Batch]:
    """Rows of like length together, padded to the longest of the batch: what both sides are given."""
    single = [opened.batch_of([row]) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: single[index]["input_ids"].shape[1])
    found = []
    for first in range(0, len(rows), batch_size):
        batch = opened.batch_of([rows[index] for index in order[first : first + batch_size]])
        batch.pop("labels", None)
        found.append({name: tensor.to(opened.exits.device) for name, tensor in batch.items()})
    return found


@torch.inference_mode()
def bench(
    opened: Opened,
    rows: Sequence[Row],
    rules: Sequence[ExitRule],
    batch_size: int,
    num_turns: int,
    progress: Callable[[int, int], None],
    check_every: int = 1,
) -> list[Timed]:
    """One entry for each rule, the device asked who is done after every `check_every` layers. In a turn every batch
    goes through the plain model, then through every rule, so that what else the machine does meets all alike; one more
    turn at the start is not counted."""
    exits = opened.exits.eval()
    batches = batches_of(opened, rows, batch_size)
    calls: list[Callable[[Batch], Any]] = [lambda batch: exits.model(**batch).logits]
    calls += [lambda batch, rule=rule: exits(**batch, rule=rule, check_every=check_every) for rule in rules]  # type: ignore[misc]
    turns: list[list[float]] = []
    leaving = torch.zeros(len(rules), exits.num_exits, dtype=torch.int64)
    for turn in range(num_turns + 1):
        seconds = [0.0] * len(calls)
        for batch in batches:
            for index, call in enumerate(calls):
                taken, said = _timed(call, batch, exits.device)
                seconds[index] += taken
                if turn == 0 and index:
                    leaving[index - 1] += torch.tensor(counts(said.exit_layer.cpu(), exits.num_exits))
        turns.append(seconds)
        progress(turn + 1, num_turns + 1)
    plain_s, *early_s = ([turn[index] for turn in turns[1:]] for index in range(len(calls)))
    return [
        Timed(rule, batch_size, len(rows), expected_saving(num.tolist()), num.tolist(), plain_s, seconds)
        for rule, num, seconds in zip(rules, leaving, early_s, strict=True)
    ]


def _timed(call: Callable[[Batch], Any], batch: Batch, device: torch.device) -> tuple[float, Any]:
    _wait(device)
    began = time.perf_counter()
    said = call(batch)
    _wait(device)
    return time.perf_counter() - began, said


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def seconds_to_exits(opened: Opened, rows: Sequence[Row], num_turns: int = 3) -> list[float]:
    """[E]: mean seconds of a row on its own from ids to the logits of each exit, ramps on the way included; the median
    of the turns."""
    exits = opened.exits.eval()
    heads = exits.exit_heads
    turns = []
    batches = batches_of(opened, rows, 1)
    for _ in range(num_turns + 1):
        sums = [0.0] * exits.num_exits
        for batch in batches:
            _wait(exits.device)
            began = time.perf_counter()
            for k, read in exits.walk(batch["input_ids"], None, batch.get("token_type_ids")):  # one row: no padding
                bool(heads[k](read).isfinite().all())  # asked, as the loop that leaves asks
                sums[k] += time.perf_counter() - began
        turns.append([each / len(batches) for each in sums])
    return [median(turn[k] for turn in turns[1:]) for k in range(exits.num_exits)]


def seconds_a_row(
    opened: Opened, rows: Sequence[Row], rule: ExitRule, progress: Callable[[int, int], None], num_turns: int = 3
) -> float:
    """Of rows on their own that leave by the rule, the median of the turns."""
    (timed,) = bench(opened, rows, [rule], 1, num_turns, progress)
    return median(timed.early_s) / timed.num_rows


def plain(name: str, opened: Opened, timed: Sequence[Timed]) -> dict[str, Any]:
    """For JSON."""
    return {
        "exits": name,
        "task": opened.task.name,
        "rows": timed[0].num_rows,
        "batch_size": timed[0].batch_size,
        "plain_row_s": median(timed[0].plain_s) / timed[0].num_rows,
        "rules": [
            {
                **as_plain(each.rule), "expected_saving": each.expected_saving,
                "measured_saving": each.measured_saving, "speedup": each.speedup, "speedups": each.speedups,
                "num_leaving": each.num_leaving, "plain_s": each.plain_s, "early_s": each.early_s,
            }
            for each in timed
        ],
    }  # fmt: skip
