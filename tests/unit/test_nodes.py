"""A hostfile: what DeepSpeed reads, and what is refused before a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mslt import nodes
from mslt.errors import MsltError
from mslt.nodes import Place, everywhere, interface_towards, on_every_host, read_hostfile
from tests.distributed.runs import write_recipe


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(text)
    return path


def test_hosts_in_their_order_with_their_workers(tmp_path: Path) -> None:
    hosts = read_hostfile(written(tmp_path, "# the rack\n\ngpu2 slots=8\n  10.0.0.7   slots=8  # borrowed\n"))
    assert hosts.names == ("gpu2", "10.0.0.7")
    assert (hosts.slots, hosts.num_workers) == (8, 16)


BAD = {
    "": r"names no host",
    "# gpu1 slots=1\n": r"names no host",
    "gpu1\n": r"line 1: 'gpu1' is no host; write `NAME slots=NUMBER`",
    "gpu1 slots=2\ngpu2 slots=two\n": r"line 2: 'gpu2 slots=two' is no host",
    "gpu1 slots=0\n": r"line 1: 'gpu1 slots=0' is no host",
    "gpu1 slots=2\ngpu1 slots=2\n": r"line 2: gpu1 stands there twice",
    "gpu1 slots=2\ngpu2 slots=4\n": r"different numbers of slots \(gpu1 2, gpu2 4\)",
}


@pytest.mark.parametrize(("text", "said"), BAD.items())
def test_what_is_no_hostfile_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(MsltError, match=said):
        read_hostfile(written(tmp_path, text))


def test_a_hostfile_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(MsltError, match=r"--hostfile .*nowhere: cannot be read"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MsltError, match=r"cannot be read"):
        read_hostfile(tmp_path / "bytes")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, to see when it listens")
def test_told_to_leave_while_it_waits_for_the_others_a_host_leaves(
    tmp_path: Path, shards: Path, tiny_recipe: dict[str, Any]
) -> None:
    hostfile = written(tmp_path, "127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe)
    command = ["train", recipe, "--shards", shards, "--run-dir", tmp_path / "run", "--hostfile", hostfile]
    process = subprocess.Popen(
        [sys.executable, "-m", "mslt.cli.main", *map(str, command), "--node-rank", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGUSR1 - 1):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert f"mslt: {tmp_path / 'run'}: left, with no workers running; the same command goes on" in said


AT_AN_IMPORT = """
import os, signal
from mslt import preflight
from mslt.cli.main import main

def imports(*_):
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    except Exception as error:  # so does the import of an extension module that needs numpy
        raise ImportError("numpy failed to import") from error

preflight.WHERE = imports
main()
"""


@pytest.mark.parametrize("name", [b"run", b"\xff"], ids=["run", "no UTF-8"])
@pytest.mark.parametrize("is_alone", [True, False], ids=["one host", "of two hosts"])
def test_told_to_leave_where_what_is_raised_becomes_another_error_a_host_leaves(
    tmp_path: Path, is_alone: bool, name: bytes
) -> None:
    hostfile = written(tmp_path, "127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    several: list[str | Path] = [] if is_alone else ["--hostfile", hostfile, "--node-rank", "1"]
    command = ["train", "bert-base", "--run-dir", tmp_path / os.fsdecode(name), *several]
    script = AT_AN_IMPORT.replace("WHERE", "open_recipe" if is_alone else "check_recipe")
    process = subprocess.run([sys.executable, "-c", script, *map(str, command)], stderr=subprocess.PIPE, timeout=60)
    said = process.stderr.decode(errors="backslashreplace")
    assert process.returncode == 75, said
    assert "left, with no workers running; the same command goes on" in said


def test_the_command_for_every_host_comes_through_shells_and_pdsh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = read_hostfile(written(tmp_path, "gpu1 slots=1\ngpu2 slots=1\n"))
    folder = tmp_path / "it's 100 %n"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        nodes.os,
        "environ",
        {"NCCL_DEBUG": "a b", "HF_TOKEN": "secret", "HF_HOME": "h", "OTHER": "o"},
    )
    command = everywhere(hosts, ["train", "my recipe.yaml"])
    assert command[:-1] == ["pdsh", "-S", "-R", "ssh", "-f", "2", "-w", "gpu1,gpu2"]
    as_pdsh = command[-1].replace("%%", "\0").replace("%n", "1").replace("\0", "%")
    assert "secret" not in as_pdsh
    python = f"{sys.executable} -m mslt.cli.main"
    tells = """sh -c 'printf "%s|" "$PWD" "$NCCL_DEBUG" "$HF_HOME" "$OTHER" "$@"' sh"""
    assert python in as_pdsh
    line = ["sh", "-c", as_pdsh.replace(python, tells)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert done.stdout.split("|") == [str(folder), "a b", "h", "", "train", "my recipe.yaml", "--node-rank", "1", ""]


def test_the_way_to_another_host_and_to_none() -> None:
    assert interface_towards("127.0.0.2") == "lo"
    assert interface_towards("no such host.invalid") is None
    assert Place(("gpu1",), 8, 0, 1).interface is None


@pytest.mark.parametrize(("rank", "towards"), [(0, "gpu2"), (1, "gpu1"), (2, "gpu1")])
def test_no_host_asks_for_the_way_to_itself(rank: int, towards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name is that of the loopback on many machines."""
    monkeypatch.setattr(nodes, "interface_towards", lambda host: f"to {host}")
    place = Place(("gpu1", "gpu2", "gpu3"), 2, rank, 1)
    assert place.interface == f"to {towards}"
    assert list(place.ranks) == [2 * rank, 2 * rank + 1]


TWICE = """
import signal, sys, threading, time, os
from pathlib import Path
from mslt.nodes import on_every_host
leave = Path(sys.argv[1])
def signals():
    while not Path(sys.argv[2]).exists(): time.sleep(0.05)
    for number in sys.argv[3:]:
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(1.5)
threading.Thread(target=signals, daemon=True).start()
seconds = 60 if len(sys.argv) > 4 else 2.5
wait = f"touch {sys.argv[2]}; while [ ! -e {leave} ]; do sleep 0.1; done; sleep {seconds}; exit 75"
sys.exit(on_every_host(["sh", "-c", wait], leave) % 256)
"""


@pytest.mark.parametrize(("signals", "status"), [(["SIGINT"], 75), (["SIGTERM"], 75), (["SIGHUP", "SIGINT"], 256 - 9)])
def test_once_asks_all_hosts_to_leave_and_twice_ends_the_connections(
    tmp_path: Path, signals: list[str], status: int
) -> None:
    command = [sys.executable, "-c", TWICE, str(tmp_path / "leave"), str(tmp_path / "runs"), *signals]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert (tmp_path / "leave").exists()
    assert "asked the run to save and leave" in done.stderr


def test_a_missing_pdsh_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        MsltError, match="mslt-pdsh: not found; install it here, or start the same command with --node-rank"
    ):
        on_every_host(["mslt-pdsh"], tmp_path / "leave")
