# SPDX-License-Identifier: Apache-2.0
"""Messages to systemd, and the measurement of the reactor's lag, on a clock that the tests advance."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from lotusguard.metrics import Metrics
from lotusguard.supervision import ReactorLagMonitor, SystemdNotifier


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The other end of ``$NOTIFY_SOCKET``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield end


def told(end: socket.socket) -> list[bytes]:
    """The messages since the last call."""
    messages = []
    try:
        while True:
            messages.append(end.recv(1000))
    except BlockingIOError:
        return messages


def test_systemd_is_notified_when_the_guard_is_ready_and_when_it_stops(systemd: socket.socket) -> None:
    supervised = SystemdNotifier(Clock())
    supervised.startService()
    assert told(systemd) == []
    supervised.ready()
    assert told(systemd) == [b"READY=1"]
    supervised.stopping()
    assert told(systemd) == [b"STOPPING=1"]


def test_the_watchdog_gets_two_messages_in_its_time(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    clock = Clock()
    supervised = SystemdNotifier(clock)
    supervised.startService()
    supervised.ready()
    told(systemd)
    clock.pump([5.0] * 4)
    assert told(systemd) == [b"WATCHDOG=1"] * 4
    supervised.stopService()
    clock.pump([5.0] * 4)
    assert told(systemd) == []


def test_the_watchdog_of_another_process_is_ignored(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    clock = Clock()
    supervised = SystemdNotifier(clock)
    supervised.ready()
    clock.pump([5.0] * 4)
    assert told(systemd) == [b"READY=1"]


def test_without_systemd_nothing_is_sent_and_nothing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    SystemdNotifier(Clock()).ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    SystemdNotifier(Clock()).ready()


def test_the_reactors_lag_is_measured() -> None:
    clock, metrics = Clock(), Metrics()
    lag = ReactorLagMonitor(clock, metrics)
    lag.startService()
    clock.advance(1.0)
    assert metrics.registry.get_sample_value("lotusguard_reactor_lag_seconds") == 0
    clock.advance(1.7)
    late = metrics.registry.get_sample_value("lotusguard_reactor_lag_seconds")
    assert late == pytest.approx(0.7)
    lag.stopService()
