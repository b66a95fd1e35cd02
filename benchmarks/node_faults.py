"""A run on several hosts that fail at random moments: does it end by itself with the bits of an undisturbed one?

    python -m benchmarks.node_faults OUT [--faults 50] [--seed 0] [--hosts 2] [--record FILE]

Hosts are network namespaces on this machine (root), each with `mslt train --hostfile --node-rank --restarts`. A fault
is one of: a rank killed, DeepSpeed's launcher on one host killed, a host's wire out for longer than the timeout, a host
slowed down to a fifth for a while. They come one after the other, each at a moment drawn from the last one on, whatever
the run is at by then. Every run of some is compared with the undisturbed one: losses, summaries, tensors; nothing of it
may still run on a host. Exit status 1 where not.
"""

import argparse
import re
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired

import psutil
import yaml

from benchmarks.kill_and_resume import RECIPE, SOURCES, first_difference
from benchmarks.record import hardware, heading, table, this_command, write_record
from data_prep.prepare import prepare
from data_prep.recipe import DataRecipe
from mslt.data import keyed
from mslt.provenance import provenance
from mslt.rundir import RunDir, how_far, read_plan
from mslt.validation import validate
from tests.distributed.hosts import Made, hosts

STEPS, EVERY, A_RUN = 1500, 25, 5  # steps of a run, between checkpoints; faults a run
TIMEOUT_S, CUT_S, SLOW_S = 20.0, 30.0, 20.0
GAP_S = 30.0  # between two faults at most; a start takes some 15
RUN_S = 1800.0  # no run takes nearly as long, unless it hangs
KINDS = {
    "rank": "a rank killed",
    "launcher": "DeepSpeed's launcher on one host killed",
    "wire": f"a host cut off for {CUT_S:.0f} s, the timeout being {TIMEOUT_S:.0f} s",
    "slow": f"a host slowed to a fifth for {SLOW_S:.0f} s",
}
LOGGED = re.compile(r"stage (\d+)/\d+ .* step ([\d,]+)/[\d,]+  MLM")


@dataclass
class Tally:
    faults: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    lost_steps: list[int] = field(default_factory=list)
    struck_at: list[tuple[int, str]] = field(default_factory=list)
    runs: int = 0


