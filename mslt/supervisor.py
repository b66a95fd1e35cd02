"""A run started again where it fails, from its last checkpoint, until it is done or it makes no sense to.

Judged by what lies in the run directory: a launcher can end with status 0 and dead ranks.
"""

import time
from collections.abc import Callable

from mslt.errors import Left, MsltError
from mslt.failures import first_failure
from mslt.launcher import ELSEWHERE, LEAVE, SAVE_AND_LEAVE
from mslt.logs import LOG
from mslt.meeting import NotMetError
from mslt.nodes import Place
from mslt.plan import Plan
from mslt.rundir import RunDir, how_far

IN_VAIN = 3  # starts that failed no farther than the one before: a crash loop
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0


def train_to_the_end(
    run: RunDir,
    plan: Plan,
    meet: Callable[[], Place | None],
    start: Callable[[Place], int],
    restarts: int,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Call `start`, which returns the launcher's status, with the place that `meet` agrees on, until every stage is
    DONE; at most `restarts` times more than that takes. Without a place the others have brought it to its end. Left
    where the run was told to leave; MsltError, with the first error of the rank that failed first, where it ends
    before."""
    in_vain = waited_in_vain = 0
    while (unfinished := run.first_unfinished(plan)) is not None:
        before, place = how_far(run, plan), None
        try:
            place = meet()
            status = 0 if place is None else start(place)
            failure = None if place is None else first_failure(run.logs, place.num_workers)
            why = f"launcher's status {status}, the reason stands above"
            if failure is not None:
                why = str(failure)
            elif status == ELSEWHERE:
                why = "workers of another host have ended, whose lines say why"
        except NotMetError as error:
            status, failure, why = 1, None, str(error)
        reached = run.first_unfinished(plan)
        if reached is None:
            continue
        where = f"stage {reached + 1} of {len(plan.stages)}"
        if -status in SAVE_AND_LEAVE or (place is not None and run.was_left(place.port)):
            raise Left(f"{run.path}: left in {where}; the same command goes on")
        if status == 0 and reached > unfinished:  # with ZeRO-3 every stage takes a start
            in_vain = waited_in_vain = 0
            continue
        stopped = f"{run.path}: stopped in {where} ({why})"
        if -status in LEAVE or restarts == 0 or (failure is not None and failure.kind == "mistake"):
            raise MsltError(f"{stopped}; the same command again goes on from the last checkpoint")
        if how_far(run, plan) > before:
            in_vain = waited_in_vain = 0
        elif place is None:  # hosts that do not come are no crash loop
            waited_in_vain += 1
        else:
            in_vain += 1
        if in_vain == IN_VAIN:
            raise MsltError(
                f"{stopped}; {IN_VAIN} starts came no farther, so it is not started again: mend that, and the same "
                "command goes on from the last checkpoint"
            )
        wait_s = min(FIRST_WAIT_S * 2 ** (in_vain + waited_in_vain), LONGEST_WAIT_S)
        restarts -= 1
        LOG.warning(f"{stopped}; starting again in {wait_s:.0f} s, {restarts} restarts are left")
        wait(wait_s)
