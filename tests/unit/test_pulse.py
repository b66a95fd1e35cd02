"""A watchdog that calls when nothing moves, once, and never while something does."""

import threading
import time

from mslt.pulse import Pulse


def test_it_calls_with_what_stood_still() -> None:
    called, said = threading.Event(), []
    pulse = Pulse(0.2, lambda text: (said.append(text), called.set()))
    pulse.at("stage 2, step 17")
    assert called.wait(10)
    time.sleep(0.5)
    assert said == ["stage 2, step 17: nothing has moved for 0 s"]
    pulse.close()


def test_it_is_silent_while_something_moves_and_after_its_end() -> None:
    said: list[str] = []
    pulse = Pulse(1.0, said.append)
    for step in range(15):
        pulse.at(f"step {step}")
        time.sleep(0.1)
    assert pulse.doing == "step 14"
    pulse.close()
    time.sleep(1.2)
    assert said == []
