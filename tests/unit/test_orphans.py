"""Processes that end with those they work for."""

import subprocess
import sys
import time

import psutil
import pytest

GRANDCHILD = """
import os, sys, time
from mslt.orphans import end_with
{before}
end_with(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
CHILD = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep({life})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's end")
@pytest.mark.parametrize(("before", "life", "says"), [("pass", 60, True), ("time.sleep(2)", 0.5, False)])
def test_a_process_ends_with_its_parent_and_with_one_that_is_gone_already(before: str, life: float, says: bool) -> None:
    command = [sys.executable, "-c", CHILD.format(life=life), GRANDCHILD.format(before=before)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        if says:
            grandchild = psutil.Process(int(child.stdout.readline()))
            child.kill()
            assert not psutil.wait_procs([grandchild], timeout=10)[1]
        else:
            assert child.stdout.readline() == ""  # the last that could write has ended
        child.wait()


LISTENED_TO = """
import signal, sys, time
from mslt.orphans import leave_with_the_listener
told = []
signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
leave_with_the_listener()
print("ready", flush=True)
end = time.monotonic() + 20
while not told and time.monotonic() < end:
    time.sleep(0.1)
sys.exit(75 if told else 1)
"""


def test_a_process_is_told_to_leave_when_nobody_listens_any_more() -> None:
    process = subprocess.Popen([sys.executable, "-c", LISTENED_TO], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(20) == 75