@dataclass(frozen=True)
class Setup:
    folder: Path
    shards: Path
    recipe: Path
    num_hosts: int
    seed: int

    def draw(self, purpose: str, tally: Tally) -> float:
        return float(keyed.uniform(self.seed, purpose, len(tally.faults)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--record", type=Path, help="Markdown file to write, beside printing it")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True)
    prepare(validate(DataRecipe, SOURCES, "shards"), out / "shards")
    recipe = {
        **RECIPE,
        "engine": "zero0_fp32",
        "schedule": {**RECIPE["schedule"], "steps": STEPS},
        "watch": {"log_every": 1, "checkpoint_every": EVERY},
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    setup = Setup(out, out / "shards", out / "recipe.yaml", options.hosts, options.seed)
    tally = Tally()
    undisturbed, undisturbed_s = train(setup, "undisturbed", tally, 0)
    began = time.perf_counter()
    while len(tally.faults) < options.faults:
        tally.runs += 1
        so_far = len(tally.faults)
        run, _ = train(setup, f"run-{tally.runs}", tally, min(so_far + A_RUN, options.faults))
        if (difference := first_difference(undisturbed, run)) is not None:
            fail(run, f"seed {setup.seed}, {tally.faults[so_far:]}: {difference}")
        tally.lost_steps += lost_steps(run)
        print(f"{run.path.name}, {len(tally.faults) - so_far} faults: no difference", flush=True)
        shutil.rmtree(run.path)
    write_record(options.record, report(setup, tally, undisturbed_s, time.perf_counter() - began))


def fail(run: RunDir, why: str) -> None:
    sys.exit(f"{run.path}: {why}")


def train(setup: Setup, name: str, tally: Tally, until: int) -> tuple[RunDir, float]:
    """A run to its end, with faults until there are so many; and its seconds."""
    run, began = RunDir(setup.folder / name), time.perf_counter()
    with hosts(setup.num_hosts) as made:
        hostfile = made.hostfile(setup.folder / "hosts")
        logs = [open(setup.folder / f"{name}-host-{host}.log", "a") for host in range(setup.num_hosts)]  # noqa: SIM115
        parts = []
        for host in range(setup.num_hosts):
            command = [sys.executable, "-m", "mslt.cli.main", "train", setup.recipe, "--run-dir", run.path]
            command += ["--shards", setup.shards, "--hostfile", hostfile, "--node-rank", str(host)]
            command += ["--restarts", "99", "--timeout-minutes", str(TIMEOUT_S / 60)]
            parts.append(made.start(host, command, stdout=logs[host], stderr=logs[host]))
        while len(tally.faults) < until:
            with suppress(TimeoutExpired):
                parts[0].wait(setup.draw("gap", tally) * GAP_S)
            if any(part.poll() is not None for part in parts):
                break
            strike(setup, made, run, tally)
        for part in parts:
            try:
                status = part.wait(RUN_S)
            except TimeoutExpired:
                fail(run, f"hangs after {tally.faults}")
            if status != 0:
                fail(run, f"ended with status {status} after {tally.faults}")
        for host, namespace in enumerate(made.namespaces):
            if left := made.processes(host):
                fail(run, f"still runs on host {host} ({namespace}): {left}")
        for log in logs:
            log.close()
    return run, time.perf_counter() - began


def strike(setup: Setup, made: Made, run: RunDir, tally: Tally) -> None:
    """One fault, to its end; none where the run is over before."""
    if not run.plan.exists():
        return
    plan = read_plan(run)
    while tally.struck_at[-2:] == [how_far(run, plan)] * 2:  # three starts in vain are a crash loop, which it leaves
        time.sleep(0.2)
    kind = list(KINDS)[int(setup.draw("kind", tally) * len(KINDS))]
    host = int(setup.draw("host", tally) * setup.num_hosts)
    if kind in ("rank", "launcher"):
        module = {"rank": "mslt.cli.worker", "launcher": "deepspeed.launcher.launch"}[kind]
        victims = running(made, host, module)
        while not victims:  # between two starts
            time.sleep(0.2)
            victims = running(made, host, module)
            if run.first_unfinished(plan) is None:
                return
        victims[0].send_signal(signal.SIGKILL)
    elif kind == "wire":
        made.cut(host)
        time.sleep(CUT_S)
        made.mend(host)
    else:
        end = time.monotonic() + SLOW_S
        while time.monotonic() < end:
            ranks = running(made, host, "mslt.cli.worker")
            for number, seconds in ((signal.SIGSTOP, 0.4), (signal.SIGCONT, 0.1)):
                for rank in ranks:
                    with suppress(psutil.Error):
                        rank.send_signal(number)
                time.sleep(seconds)
    tally.struck_at.append(how_far(run, plan))
    tally.kinds[kind] += 1
    tally.faults.append(f"{kind} on host {host}")
    print(f"fault {len(tally.faults)}: {KINDS[kind]} (host {host}), {run.path.name}", flush=True)


def running(made: Made, host: int, module: str) -> list[psutil.Process]:
    """Processes of a host that were started with the module."""
    found = []
    for number in made.processes(host):
        with suppress(psutil.Error):
            process = psutil.Process(number)
            if module in process.cmdline()[:4]:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def lost_steps(run: RunDir) -> list[int]:
    """Steps that each start trained again, from rank 0's log."""
    lost, last = [], (0, 0)
    for line in (run.logs / "rank-00000.log").read_text().splitlines():
        if found := LOGGED.search(line):
            here = int(found[1]), int(found[2].replace(",", ""))
            if here <= last and here[0] == last[0]:
                lost.append(last[1] - here[1] + 1)
            last = here
    return lost


def report(setup: Setup, tally: Tally, undisturbed_s: float, seconds: float) -> list[str]:
    rows = [[KINDS[kind], str(tally.kinds[kind])] for kind in KINDS]
    worst = max(tally.lost_steps, default=0)
    lines = heading("Hosts that fail", this_command(), provenance(), hardware())
    lines += [
        f"{setup.num_hosts} hosts (network namespaces on one machine) with one worker each, {STEPS:,} steps a run, a "
        f"checkpoint every {EVERY}, seed {setup.seed}. {len(tally.faults)} faults in {tally.runs} runs: every run "
        "ended by itself, with the losses, summaries and tensors of the undisturbed one, bit for bit, and left no "
        "process on any host.",
        "",
        *table(["fault", "times"], rows),
        "",
        f"Trained again after a start: at most {worst} steps, median "
        f"{statistics.median(tally.lost_steps or [0]):g}, of {len(tally.lost_steps)} starts. The undisturbed run took "
        f"{undisturbed_s:.0f} s, those with faults {seconds / max(tally.runs, 1):.0f} s on average.",
    ]
    if worst > EVERY:
        lines += ["", f"MISSED: more than the {EVERY} steps between two checkpoints were trained again."]
    return lines


if __name__ == "__main__":
    main()
