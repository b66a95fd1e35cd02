"""launch/slurm.sbatch under a real SLURM: two nodes, both of them this machine, with daemons of their own."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from mslt import metrics
from mslt.nodes import free_port
from mslt.orphans import end_with
from tests.distributed.runs import write_recipe

ROOT = Path(__file__).parents[2]
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
TIMEOUT_S = 300
NODES = ("127.0.0.1", "127.0.0.2")  # names that need no file of hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, COMMANDS)), reason="needs slurmctld, slurmd, munged and root"
    ),
]

# cred_expire: how long a job that is queued again has to wait, too.
CONFIG = """
ClusterName=tests
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=5,sched_interval=5
NodeName={nodes[0]} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster, and a folder that its nodes share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.config),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        (folder / "launch").symlink_to(ROOT / "launch")

    def start(self) -> list[subprocess.Popen[bytes]]:
        hostname = socket.gethostname().partition(".")[0]
        ports = [free_port() for _ in range(3)]
        self.config.write_text(CONFIG.format(folder=self.folder, hostname=hostname, ports=ports, nodes=NODES))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        files = {"key-file": key, **{f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}}
        munge = ["munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}"]
        commands = [
            [*munge, *(f"--{name}={path}" for name, path in files.items())],
            ["slurmctld", "-D", "-c"],
            *(["slurmd", "-D", "-N", node] for node in NODES),
        ]
        return [
            subprocess.Popen(
                command,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=partial(end_with, os.getpid()),
            )
            for command in commands
        ]

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def submit(self, recipe: Path, run: Path, *options: str | Path) -> str:
        script = ("launch/slurm.sbatch", recipe, "--run-dir", run)
        return self.run("sbatch", "--parsable", "--time=60", "--signal=USR1@120", *script, *options)

    def job(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, job: str) -> str:
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, what: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not until():
            state = self.job(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED"), f"{what}: {state}\n{self.output(job)}"
            assert time.monotonic() < deadline, f"{what}: not within {TIMEOUT_S} s\n{self.output(job)}"
            time.sleep(0.5)

    def processes(self) -> list[psutil.Process]:
        """All that was started in it, daemons and jobs."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.config):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    folder.chmod(0o755)
    cluster = Slurm(folder)
    daemons = cluster.start()
    try:
        deadline = time.monotonic() + 60
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        while subprocess.run(idle, env=cluster.environment, capture_output=True, text=True).stdout.strip() != "2":
            assert all(daemon.poll() is None for daemon in daemons), "a daemon ended"
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield cluster
    finally:
        for process in cluster.processes():
            with suppress(psutil.Error):
                process.kill()
        for daemon in daemons:
            daemon.wait()
        left = psutil.wait_procs(cluster.processes(), timeout=10)[1]
        shutil.rmtree(folder)
        assert not left


@pytest.fixture
def long_recipe(tiny_recipe: dict[str, Any], shards: Path, slurm: Slurm) -> Path:
    """Only being told to leave makes a checkpoint within it."""
    tiny_recipe["data"]["shards"] = str(shards)
    tiny_recipe["schedule"]["steps"] = 4000
    tiny_recipe["watch"] = {"log_every": 50, "checkpoint_every": 100_000}
    return write_recipe(slurm.folder / "long.yaml", tiny_recipe)


def last_step(run: Path) -> int:
    return max((record["step"] for record in metrics.read(run / "metrics.jsonl")), default=0)


def test_a_job_at_its_time_limit_saves_and_queues_itself_until_the_run_is_done(slurm: Slurm, long_recipe: Path) -> None:
    run = slurm.folder / "limit"
    job = slurm.submit(long_recipe, run)
    slurm.wait(job, "first steps", lambda: last_step(run) >= 100)
    hours, minutes, _ = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    slurm.wait(job, "queued again", lambda: slurm.job(job)["Restarts"] == "1")
    saved = last_step(run)
    assert 100 <= saved < 4000
    output = slurm.output(job)
    assert f"{run}: saved and left, as it was told" in output
    assert "DUE TO TIME LIMIT" not in output
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    slurm.wait(job, "done", lambda: slurm.job(job)["JobState"] == "COMPLETED")
    assert slurm.output(job).count("resuming stage") == 1
    assert f"{run}: all 3 stages done" in slurm.output(job)
    steps = [record["step"] for record in metrics.read(run / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == sorted({*steps, saved})  # none was done twice
    assert steps[-1] == 4000
    assert (slurm.folder / f"slurm-{job}.hosts").read_text() == "".join(f"{node} slots=1\n" for node in NODES)
    assert (run / "logs" / "rank-00001.log").exists()


def test_a_job_that_is_preempted_goes_on_and_one_that_is_told_by_file_is_held(slurm: Slurm, long_recipe: Path) -> None:
    run = slurm.folder / "told"
    job = slurm.submit(long_recipe, run)
    slurm.wait(job, "first steps", lambda: last_step(run) >= 100)
    slurm.run("scancel", "--signal=TERM", job)  # every process of the tasks is given it, as with a time of grace
    slurm.wait(job, "queued again", lambda: slurm.job(job)["Restarts"] == "1")
    saved = last_step(run)
    slurm.wait(job, "going on", lambda: last_step(run) > saved)
    assert "resuming stage" in slurm.output(job)
    (run / "leave").touch()
    slurm.wait(job, "held", lambda: slurm.job(job)["Priority"] == "0")
    assert slurm.job(job)["JobState"] == "PENDING"
    assert slurm.output(job).count("saved and left") == 2
    slurm.run("scancel", job)


def test_a_mistake_ends_the_job_at_once_and_for_good(slurm: Slurm, tiny_recipe: dict[str, Any], shards: Path) -> None:
    tiny_recipe["data"]["shards"] = str(shards)
    tiny_recipe["model"]["vocab_size"] = 100
    job = slurm.submit(write_recipe(slurm.folder / "wrong.yaml", tiny_recipe), slurm.folder / "wrong")
    deadline = time.monotonic() + 90
    while (found := slurm.job(job))["JobState"] != "FAILED":
        assert time.monotonic() < deadline, slurm.output(job)
        time.sleep(0.5)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    assert "set model.vocab_size to at least" in slurm.output(job)
