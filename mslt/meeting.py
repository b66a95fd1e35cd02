"""Before every start the hosts of a run meet and agree who takes part, by torch's dynamic rendezvous: a host that
starts again waits for the others, and never joins processes of a start that failed."""

import logging
import os
import socket
import time
from contextlib import suppress

import torch
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mslt.errors import MsltError
from mslt.files import sha256_text
from mslt.nodes import Hosts, Place, free_port
from mslt.plan import Plan
from mslt.rundir import RunDir, how_far

LAST_CALL_S = 120  # how long enough hosts wait for those that are missing
GONE_S = 60.0  # how long the first host may refuse: its supervisor may be started again by hand
STORE_S = 15  # how long a question to the first host may take
RETRY_S = 5.0
MISSED_BEATS = 12  # of 5 s, and a host is taken for dead; so are those whose clocks are farther apart


class NotMetError(MsltError):
    """Others did not come in time; they may yet."""


class Meeting:
    """Of the supervisors of all hosts; the first host's listens at `port`, and has to live as long as the run."""

    def __init__(
        self,
        hosts: Hosts,
        node_rank: int,
        port: int,
        min_nodes: int,
        timeout_minutes: float,
        plan: Plan,
        run: RunDir,
    ) -> None:
        """`min_nodes` take part at least. Of those that are here as many do as a batch of the plan can be dealt out to;
        the others wait until they are needed, or the run is over. MsltError for numbers that do not go with the
        hostfile."""
        if not 0 <= node_rank < len(hosts.names):
            raise MsltError(f"--node-rank {node_rank}: {hosts.file} names {len(hosts.names)} hosts, counted from 0")
        numbers = range(1, len(hosts.names) + 1)
        usable = [number for number in numbers if plan.can_be_shared_by(number * hosts.slots)]
        if min_nodes not in usable:
            raise MsltError(
                f"--min-nodes {min_nodes}: with {hosts.slots} workers each, a batch can be dealt out to "
                f"{', '.join(map(str, usable))} of the hosts in {hosts.file}; take one of these"
            )
        self._hosts, self._node_rank, self._timeout_s = hosts, node_rank, 60 * timeout_minutes
        self._usable, self._plan, self._run = usable, plan, run
        self._parameters = RendezvousParameters(
            "c10d",
            f"{hosts.names[0]}:{port}",
            run_id=sha256_text(f"{plan.digest()} {run.path.resolve()} {hosts.names}")[:16],
            min_nodes=min_nodes,
            max_nodes=len(hosts.names),
            local_addr=hosts.names[node_rank],
            is_host=node_rank == 0,
            join_timeout=round(self._timeout_s) + LAST_CALL_S,
            last_call_timeout=min(LAST_CALL_S, round(self._timeout_s)),
            read_timeout=STORE_S,
            keep_alive_max_attempt=MISSED_BEATS,
        )
        self._handler: RendezvousHandler | None = None
        self._round: Store | None = None
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what counts is said here
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # rank 0 opens its own, at a port that is free

    def place(self) -> Place | None:
        """Wait for the others. None where the run went to its end without this host; NotMetError where too few come in
        time and none of them goes on without it, MsltError where one has given up."""
        deadline, refused_since = time.monotonic() + self._timeout_s, None
        has_met, so_far = self._round is not None, how_far(self._run, self._plan)
        first = self._hosts.names[0]
        while True:
            try:
                if self._handler is None:
                    self._handler = get_rendezvous_handler(self._parameters)
                met = self._handler.next_rendezvous()
                self._round = met.store
                place, port = self._agreed(met)
                if place is not None:
                    return place
                while self._handler.num_nodes_waiting() == 0:  # to start again: those that take part now have failed
                    if self._is_over(port):
                        return None
                    time.sleep(RETRY_S)
                deadline = time.monotonic() + self._timeout_s
            except (RendezvousClosedError, RendezvousGracefulExitError):
                if self._is_over(None):
                    return None
                raise MsltError(f"{first}: the run was given up on another host; its last lines say why") from None
            except RendezvousTimeoutError:
                if self._is_over(None):
                    return None
                if (now_so_far := how_far(self._run, self._plan)) != so_far:  # they train without this host
                    so_far = now_so_far
                    continue
                raise NotMetError(
                    f"{self._hosts.file}: fewer than {self._parameters.min_nodes} hosts came within "
                    f"{self._timeout_s / 60:g} minutes; `mslt doctor --hostfile` says what each lacks"
                ) from None
            except (RendezvousError, RuntimeError) as error:  # the store's own errors are RuntimeErrors
                self._handler, cause, now = None, error.__cause__ or error, time.monotonic()
                if self._node_rank == 0 and not has_met and "EADDRINUSE" in str(cause):
                    raise MsltError(
                        f"--master-port {self._parameters.endpoint.rpartition(':')[2]}: is in use on {first}, perhaps "
                        "by an earlier run; end that, or take another"
                    ) from None
                refused_since = (refused_since or now) if self._is_refused() else None
                if has_met and refused_since is not None and now - refused_since > GONE_S:
                    raise MsltError(
                        f"{first}: nothing listens at {self._parameters.endpoint} any more: the run has ended there, "
                        "and its last lines say why; the same command on all hosts goes on"
                    ) from None
                if now > deadline:
                    raise NotMetError(
                        f"{first}: not reached at {self._parameters.endpoint} within {self._timeout_s / 60:g} minutes "
                        f"({cause}); `mslt doctor --hostfile` says what is wrong"
                    ) from None
                time.sleep(RETRY_S)

    def _agreed(self, met: RendezvousInfo) -> tuple[Place | None, int]:
        """The place of this host, None where it is spare, and the port of this start. MsltError where hosts have other
        devices than this one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        met.store.set(f"host/{met.rank}", f"{self._node_rank} {device}")
        told = [met.store.get(f"host/{rank}").decode().split() for rank in range(met.world_size)]
        here = sorted(int(node_rank) for node_rank, _ in told)
        if here[0] == self._node_rank:
            met.store.set("port", str(free_port()))
        port = int(met.store.get("port"))
        for node_rank, others in told:
            if others != device:
                raise MsltError(
                    f"{self._hosts.names[int(node_rank)]}: torch trains on {others} there, on {device} on "
                    f"{self._hosts.names[self._node_rank]}; `mslt doctor --hostfile` says what is wrong"
                )
        names = [self._hosts.names[index] for index in here]
        names = names[: max(number for number in self._usable if number <= len(here))]
        index = here.index(self._node_rank)
        return Place(tuple(names), self._hosts.slots, index, port) if index < len(names) else None, port

    def _is_over(self, port: int | None) -> bool:
        return self._run.first_unfinished(self._plan) is None or (port is not None and self._run.was_left(port))

    def _is_refused(self) -> bool:
        """Whether the first host is there, and nothing listens."""
        host, _, port = self._parameters.endpoint.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=RETRY_S).close()
        except OSError as error:
            return isinstance(error, ConnectionRefusedError)
        return False

    def tell_end(self) -> None:
        """Tell the other hosts of this start that the workers of this one have ended, so that theirs need not wait."""
        with suppress(RuntimeError):
            if self._round is not None:
                self._round.set("ended", "")

    def has_ended(self) -> bool:
        """Whether the workers of another host of this start have ended."""
        with suppress(RuntimeError):
            return self._round is not None and self._round.check(["ended"])
        return False

    def close(self) -> None:
        """Say that this host does not come again. That ends the others, unless they are to go on without it; they
        cannot without the first."""
        if self._handler is not None and (self._node_rank == 0 or self._parameters.min_nodes == len(self._hosts.names)):
            with suppress(RendezvousError, RuntimeError):
                self._handler.shutdown()
