"""The doctor's rounds: the first host asks the others, one after another or all at once, through a store that it
serves; a host that is silent is named.

Each host shows in the store that it lives. The first says what is to be done, the others do it and answer.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, Store, TCPStore  # type: ignore[attr-defined]

from mslt.doctor import (
    Asked,
    Facts,
    Finding,
    Token,
    check_clock,
    check_folder,
    check_gradients,
    check_links,
    compare,
    examine,
    fails,
    largest_payload,
    lay_token,
    read_plan_of,
    settled,
)
from mslt.errors import MsltError
from mslt.links import Timed, time_all_reduces
from mslt.nodes import Hosts, everywhere, interface_towards
from mslt.plan import Plan

PULSE_S, LATE_S, LOOK_S = 1.0, 5.0, 2.0
ALL_LINKS_S = 10.0  # of measuring each host's link to the first, and again of all together
LARGEST_BYTES = 2**26  # without a recipe
LEAST_BYTES, MOST_BYTES = 2**24, 2**30  # of the largest all-reduce; a small one shows latency alone

Tell = Callable[[str], None]


class Silent(Exception):
    """The other end has not shown a sign of life for as long as it is waited for, or the store is gone."""


class Line:
    """Between the first host and another: JSON there and back, in turns."""

    def __init__(self, store: Store, node_rank: int, is_first: bool, wait_s: float) -> None:
        self._store, self._node_rank, self._wait_s = store, node_rank, wait_s
        self._own, self._other = ("first", "other") if is_first else ("other", "first")
        self._pulse = f"pulse/{node_rank if is_first else 0}"
        self._said = self._heard = 0

    def say(self, **message: Any) -> None:
        with _silent_without_the_store():
            self._store.set(f"{self._node_rank}/{self._own}/{self._said}", json.dumps(message))
        self._said += 1

    def hear(self) -> dict[str, Any]:
        """Wait for the next message."""
        key = f"{self._node_rank}/{self._other}/{self._heard}"
        pulse, since = None, time.monotonic()
        with _silent_without_the_store():
            while (found := _found(self._store, key)) is None:
                seen = _found(self._store, self._pulse)
                if seen is not None and seen != pulse:
                    pulse, since = seen, time.monotonic()
                elif time.monotonic() - since > self._wait_s:
                    raise Silent
        self._heard += 1
        return dict(json.loads(found))


@contextmanager
def _silent_without_the_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the store has no finer ones
        raise Silent from error


def _found(store: Store, key: str) -> bytes | None:
    """What stands under the key, waited for a moment."""
    try:
        store.wait([key], timedelta(seconds=LOOK_S))
        return bytes(store.get(key))
    except DistStoreError:
        return None


@contextmanager
def _pulsing(store: TCPStore, node_rank: int, wait_s: float) -> Iterator[None]:
    """Show that this host lives, over a connection of its own: it may be busy for long. On another than the first, end
    the process where the store takes no pulse for so long: where the wire was cut, torch would wait for ever."""
    ended, own = threading.Event(), store.clone()  # type: ignore[attr-defined]
    own.add(f"pulse/{node_rank}", 1)
    last_s = time.monotonic()

    def pulse() -> None:
        nonlocal last_s
        with suppress(RuntimeError):  # the store is gone: whoever waits for it says so
            while not ended.wait(PULSE_S):
                own.add(f"pulse/{node_rank}", 1)
                last_s = time.monotonic()
        ended.set()

    def watch() -> None:
        while not ended.wait(PULSE_S):
            if time.monotonic() - last_s > wait_s + LATE_S:
                print(f"mslt: the first host is not reached any more, for {wait_s:g} s", file=sys.stderr, flush=True)
                os._exit(2)

    threads = [threading.Thread(target=each, daemon=True) for each in ((pulse, watch) if node_rank else (pulse,))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def as_first(asked: Asked, hosts: Hosts, port: int, wait_s: float, tell: Tell) -> list[Finding]:
    """The first host's part: ask the others, compare, measure, and let them go with what was found.

    MsltError where the port is not free."""
    first = hosts.names[0]
    try:
        store = TCPStore(first, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=wait_s))
    except RuntimeError as error:
        raise MsltError(
            f"--master-port {port}: cannot be served on {first} ({_line(error)}); end what listens there, or give "
            "another port to all hosts"
        ) from None
    with _pulsing(store, 0, wait_s):
        tell(f"waiting for {len(hosts.names) - 1} more")
        here, found = _who_comes(store, hosts, port, wait_s)
        lines = {rank: Line(store, rank, True, wait_s) for rank in here}
        tell("looking at clocks, versions, GPUs, shards and folders")
        found += _ask_clocks(lines, hosts)
        facts: dict[str, Facts] = {}
        with lay_token(first, asked.run) as (token, of_folder):
            for line in lines.values():
                line.say(do="examine", token=None if token is None else asdict(token))
            facts[first], own = examine(first, asked, is_first=True)
            found += [*own, *of_folder]
            for rank in list(lines):
                answer = _answer(lines, rank, hosts, found)
                if answer is not None:
                    found += take_in(answer, hosts.names[rank], facts)
        found += compare(facts)
        if lines:
            tell("measuring the links")
            plan, _ = read_plan_of(first, asked, 0)
            found += _measure(store, lines, hosts, asked, plan, facts)
        found = settled(found)
        for line in lines.values():
            line.say(do="leave", fails=fails(found))
        for line in lines.values():  # the store ends with this process
            with suppress(Silent):
                line.hear()
        return found


def as_other(asked: Asked, hosts: Hosts, node_rank: int, port: int, wait_s: float) -> bool:
    """Another host's part; whether a run would fail. MsltError where the first host does not listen, or falls
    silent."""
    first, name = hosts.names[0], hosts.names[node_rank]
    try:
        _wait_for_port(first, port, wait_s)
        store = TCPStore(first, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=wait_s))
    except (OSError, RuntimeError) as error:
        raise MsltError(
            f"{first}: the first host does not listen at port {port} ({_line(error)}); see whether it is on, `mslt "
            f"doctor` runs there, and no firewall closes the port"
        ) from None
    line = Line(store, node_rank, False, wait_s)
    try:
        with _pulsing(store, node_rank, wait_s):
            with _silent_without_the_store():
                store.set(f"here/{node_rank}", "")
            while (asks := line.hear())["do"] != "leave":
                line.say(**_answer_to(asks, asked, first, name, store))
            line.say()
    except Silent:
        raise MsltError(f"{first}: the first host fell silent; its last lines say why") from None
    return bool(asks["fails"])


def _wait_for_port(host: str, port: int, wait_s: float) -> None:
    """OSError where nobody listens in time."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((host, port), timeout=LOOK_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _answer_to(asks: dict[str, Any], asked: Asked, first: str, name: str, store: Store) -> dict[str, Any]:
    if asks["do"] == "clock":
        return {"now": time.time()}
    if asks["do"] == "all-reduce":
        return {"error": _all_reduce(store, first, **asks["group"])[1]}
    token = None if asks["token"] is None else Token(**asks["token"])
    facts, found = examine(name, asked, is_first=False)
    found += check_folder(name, asked.run, token)
    return {"facts": asdict(facts), "findings": [asdict(each) for each in found]}


