# SPDX-License-Identifier: Apache-2.0
"""Reports the guard's state to systemd, and measures how late the reactor is."""

from __future__ import annotations

import os
import socket
from typing import Any

from attrs import define, field
from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from lotusguard.metrics import Metrics

log = Logger()

LAG_INTERVAL = 1.0
"""Seconds between two measurements of the reactor's lag."""


def _watchdog_interval() -> float:
    """Seconds between two messages to systemd's watchdog: half its time. 0: this process has no watchdog."""
    ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    try:
        return int(os.environ.get("WATCHDOG_USEC") or 0) / 2e6 if ours else 0.0
    except ValueError:
        return 0.0


@define(eq=False, slots=False)
class SystemdNotifier(Service):
    """The ``sd_notify`` protocol: ``READY=1``, ``STOPPING=1`` and the watchdog. Without systemd it does nothing.

    Each message is one datagram to ``$NOTIFY_SOCKET`` (``sd_notify(3)``).
    """

    name = "systemd notifier"
    _reactor: Any = field(repr=False)
    _address: str = field(init=False, factory=lambda: os.environ.get("NOTIFY_SOCKET", ""))
    _interval: float = field(init=False, factory=_watchdog_interval)
    _loop: LoopingCall = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._loop = LoopingCall(self._notify, "WATCHDOG=1")
        self._loop.clock = self._reactor

    def ready(self) -> None:
        """Everything listens."""
        self._notify("READY=1")
        if self._interval and self._address:
            self._loop.start(self._interval)

    def stopping(self) -> None:
        """Requests in flight are being finished."""
        self._notify("STOPPING=1")

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _notify(self, state: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
                notify.setblocking(False)
                notify.sendto(state.encode("ascii"), address)
        except OSError as error:
            log.warn("could not send {state} to systemd: {error}", state=state, error=str(error))


@define(eq=False, slots=False)
class ReactorLagMonitor(Service):
    """Measures how late the reactor runs a timer that is due every second."""

    name = "reactor lag monitor"
    _reactor: Any = field(repr=False)
    _metrics: Metrics = field(repr=False)
    _loop: LoopingCall = field(init=False, repr=False)
    _last: float = field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        self._loop = LoopingCall(self._measure)
        self._loop.clock = self._reactor

    def startService(self) -> None:
        super().startService()
        self._last = self._reactor.seconds()
        self._loop.start(LAG_INTERVAL, now=False)

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _measure(self) -> None:
        now = self._reactor.seconds()
        self._metrics.reactor_lag.set(max(0.0, now - self._last - LAG_INTERVAL))
        self._last = now
