# SPDX-License-Identifier: Apache-2.0
"""An idle connection to LiveKit, which shows at once that LiveKit ended, and when it is back.

After a crash LiveKit's clients try again within a second. Asking every few seconds would be too late for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import urlsplit

from attrs import define, field
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.waiting import run_in_background

SOON = 0.02
"""Seconds between two attempts to connect while LiveKit restarts."""
LATER = 2.0
"""The same once that takes long, or if connections do not last."""
ATTEMPTS_SOON = 1500
SHORT_LIVED = 5.0
"""Seconds. Something between us that closes idle connections sooner than this is not asked all the time."""
CONNECT_TIMEOUT = 5.0
NOT_READY = (0.05, 0.2, 0.5, 1.0)
"""Seconds until ``returned`` is called again, each time that it failed because LiveKit is not ready."""
_ADDRESS_DELAY = 0.01
"""Seconds between attempts at two addresses of a name; also how long it takes to see that there is only one."""


@define(eq=False)
class _Idle(Protocol):
    """:ivar lost: fires when the connection is closed."""

    lost: Deferred[None] = field(factory=Deferred, init=False)

    def connectionLost(self, reason: Failure | None = None) -> None:
        lost, self.lost = self.lost, Deferred()
        lost.callback(None)


@define(slots=False, eq=False)
class LiveKitLink(Service):
    """Keeps the connection.

    :param url: LiveKit's.
    :param returned: called when there is a connection again after an attempt failed. A connection that was only closed,
        as proxies do with idle ones, says nothing about LiveKit.
    :param failed: called with the Failure of ``returned``.
    :ivar attempts: to connect that failed since there was a connection.
    """

    _reactor: Any
    _url: str
    _returned: Callable[[], Awaitable[None]]
    _failed: Callable[[Failure], None]
    attempts: int = field(default=0, init=False)
    _kept: Deferred[None] | None = field(default=None, init=False)
    _telling: Deferred[object] | None = field(default=None, init=False)

    def startService(self) -> None:
        super().startService()
        self._kept = Deferred.fromCoroutine(self._keep())
        self._kept.addErrback(lambda failure: None if failure.check(CancelledError) else self._failed(failure))

    def stopService(self) -> None:
        super().stopService()
        for work in (self._kept, self._telling):
            if work is not None:
                work.cancel()

    async def _keep(self) -> None:
        address = urlsplit(self._url)
        port = address.port or (443 if address.scheme == "https" else 80)
        endpoint = HostnameEndpoint(
            self._reactor, address.hostname or "", port, timeout=CONNECT_TIMEOUT, attemptDelay=_ADDRESS_DELAY
        )
        factory = Factory.forProtocol(_Idle)
        factory.noisy = False  # it would log each attempt
        seen = False
        while True:
            try:
                idle = cast(_Idle, await endpoint.connect(factory))
            except ConnectingCancelledError:
                return
            except (ConnectError, DNSLookupError, OSError):
                if not self.running:  # it was stopped while this attempt was failing, which hides that it was cancelled
                    return
                self.attempts += 1
                await deferLater(self._reactor, SOON if seen and self.attempts <= ATTEMPTS_SOON else LATER)
                continue
            if seen and self.attempts:
                if self._telling is not None:
                    self._telling.cancel()
                self._telling = run_in_background(self._tell(), self._failed)
            seen, self.attempts, began = True, 0, self._reactor.seconds()
            try:
                await idle.lost
            finally:
                if idle.transport is not None:
                    idle.transport.loseConnection()
            if self._reactor.seconds() - began < SHORT_LIVED:
                await deferLater(self._reactor, LATER)

    async def _tell(self) -> None:
        """It may accept connections a moment before it answers."""
        for pause in NOT_READY:
            try:
                await self._returned()
            except DependencyFailed:
                await deferLater(self._reactor, pause)
            else:
                return
        await self._returned()