def _who_comes(store: TCPStore, hosts: Hosts, port: int, wait_s: float) -> tuple[list[int], list[Finding]]:
    """The ranks of the hosts that came, the first apart, and a finding for each that did not."""
    waiting, deadline = list(range(1, len(hosts.names))), time.monotonic() + wait_s
    while waiting and time.monotonic() < deadline:
        waiting = [rank for rank in waiting if not store.check([f"here/{rank}"])]
        time.sleep(0.1)
    remedy = (
        f"see whether it is on, `ssh {{}} true` works, and it reaches port {port} of {hosts.names[0]}; or leave it out "
        f"of {hosts.file}"
    )
    found = [
        Finding(
            hosts.names[rank], "host", "fail", f"did not come within {wait_s:g} s", remedy.format(hosts.names[rank])
        )
        for rank in waiting
    ]
    return [rank for rank in range(1, len(hosts.names)) if rank not in waiting], found


def _answer(lines: dict[int, Line], rank: int, hosts: Hosts, found: list[Finding]) -> dict[str, Any] | None:
    """What the host answers; one that is silent is put into `found` and asked no more."""
    try:
        return lines[rank].hear()
    except Silent:
        del lines[rank]
        remedy = "see what `mslt doctor` said there, and whether the host is on and on the network"
        found.append(Finding(hosts.names[rank], "host", "fail", "came, and fell silent", remedy))
        return None


def _ask_clocks(lines: dict[int, Line], hosts: Hosts) -> list[Finding]:
    found: list[Finding] = []
    for rank in list(lines):
        asked = time.time()
        lines[rank].say(do="clock")
        answer = _answer(lines, rank, hosts, found)
        if answer is not None:
            found.append(check_clock(hosts.names[rank], answer["now"] - (asked + time.time()) / 2))
    return found


def take_in(answer: dict[str, Any], host: str, facts: dict[str, Facts]) -> list[Finding]:
    """Put a host's facts with the others', and return its findings."""
    try:
        found = [Finding(**each) for each in answer["findings"]]
        facts[host] = Facts(**{**answer["facts"], "gpus": tuple(answer["facts"]["gpus"])})
    except (KeyError, TypeError):
        remedy = "install the same mslt as on the first host"
        return [Finding(host, "versions", "fail", "answers as another version of mslt does", remedy)]
    return found


