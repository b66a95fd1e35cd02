"""The machines of a run, from a hostfile as DeepSpeed reads it: a line `NAME slots=NUMBER` for each, the first of which
the others find rank 0 on."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from mslt.errors import MsltError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)(\s+#.*)?")


@dataclass(frozen=True)
class Hosts:
    """`slots` is the number of workers on each."""

    file: Path
    names: tuple[str, ...]
    slots: int

    @property
    def num_workers(self) -> int:
        return len(self.names) * self.slots


def read_hostfile(path: Path) -> Hosts:
    """MsltError for a file that cannot be read, a line that is none, a host that stands there twice, and for numbers of
    slots that differ (DeepSpeed would give some workers another's GPU)."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MsltError(f"--hostfile {path}: cannot be read ({error}); give a text file with a line a host") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        said = line.strip()
        if not said or said.startswith("#"):
            continue
        found = _LINE.fullmatch(said)
        if found is None or int(found["slots"]) == 0:
            raise MsltError(
                f"{path}, line {number}: {said!r} is no host; write `NAME slots=NUMBER`, such as `gpu1 slots=8`"
            )
        if found["name"] in slots:
            raise MsltError(
                f"{path}, line {number}: {found['name']} stands there twice; give it one line with all its slots"
            )
        slots[found["name"]] = int(found["slots"])
    if not slots:
        raise MsltError(f"{path}: names no host; write a line `NAME slots=NUMBER` for each")
    if len(set(slots.values())) > 1:
        listed = ", ".join(f"{name} {number}" for name, number in slots.items())
        raise MsltError(
            f"{path}: hosts have different numbers of slots ({listed}); give all as many as the smallest has"
        )
    return Hosts(path, tuple(slots), next(iter(slots.values())))


@dataclass(frozen=True)
class Place:
    """One host among those that take part in a start, and where they meet: a port of the first."""

    names: tuple[str, ...]
    slots: int
    node_rank: int
    port: int

    @property
    def num_workers(self) -> int:
        return len(self.names) * self.slots

    @property
    def interface(self) -> str | None:
        """Of this machine, that leads to the others."""
        return None if len(self.names) == 1 else interface_towards(self.names[1 if self.node_rank == 0 else 0])

    @property
    def ranks(self) -> range:
        """Of this host's workers."""
        first = self.node_rank * self.slots
        return range(first, first + self.slots)


def alone(num_workers: int) -> Place:
    """A run on this machine only."""
    return Place(("127.0.0.1",), num_workers, 0, free_port())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def interface_towards(host: str) -> str | None:
    """The network interface of this machine that leads to another host; None where none is found. Gloo would take the
    one of this machine's own name, which on many is the loopback."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address = probe.getsockname()[0]
        for interface, addresses in psutil.net_if_addrs().items():
            if any(one.address == address for one in addresses):
                return str(interface)
    return None


# What a node is told of the shell that started the run; everybody there can read it, so no secrets.
_HANDED_ON = re.compile(
    r"PATH|LD_LIBRARY_PATH|PYTHONPATH|OMP_NUM_THREADS|(?!.*(TOKEN|KEY|SECRET))(NCCL|GLOO|MSLT|HF|DS|TORCH\w*|TRITON)_\w+"
)


def everywhere(hosts: Hosts, arguments: list[str]) -> list[str]:
    """A command that runs `mslt` with these arguments on every host, by pdsh, in this folder and with this Python, each
    with its own --node-rank."""
    variables = [
        f"{name}={shlex.quote(value)}" for name, value in sorted(os.environ.items()) if _HANDED_ON.fullmatch(name)
    ]
    command = shlex.join([sys.executable, "-m", "mslt.cli.main", *arguments])
    remote = f"cd {shlex.quote(os.getcwd())} && exec env {' '.join(variables)} {command}"
    # pdsh puts in for %n which of its hosts this is.
    escaped = remote.replace("%", "%%")
    return [
        "pdsh",
        "-S",
        "-R",
        "ssh",
        "-f",
        str(len(hosts.names)),
        "-w",
        ",".join(hosts.names),
        f"{escaped} --node-rank %n",
    ]


def on_every_host(command: list[str], leave: Path | None) -> int:
    """Run such a command and return its exit status. At the first signal to end, the file `leave` asks the run to save;
    at the second, or without such a file, the connections end; every host then leaves by itself (see mslt.orphans)."""
    received: list[int] = []

    def stop(signal_number: int, _: FrameType | None) -> None:
        received.append(signal_number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        process = subprocess.Popen(command, start_new_session=True)
    except FileNotFoundError:
        raise MsltError(
            f"{command[0]}: not found; install it here, or start the same command with --node-rank K on every host"
        ) from None
    asked = False
    while (status := _ended(process)) is None:
        if received and not asked:
            asked = True
            if leave is None or not _touched(leave):  # there is no run yet
                received.append(signal.SIGTERM)
            else:
                with suppress(OSError):  # the terminal may be what has gone
                    said = "asked the run to save and leave; once more ends the connections"
                    print(said, file=sys.stderr, flush=True)
        if len(received) > 1:
            os.killpg(process.pid, signal.SIGKILL)
    return status


def _touched(path: Path) -> bool:
    with suppress(OSError):
        path.touch()
        return True
    return False


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=0.5)
    return None
