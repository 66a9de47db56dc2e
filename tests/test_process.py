# SPDX-License-Identifier: Apache-2.0
"""The process's own settings. The reactor's clock is changed in a process of its own."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
from twisted.internet.task import Clock

from lotusguard.process import use_monotonic_time, without_collections

STEP_BACK = """
import time
from twisted.internet import reactor, task
from lotusguard.process import use_monotonic_time

use_monotonic_time(reactor)
use_monotonic_time(reactor)  # a second call changes nothing
real, offset = time.time, [0.0]
time.time = lambda: real() + offset[0]
rounds = []

def work():
    rounds.append(reactor.seconds())
    if len(rounds) == 3:
        offset[0] = -3600.0
    if len(rounds) == 10:
        reactor.stop()

task.LoopingCall(work).start(0.02)
reactor.callLater(30, reactor.stop)
reactor.run()
print(len(rounds), rounds == sorted(rounds), abs(reactor.seconds() - time.monotonic()) < 5)
"""


def test_timers_go_on_when_the_wall_clock_steps_back() -> None:
    done = subprocess.run([sys.executable, "-c", STEP_BACK], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["10", "True", "True"]


def test_the_clock_is_not_changed_once_something_is_scheduled() -> None:
    clock = Clock()
    clock.callLater(1, lambda: None)
    with pytest.raises(RuntimeError):
        use_monotonic_time(clock)


def test_collections_begin_again_after_a_part_without_any() -> None:
    with without_collections():
        assert not gc.isenabled()
        with without_collections():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