def _measure(
    store: TCPStore,
    lines: dict[int, Line],
    hosts: Hosts,
    asked: Asked,
    plan: Plan | None,
    facts: Mapping[str, Facts],
) -> list[Finding]:
    """Each host with the first alone, so that the host of a bad link can be named, then all of them."""
    found: list[Finding] = []
    group: dict[str, Any] = {
        "backend": "nccl" if all(each.gpus and each.operations_per_s for each in facts.values()) else "gloo",
        "largest_bytes": LARGEST_BYTES if plan is None else min(max(largest_payload(plan), LEAST_BYTES), MOST_BYTES),
    }
    timed: dict[int, Timed] = {}
    for rank in list(lines):
        alone = {**group, "name": f"pair-{rank}", "size": 2, "budget_s": ALL_LINKS_S / len(lines)}
        lines[rank].say(do="all-reduce", group={**alone, "rank": 1})
        measured, error = _all_reduce(store, hosts.names[0], **alone, rank=0)
        answer = _answer(lines, rank, hosts, found)
        if answer is None:
            continue
        if measured is None or answer["error"] is not None:
            found.append(broken(hosts.names[rank], error or answer["error"], group["backend"]))
        else:
            timed[rank] = measured
    found += check_links({hosts.names[rank]: each.gbps for rank, each in timed.items()}, asked.min_gbps)
    together = next(iter(timed.values()), None)
    if len(timed) > 1:
        ranks = list(timed)
        everyone = {**group, "name": "all", "size": len(ranks) + 1, "budget_s": ALL_LINKS_S}
        for index, rank in enumerate(ranks, 1):
            lines[rank].say(do="all-reduce", group={**everyone, "rank": index})
        together, error = _all_reduce(store, hosts.names[0], **everyone, rank=0)
        errors = {"all": error}
        for rank in ranks:
            answer = _answer(lines, rank, hosts, found)
            if answer is not None and answer["error"] is not None:
                errors[hosts.names[rank]] = answer["error"]
        found += [broken(host, said, group["backend"]) for host, said in errors.items() if said is not None]
    if plan is not None and together is not None:
        computing = len(facts) * (asked.workers or 1) if group["backend"] == "nccl" else len(facts)
        slowest = min(each.operations_per_s or 0.0 for each in facts.values())
        found.append(check_gradients(plan, together.seconds / together.num_bytes, slowest, computing))
    return found


def _all_reduce(store: Store, first: str, **group: Any) -> tuple[Timed | None, str | None]:
    """What was measured, or what was wrong."""
    if (interface := interface_towards(first)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        return time_all_reduces(store, **group), None
    except RuntimeError as error:
        return None, _line(error)


def broken(host: str, error: str, backend: str) -> Finding:
    remedy = (
        f"let hosts reach each other at every port, not only at the first host's; {backend.upper()}_SOCKET_IFNAME "
        "names the interface"
    )
    return Finding(host, "link", "fail", f"no all-reduce by {backend} ({error})", remedy)


def _line(error: Exception) -> str:
    """The first line of what torch says, without where in its source."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0])[:200]


# On every host from one shell

_SSH_FAILED = re.compile(r"pdsh@[^:]+: (?P<host>\S+): ssh exited with exit code 255")
_SSH_SAID = re.compile(r"((?P<host>\S+): )?(?P<said>(ssh: |Permission denied|Host key|\S+@\S+: Permission).*)")


def start_everywhere(hosts: Hosts, arguments: list[str], wait_s: float) -> list[Finding]:
    """Start `mslt` with these arguments on every host by pdsh, and return what the first one found, with what ssh
    said of hosts that it did not reach. MsltError where there is no pdsh."""
    command = everywhere(hosts, arguments)
    environment = dict(os.environ)
    options = f"-o BatchMode=yes -o ConnectTimeout={max(round(wait_s), 1)}"
    environment["PDSH_SSH_ARGS_APPEND"] = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {options}".strip()
    try:
        process = subprocess.Popen(
            [command[0], "-N", *command[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise MsltError(
            "pdsh: not installed here; install it, or start this command on each host with its own --node-rank"
        ) from None
    errors: list[str] = []

    def read_errors() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            errors.append(line.rstrip())
            print(line, end="", file=sys.stderr)

    reader = threading.Thread(target=read_errors, daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        printed = process.stdout.read()
        process.wait()
        reader.join()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return with_ssh_failures(hosts, _findings_in(printed), errors)


def _findings_in(printed: str) -> list[Finding] | None:
    with suppress(ValueError, TypeError, KeyError):
        return [Finding(**each) for each in json.loads(printed)["findings"]]
    return None


def with_ssh_failures(hosts: Hosts, found: list[Finding] | None, errors: list[str]) -> list[Finding]:
    """`found` with a line for each host that ssh did not reach, instead of that it did not come; and for the first host
    where it printed nothing, so that `found` is None."""
    unreached = {match["host"] for line in errors if (match := _SSH_FAILED.match(line))}
    said = [match["said"] for line in errors if (match := _SSH_SAID.match(line))]
    findings = [each for each in found or [] if not (each.check == "host" and each.host in unreached)]
    for host in hosts.names:
        if host in unreached:
            why = next((line for line in said if host in line), None)
            text = f"not reached by ssh{'' if why is None else f' ({why})'}"
            remedy = f"`ssh {host} true` must work without a password; or leave it out of {hosts.file}"
            findings.append(Finding(host, "host", "fail", text, remedy))
    first = hosts.names[0]
    if found is None and first not in unreached:
        remedy = "see what it said, above; mslt must be installed in the same place on all hosts"
        findings.append(Finding(first, "host", "fail", "its part of the doctor ended without a word", remedy))
    return findings
