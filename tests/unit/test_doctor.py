"""What the doctor finds on one host, and between hosts that are made up: each fault with its host and its remedy."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed import TCPStore
from typer.testing import CliRunner

from mslt import doctor, links
from mslt.cli.main import app
from mslt.cost import run_bytes, stage_cost
from mslt.doctor import (
    Asked,
    Facts,
    Finding,
    check_clock,
    check_disk,
    check_folder,
    check_gpus_here,
    check_gradients,
    check_links,
    check_shards,
    check_versions,
    compare,
    examine,
    lay_token,
    of_mistake,
    settled,
    versions_here,
)
from mslt.errors import MsltError
from mslt.nodes import Hosts, free_port
from mslt.plan import Plan
from mslt.rounds import Line, as_first, as_other, broken, start_everywhere, take_in, with_ssh_failures
from mslt.rundir import RunDir, open_run

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "mslt": "0.1.0",
            "code": "abcdef", "numpy": "2.4", "commit": "123"}  # fmt: skip
FACTS = Facts(VERSIONS, (), "/run", "a" * 64, "b" * 64, 1e12)
HOSTS = Hosts(Path("hosts"), ("gpu1", "gpu2", "gpu3"), 8)


@pytest.fixture
def recipe(tmp_path: Path, tiny_recipe: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


def only(findings: Sequence[Finding]) -> Finding:
    (finding,) = findings
    assert bool(finding.remedy) == (finding.status != "ok"), finding
    return finding


def bad(findings: Sequence[Finding]) -> list[tuple[str, str, str]]:
    assert all(each.remedy for each in findings if each.status != "ok")
    return [(each.host, each.check, each.status) for each in findings if each.status != "ok"]


# A host alone


def test_a_host_on_which_a_run_starts(tmp_path: Path, recipe: Path, shards: Path) -> None:
    asked = Asked(str(recipe), tmp_path / "run", shards, num_hosts=2, workers=1)
    facts, found = examine("here", asked, is_first=True)
    assert [(each.check, each.status) for each in found] == [
        (check, "ok") for check in ("versions", "recipe", "gpus", "shards", "disk")
    ]
    assert facts.shards is not None
    assert facts.plan is not None
    assert facts.operations_per_s
    assert not (tmp_path / "run").exists()


def test_without_a_recipe_it_looks_at_what_it_can(shards: Path) -> None:
    assert [each.check for each in examine("here", Asked(), is_first=True)[1]] == ["versions", "gpus"]
    assert "shards" in [each.check for each in examine("here", Asked(shards=shards), is_first=True)[1]]


def test_versions_of_this_host_and_one_that_is_missing() -> None:
    versions = versions_here()
    assert only(check_versions("here", versions)).status == "ok"
    found = only(check_versions("here", {**versions, "deepspeed": None}))
    assert (found.status, found.said) == ("fail", "deepspeed: not installed")


@pytest.mark.parametrize(
    ("changes", "workers", "said"),
    [
        ({"training": {"batch_size": "many"}}, 1, "training.batch_size"),
        ({}, 3, "training.batch_size 8 is not a multiple of the 6 workers"),
        ({"model": {"vocab_size": 300}}, 1, "made with a tokenizer of 512 entries"),
    ],
)
def test_a_recipe_that_train_would_refuse(
    tmp_path: Path, tiny_recipe: dict[str, Any], shards: Path, changes: dict[str, Any], workers: int, said: str
) -> None:
    for section, change in changes.items():
        tiny_recipe[section] |= change
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    _, found = examine("here", Asked(str(path), tmp_path / "run", shards, 2, workers), is_first=True)
    assert bad(found) == [("here", "recipe", "fail")]
    assert said in next(each.said for each in found if each.check == "recipe")


def test_a_run_directory_of_another_plan(tmp_path: Path, recipe: Path, shards: Path, tiny_plan: Plan) -> None:
    open_run(tmp_path / "run", tiny_plan, "", {})  # of other shards
    asked = Asked(str(recipe), tmp_path / "run", shards)
    found = [each for each in examine("here", asked, is_first=True)[1] if each.status == "fail"]
    assert "holds a run of another plan:\n  shards_sha256" in only(found).said
    assert "Take another --run-dir" in only(found).said


def test_what_a_killed_doctor_left_makes_no_directory_unfit(tmp_path: Path, tiny_plan: Plan) -> None:
    (tmp_path / ".mslt-doctor-12345678").touch()
    assert open_run(tmp_path, tiny_plan, "", {}) == RunDir(tmp_path)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, number: int, free: float = 1.0) -> list[str]:
    monkeypatch.setattr(doctor, "check_gpus", lambda autocast, num_workers: None)
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.full((size,), 1.0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(free * 80e9), int(80e9)))
    return ["A100"] * number


def test_cpus_are_said_to_be_what_trains() -> None:
    found = only(check_gpus_here("here", [], Asked(workers=2), None))
    assert (found.status, found.said) == ("ok", f"no GPU: 2 workers on {len(os.sched_getaffinity(0))} CPU cores")


def test_gpus_that_are_enough_too_few_or_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = pretend_gpus(monkeypatch, 4)
    assert only(check_gpus_here("here", gpus, Asked(workers=4), None)).said.startswith("4 × A100, all with kernels")
    few = only(check_gpus_here("here", gpus, Asked(workers=8), None))
    assert (few.status, few.said) == ("fail", "torch sees 4 GPUs, 8 workers need one each")
    assert only(check_gpus_here("here", [], Asked(expected_gpus=8), None)).said == "torch sees 0 GPUs, 8 expected"
    pretend_gpus(monkeypatch, 4, free=0.1)
    busy = check_gpus_here("here", gpus, Asked(workers=2), None)
    assert bad(busy) == [("here", "gpus", "warn")] * 2
    assert busy[0].said == "GPU 0, A100: 8.0 GB of 80.0 GB are free"


def test_a_gpu_without_kernels_in_this_torch_or_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = pretend_gpus(monkeypatch, 1)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: out of order\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(torch, "ones", fails)
    assert only(check_gpus_here("here", gpus, Asked(), None)).said == "GPU 0, A100: CUDA error: out of order"

    def refuses(*_: Any) -> None:
        raise MsltError("V100: no kernels; pip install torch")

    monkeypatch.setattr(doctor, "check_gpus", refuses)
    found = only(check_gpus_here("here", gpus, Asked(), None))
    assert (found.said, found.remedy) == ("V100: no kernels", "pip install torch")


def test_every_bad_file_of_the_shards_is_named(tmp_path: Path, shards: Path) -> None:
    manifest, found = check_shards("here", shards)
    assert manifest is not None
    assert only(found).said.endswith(f"every checksum right ({manifest.hash[:12]})")
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    train, validation = (sorted(folder.glob(f"{split}-*.arrow"))[0] for split in ("train", "validation"))
    content = bytearray(train.read_bytes())
    content[-100] ^= 1
    train.write_bytes(content)
    validation.unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    manifest, found = check_shards("here", folder)
    assert manifest is not None
    assert bad(found) == [("here", "shards", "fail")] * 3
    told = "\n".join(each.said for each in found)
    assert f"{train}: sha256" in told
    assert f"{validation}: missing" in told
    assert "tokenizer.json: shards were made with another tokenizer" in told
    assert check_shards("here", tmp_path / "nowhere")[0] is None
    assert "no such folder" in only(check_shards("here", tmp_path / "nowhere")[1]).said


def test_room_for_all_checkpoints_of_the_plan(tmp_path: Path, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [stage_cost(tiny_plan.model, stage) for stage in tiny_plan.stages]
    trained = [cost.trainable_parameters for cost in costs]
    needed = run_bytes(tiny_plan, 2)
    assert needed == sum(8 * cost.total_parameters for cost in costs) + 24 * sum(trained) + 12 * max(trained)

    def free(share: float) -> Finding:
        usage = shutil._ntuple_diskusage(10**12, 0, int(share * needed))  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        return only(check_disk("here", tmp_path / "deep" / "run", needed))

    assert [free(share).status for share in (1.3, 1.1, 0.9)] == ["ok", "warn", "fail"]
    assert free(0.9).said.startswith(f"{tmp_path}: ")
    assert free(0.5).remedy.startswith(f"make room for {needed / 2e6:.1f} MB")
    stage = tmp_path / "deep" / "run" / "stage-1"
    stage.mkdir(parents=True)
    (stage / "base.safetensors").write_bytes(bytes(needed // 2))
    assert free(0.6).status == "warn"  # half of it is there


# The shared folder


def test_the_same_folder_and_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SEEN_S", 0.0)
    run = tmp_path / "runs" / "one"
    with lay_token("gpu1", run) as (token, found):
        assert only(found).status == "ok"
        assert token is not None
        assert only(check_folder("gpu2", run, token)).said == f"{tmp_path}: writable, and the first host's"
        Path(token.path).write_text("of an earlier visit")
        assert "not the first host's" in only(check_folder("gpu2", run, token)).said
        elsewhere = only(check_folder("gpu2", tmp_path / "other", token))
        assert f"the run directory is {tmp_path}/other here, {run} on the first host" in elsewhere.said
        missing = only(check_folder("gpu2", run, replace(token, path=str(tmp_path / "not mounted" / "token"))))
        assert missing.said == f"{tmp_path}/not mounted: not there"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with lay_token("gpu1", tmp_path) as (token, _), monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        found = only(check_folder("gpu2", tmp_path, token))
        assert (found.status, found.said) == ("fail", f"{tmp_path}: cannot be written (No space left on device)")
        with lay_token("gpu1", tmp_path) as (none, first):
            assert none is None
            assert only(first).said == found.said
        assert only(check_folder("gpu2", tmp_path, None)).said == found.said
    assert list(tmp_path.iterdir()) == []


# Between hosts


def test_equal_hosts_have_nothing_to_compare() -> None:
    assert compare({"gpu1": FACTS, "gpu2": FACTS}) == []


def test_the_host_of_the_fewer_is_the_odd_one() -> None:
    other = replace(FACTS, versions={**VERSIONS, "torch": "2.11.0", "numpy": "2.0"})
    found = only(compare({"gpu1": other, "gpu2": FACTS, "gpu3": FACTS}))
    assert (found.host, found.check, found.status) == ("gpu1", "versions", "fail")
    assert found.said == "torch 2.11.0 (2.13.0 elsewhere), numpy 2.0 (2.4 elsewhere)"
    assert found.remedy == "install the same torch as on the other hosts"
    assert only(compare({"gpu1": FACTS, "gpu2": other})).host == "gpu2"  # of two the first is right
    only_numpy = replace(FACTS, versions={**VERSIONS, "numpy": "2.0"})
    assert only(compare({"gpu1": FACTS, "gpu2": only_numpy})).status == "warn"
    edited = replace(FACTS, versions={**VERSIONS, "code": "fedcba", "commit": "123+"})
    assert "check out the same commit" in only(compare({"gpu1": FACTS, "gpu2": edited})).remedy


def test_other_shards_other_plans_and_other_gpus() -> None:
    assert bad(compare({"gpu1": FACTS, "gpu2": replace(FACTS, shards="c" * 64)})) == [("gpu2", "shards", "fail")]
    assert bad(compare({"gpu1": FACTS, "gpu2": replace(FACTS, plan="c" * 64)})) == [("gpu2", "recipe", "fail")]
    assert compare({"gpu1": FACTS, "gpu2": replace(FACTS, plan=None, shards=None)}) == []  # said already by gpu2
    gpus = replace(FACTS, gpus=("A100", "A100"))
    assert bad(compare({"gpu1": FACTS, "gpu2": gpus, "gpu3": gpus})) == [("gpu1", "gpus", "fail")]
    slower = replace(FACTS, gpus=("A100", "T4"))
    assert bad(compare({"gpu1": gpus, "gpu2": gpus, "gpu3": slower})) == [("gpu3", "gpus", "warn")]


@pytest.mark.parametrize(("ahead_s", "status"), [(0.02, "ok"), (-9.0, "ok"), (-11.0, "warn"), (31.0, "fail")])
def test_clocks(ahead_s: float, status: str) -> None:
    assert only([check_clock("gpu2", ahead_s)]).status == status


def test_a_slow_link_is_named_and_fails_only_where_asked() -> None:
    assert only(check_links({"gpu2": 9.4}, None)).said == "9.4 Gbit/s to the first host"
    slow = only(check_links({"gpu2": 0.094}, None))
    assert (slow.status, slow.said) == ("warn", "0.094 Gbit/s to the first host, under 0.5")
    assert bad(check_links({"gpu2": 90.0, "gpu3": 91.0, "gpu4": 9.0}, None)) == [("gpu4", "link", "warn")]
    assert bad(check_links({"gpu2": 9.0, "gpu3": 9.1, "gpu4": 9.0}, 10.0)) == [
        (host, "link", "fail") for host in ("gpu2", "gpu3", "gpu4")
    ]


def test_what_reducing_the_gradients_takes_of_a_step(tiny_plan: Plan) -> None:
    said = check_gradients(tiny_plan, 1e-8, 1e9, 2).said
    payloads = [4 * stage_cost(tiny_plan.model, stage).trainable_parameters for stage in tiny_plan.stages]
    assert f"stage 1: {payloads[0] / 1e3:,.1f} kB in {payloads[0] * 1e-8:.2g} s, up to " in said
    assert said.count("% of a step") == 3
    assert said.endswith("in the whole run")
    assert "% of a step" not in check_gradients(tiny_plan, 1e-8, 0.0, 2).said


# The exchange


def on_this_machine(tmp_path: Path) -> tuple[Hosts, int]:
    return Hosts(tmp_path / "hosts", ("127.0.0.1", "127.0.0.2", "127.0.0.3"), 1), free_port()


def test_a_host_that_falls_silent_and_one_that_does_not_come(tmp_path: Path) -> None:
    hosts, port = on_this_machine(tmp_path)

    def says_what_time_it_is_and_no_more() -> None:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        line = Line(store, 1, False, 10.0)
        store.set("here/1", "")
        assert line.hear()["do"] == "clock"
        line.say(now=time.time() + 20)
        assert line.hear()["do"] == "examine"

    thread = threading.Thread(target=says_what_time_it_is_and_no_more)
    thread.start()
    asked = Asked(run_dir=tmp_path / "run", num_hosts=3, workers=1)
    found = as_first(asked, hosts, port, 1.0, tell=lambda doing: None)
    thread.join()
    assert bad(found) == [("127.0.0.3", "host", "fail"), ("127.0.0.2", "clock", "warn"), ("127.0.0.2", "host", "fail")]
    assert [each.said for each in found if each.check == "host"] == ["did not come within 1 s", "came, and fell silent"]
    assert list(tmp_path.iterdir()) == []


def test_a_first_host_that_does_not_listen(tmp_path: Path) -> None:
    hosts, port = on_this_machine(tmp_path)
    with pytest.raises(MsltError, match=f"127.0.0.1: the first host does not listen at port {port}"):
        as_other(Asked(), hosts, 1, port, 0.1)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    hosts, _ = on_this_machine(tmp_path)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MsltError, match=f"--master-port {port}: cannot be served on 127.0.0.1"):
            as_first(Asked(), hosts, port, 1.0, tell=lambda doing: None)


def test_answers_of_another_version() -> None:
    facts: dict[str, Facts] = {}
    (found,) = take_in({"facts": {"gpus": [], "weather": "fair"}, "findings": []}, "gpu2", facts)
    assert (found.check, found.status, found.said) == ("versions", "fail", "answers as another version of mslt does")
    assert facts == {}


# In a process of its own: this one may be in a group already.
ALONE = """
import torch
from mslt import links
links.TIMEOUT_S = 1.0
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
try:
    links.time_all_reduces(store, "pair", 0, 2, "gloo", 2**20, 1.0)
