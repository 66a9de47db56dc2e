# SPDX-License-Identifier: Apache-2.0
"""Telling systemd how we are, and ourselves how late we are."""

from __future__ import annotations

import os
import socket
from typing import Any

from twisted.application.service import Service
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from lotusguard.metrics import Metrics

log = Logger()


class SystemdNotifier(Service):
    """The ``sd_notify`` protocol: ``READY=1``, ``STOPPING=1`` and the watchdog. Without systemd it does nothing.

    One datagram with a line each to ``$NOTIFY_SOCKET`` is the whole protocol (``sd_notify(3)``).
    """

    name = "supervision"

    def __init__(self, reactor: Any) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        watchdog = int(os.environ.get("WATCHDOG_USEC", "0") or 0) / 1e6
        meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._every = watchdog / 2 if meant else 0.0
        self._loop = LoopingCall(self._notify, "WATCHDOG=1")
        self._loop.clock = reactor

    def ready(self) -> None:
        """Everything listens."""
        self._notify("READY=1")
        if self._every and self._address:
            self._loop.start(self._every)

    def stopping(self) -> None:
        """What is in flight is being finished."""
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
            log.warn("systemd cannot be told {state}: {error}", state=state, error=str(error))


class ReactorLagMonitor(Service):
    """Measures how late the reactor is: how long whatever is due has to wait."""

    name = "lag"
    EVERY = 1.0

    def __init__(self, reactor: Any, metrics: Metrics) -> None:
        self._reactor = reactor
        self._gauge = metrics.reactor_lag
        self._loop = LoopingCall(self._measure)
        self._loop.clock = reactor
        self._last = 0.0

    def startService(self) -> None:
        super().startService()
        self._last = self._reactor.seconds()
        self._loop.start(self.EVERY, now=False)

    def stopService(self) -> None:
        super().stopService()
        if self._loop.running:
            self._loop.stop()

    def _measure(self) -> None:
        now = self._reactor.seconds()
        self._gauge.set(max(0.0, now - self._last - self.EVERY))
        self._last = now
