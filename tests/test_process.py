# SPDX-License-Identifier: Apache-2.0
"""The process's own settings. The reactor's clock is changed in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from twisted.internet.task import Clock

from lotusguard.process import use_monotonic_time

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

FREED = """
import asyncio
from lotusguard.process import return_free_memory

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS:"))

before = resident()
parts = [bytes(60_000) for _ in range(2_000)]
used_still = bytes(60_000)
del parts
kept = resident() - before
asyncio.run(return_free_memory())
print(kept, resident() - before)
"""
"""Memory in MB that is kept after 120 MB were freed below something that is used, and after it was given back."""


def test_timers_go_on_when_the_wall_clock_steps_back() -> None:
    done = subprocess.run([sys.executable, "-c", STEP_BACK], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["10", "True", "True"]


def test_the_clock_is_not_changed_once_something_is_scheduled() -> None:
    clock = Clock()
    clock.callLater(1, lambda: None)
    with pytest.raises(RuntimeError):
        use_monotonic_time(clock)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_freed_memory_is_given_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=120, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 80
    assert left < 40
