"""Hosts of a cluster on one machine: network namespaces on a bridge of their own, which only root can make.

    with hosts(2) as made:
        process = made.start(1, [sys.executable, "-m", "mslt.cli.main", "doctor", "--node-rank", "1"])

Host k has the address 10.77.0.(k+1), in every test at once: no bridge leads out. Disks and processes are shared with
this machine; mounts made `before` a command are its own.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

_NUMBERS = count()
_BURST, _LATENCY = "256kb", "400ms"


def _lacking() -> str | None:
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"needs `{tool}`, of iproute2"
    probe = f"mslt-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"needs network namespaces ({tried.stderr.strip()})"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def netns(test: Any) -> Any:
    """Marks a test, or all of a class, that makes hosts: skipped where that cannot be done."""
    lacking = _lacking()
    return pytest.mark.netns(pytest.mark.skipif(lacking is not None, reason=lacking or "")(test))


@dataclass(frozen=True)
class Made:
    """The names of namespaces, and of the bridge's ends of the wires."""

    namespaces: tuple[str, ...]
    wires: tuple[str, ...]

    @property
    def addresses(self) -> list[str]:
        return [f"10.77.0.{host + 1}" for host in range(len(self.namespaces))]

    def hostfile(self, path: Path, slots: int = 1) -> Path:
        path.write_text("".join(f"{address} slots={slots}\n" for address in self.addresses))
        return path

    def start(self, host: int, command: Sequence[str | Path], before: str = "", **kwargs: Any) -> subprocess.Popen[str]:
        """Start a command on a host, after the shell's `before`: what that mounts is seen by the command alone.
        `kwargs` go to Popen; the process is the command's own."""
        line = list(map(str, command))
        if before:
            line = ["sh", "-ec", f'{before}\nexec "$@"', "sh", *line]
        return subprocess.Popen(["ip", "netns", "exec", self.namespaces[host], *line], text=True, **kwargs)

    def slow(self, host: int, rate: str) -> None:
        """Let so much, such as `100mbit`, through the host's wire, each way."""
        queue = ["root", "tbf", "rate", rate, "burst", _BURST, "latency", _LATENCY]
        _run("tc", "qdisc", "replace", "dev", self.wires[host], *queue)
        _run("tc", "-n", self.namespaces[host], "qdisc", "replace", "dev", "eth0", *queue)

    def cut(self, host: int) -> None:
        """Pull the host's wire out."""
        _run("ip", "link", "set", self.wires[host], "down")

    def mend(self, host: int) -> None:
        """Put it in again."""
        _run("ip", "link", "set", self.wires[host], "up")

    def end(self, host: int) -> None:
        """End all that runs on a host, as if its power went."""
        for _ in range(50):
            if not (running := self.processes(host)):
                return
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)

    def processes(self, host: int) -> list[int]:
        """What runs on a host."""
        command = ["ip", "netns", "pids", self.namespaces[host]]
        return [
            int(line) for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        ]


@contextmanager
def hosts(number: int, rate: str | None = None) -> Iterator[Made]:
    """Make so many hosts, with wires of a `rate` such as `1gbit`, or as fast as the machine; at the end nothing of them
    is left, nor of what runs on them."""
    own = f"{os.getpid():x}-{next(_NUMBERS)}"  # a device's name has at most 15 characters
    bridge = f"mb{own}"
    made = Made(
        tuple(f"mslt-{own}-{host}" for host in range(number)), tuple(f"mv{own}-{host}" for host in range(number))
    )
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for namespace, wire, address in zip(made.namespaces, made.wires, made.addresses, strict=True):
            _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _run("ip", "link", "set", wire, "master", bridge, "up")
            _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", namespace, "link", "set", "eth0", "up")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        if rate is not None:
            for host in range(number):
                made.slow(host, rate)
        yield made
    finally:
        for host, namespace in enumerate(made.namespaces):
            made.end(host)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
        for device in (*made.wires, bridge):
            subprocess.run(["ip", "link", "delete", device], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