except RuntimeError:
    print(torch.distributed.is_initialized())
"""


def test_hosts_that_do_not_reach_each_other() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    found = only([broken("gpu2", "timed out", "gloo")])
    assert (found.host, found.said) == ("gpu2", "no all-reduce by gloo (timed out)")
    assert links.Timed(2, 10**9, 1.0).gbps == 8
    assert links.Timed(4, 10**9, 1.0).gbps == 12


# Findings, and the command


def test_findings_of_our_messages() -> None:
    found = of_mistake("here", "recipe", MsltError("a: is wrong; really; mend it"))
    assert (found.said, found.remedy) == ("a: is wrong; really", "mend it")
    found = of_mistake("here", "recipe", MsltError("2 mistakes:\n  a; drop it\n  b; mend it"))
    assert (found.said, found.remedy) == ("2 mistakes:\n  a; drop it\n  b; mend it", "mend what it lists")
    found = of_mistake("here", "shards", PermissionError(13, "Permission denied", "/data"))
    assert found.said == "/data: Permission denied"
    assert found.remedy
    ok, fail = Finding("here", "disk", "ok", "room"), Finding("here", "disk", "fail", "no room", "make some")
    other = Finding("there", "disk", "ok", "room")
    assert settled([ok, fail, other]) == [fail, other]


def test_hosts_that_ssh_does_not_reach_are_named() -> None:
    errors = [
        "ssh: connect to host gpu3 port 22: No route to host",
        "pdsh@login: gpu3: ssh exited with exit code 255",
        "doctor: waiting for 2 other hosts",
    ]
    late = Finding("gpu3", "host", "fail", "did not come within 60 s", "see whether it is on")
    found = only(with_ssh_failures(HOSTS, [late], errors))
    assert found.said == "not reached by ssh (ssh: connect to host gpu3 port 22: No route to host)"
    assert "`ssh gpu3 true`" in found.remedy
    silent = only(with_ssh_failures(HOSTS, None, ["gpu1: No module named mslt"]))
    assert (silent.host, silent.check) == ("gpu1", "host")
    first = with_ssh_failures(HOSTS, None, ["pdsh@login: gpu1: ssh exited with exit code 255"])
    assert only(first).said == "not reached by ssh"


def test_every_host_is_started_and_what_the_first_prints_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Finding("gpu2", "disk", "ok", "room")
    described = json.dumps({"would_fail": False, "findings": [vars(found)]})
    stand_in = tmp_path / "pdsh"
    stand_in.write_text(
        f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{described}'\n"
        'echo "pdsh@login: gpu3: ssh exited with exit code 255" >&2\nexit 255\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [each.host for each in start_everywhere(HOSTS, ["doctor", "--json"], 5)] == ["gpu2", "gpu3"]
    asked = (tmp_path / "asked").read_text()
    assert "-w gpu1,gpu2,gpu3" in asked
    assert "mslt.cli.main doctor --json --node-rank %n" in asked
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(MsltError, match=r"pdsh: not installed here; .*--node-rank"):
        start_everywhere(HOSTS, ["doctor"], 5)


def invoked(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], catch_exceptions=False)


def test_one_host_from_the_command_line(tmp_path: Path, recipe: Path, shards: Path) -> None:
    options = (recipe, "--shards", shards, "--run-dir", tmp_path / "run")
    done = invoked(*options, "--json")
    described = json.loads(done.stdout)
    assert (done.exit_code, described["would_fail"]) == (0, False)
    assert [each["check"] for each in described["findings"]][-1] == "folder"
    table = invoked(*options, "--expect-gpus", "4096")
    assert table.exit_code == 1
    assert "4096 expected" in table.stdout
    assert "A run would fail: 1 line to mend." in table.stdout
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".mslt-doctor-*"))


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("gpu1 slots=1\ngpu2 slots=1\n")
    with pytest.raises(MsltError, match="--node-rank 1: names a line of a hostfile"):
        invoked("--node-rank", "1")
    with pytest.raises(MsltError, match="--workers 2: the slots in"):
        invoked("--workers", "2", "--hostfile", hostfile)
    with pytest.raises(MsltError, match=r"--node-rank 2: .* names 2 hosts, counted from 0"):
        invoked("--node-rank", "2", "--hostfile", hostfile)
