"""The scripts of launch/: what they say, and what they hand on; mslt, pdsh and SLURM are stood in for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mslt.nodes import read_hostfile

ROOT = Path(__file__).parents[2]
SCRIPTS = ("quickstart.sh", "multi_node.sh", "slurm.sbatch")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    files = [*ROOT.glob("launch/*.sh"), "launch/slurm.sbatch", "tests/run.sh", *ROOT.glob(".ci/*.sh")]
    found = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    path = ROOT / "launch" / script
    done = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, check=True)
    assert f"launch/{script}" in done.stdout
    lines = path.read_text().splitlines()
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in lines[1 : first(lines)]]


def first(lines: list[str]) -> int:
    """The first line after those that help shows."""
    return next(i for i, line in enumerate(lines) if i and (not line.startswith("#") or line.startswith("#SBATCH")))


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_without_a_recipe_they_say_what_they_take(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RECIPE"}
    done = subprocess.run(
        ["bash", ROOT / "launch" / script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"launch/{script}" in done.stderr


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder for PATH; each command writes its arguments, one a line, to a file beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    bodies = {
        "mslt": "",
        "pdsh": "",
        "srun": "exit $STATUS",
        "scontrol": "[ $1 != show ] || printf 'n1\\nn2\\n'",
    }
    for name, body in bodies.items():
        (folder / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >$0.said\n{body}\n')
        (folder / name).chmod(0o755)
    return folder


def test_multi_node_starts_mslt_with_what_it_was_given_where_it_was_called(stand_ins: Path) -> None:
    environment = {**os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "launch" / "multi_node.sh", "my recipe.yaml", "hosts", "--restarts", "3"]
    subprocess.run([*command], cwd=stand_ins, env=environment, check=True)
    said = (stand_ins / "mslt.said").read_text().splitlines()
    assert said == ["train", "my recipe.yaml", "--hostfile", "hosts", "--restarts", "3"]


def test_the_example_of_a_hostfile_is_one() -> None:
    hosts = read_hostfile(ROOT / "launch" / "hostfile.example")
    assert (hosts.names, hosts.slots) == (("gpu1", "gpu2"), 8)


class Job:
    """slurm.sbatch as SLURM would start it, on two nodes with 16 CPUs each, from a folder that holds launch/."""

    def __init__(self, folder: Path, stand_ins: Path) -> None:
        self.folder, self.stand_ins = folder, stand_ins
        (folder / "launch").symlink_to(ROOT / "launch")

    def run(self, status: int, *arguments: str, **variables: str) -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP"))}
        environment |= {"PATH": f"{self.stand_ins}:{os.environ['PATH']}", "STATUS": str(status)}
        environment |= {"SLURM_JOB_ID": "20007", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
        environment |= {"SLURM_CPUS_ON_NODE": "16", **variables}
        spooled = shutil.copy(ROOT / "launch" / "slurm.sbatch", self.folder / "slurm_script")
        return subprocess.run(["bash", spooled, *arguments], cwd=self.folder, env=environment, check=False).returncode

    def said(self, name: str) -> list[str]:
        return (self.stand_ins / f"{name}.said").read_text().splitlines()

    @property
    def hostfile(self) -> Path:
        return self.folder / "slurm-20007.hosts"


@pytest.fixture
def job(tmp_path: Path, stand_ins: Path) -> Job:
    return Job(tmp_path, stand_ins)


def test_a_job_takes_its_nodes_and_gpus_and_a_port_of_its_own(job: Job) -> None:
    assert job.run(0, "tiny", "--restarts", "2", SLURM_GPUS_ON_NODE="4") == 0
    hosts = read_hostfile(job.hostfile)
    assert (hosts.names, hosts.slots) == (("n1", "n2"), 4)
    said = job.said("srun")
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= set(said)
    task = ["mslt", "train", "tiny", "--hostfile", str(job.hostfile), "--master-port", "10007", "--restarts", "2"]
    assert said[said.index("task") + 1 :] == task
    assert job.said("scontrol")[0] == "show"  # not queued again


def test_a_job_can_be_told_by_variables(job: Job) -> None:
    assert job.run(0, RECIPE="tiny", SLOTS="2", SLURM_GPUS_ON_NODE="4") == 0
    assert "tiny" in job.said("srun")
    assert read_hostfile(job.hostfile).slots == 2


def test_tasks_run_in_a_container(job: Job) -> None:
    assert job.run(0, "tiny", CONTAINER="apptainer exec --nv mslt.sif") == 0
    said = job.said("srun")
    assert said[said.index("task") + 1 :][:7] == ["apptainer", "exec", "--nv", "mslt.sif", "mslt", "train", "tiny"]


def test_without_gpus_a_node_has_one_worker(job: Job) -> None:
    assert job.run(0, "tiny") == 0
    assert read_hostfile(job.hostfile).slots == 1


def test_only_what_was_told_to_leave_is_queued_again(job: Job) -> None:
    assert job.run(75, "tiny") == 75
    assert job.said("scontrol") == ["requeue", "20007"]
    assert job.run(1, "tiny") == 1
    assert job.said("scontrol")[0] == "show"


@pytest.mark.parametrize("option", [[], ["--run-dir", "my run"], ["--run-dir=my run"]])
def test_told_by_a_file_it_waits(job: Job, option: list[str]) -> None:
    run = job.folder / ("my run" if option else "runs/tiny")
    run.mkdir(parents=True)
    (run / "leave").touch()
    assert job.run(75, "recipes/tiny.yaml", *option) == 75
    assert job.said("scontrol") == ["requeuehold", "20007"]
