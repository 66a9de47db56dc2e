# SPDX-License-Identifier: Apache-2.0
"""A door's life: it opens with the service, and closes without dropping what is being answered. Floor: web."""

from __future__ import annotations

from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.task import deferLater
from twisted.logger import Logger

from lotusguard.web.site import GuardSite

log = Logger()

FLUSHING = 1.0
"""Seconds for which callers may take in the last bytes before we hang up for good."""


class CannotListen(SystemExit):
    """The door cannot be opened; ends the process with one line."""


class Listener(Service):
    """A site on an endpoint.

    :param endpoint: as ``twisted.internet.endpoints.serverFromString`` takes it, so ``systemd:`` and ``unix:`` too.
    :param setting: the setting to name when the endpoint cannot be listened on.
    """

    port: IListeningPort | None = None

    def __init__(self, name: str, endpoint: str, setting: str, site: GuardSite, reactor: Any) -> None:
        self.name = name
        self._description = endpoint
        self._setting = setting
        self._site = site
        self._reactor = reactor
        self._opening: Deferred[IListeningPort] | None = None

    def privilegedStartService(self) -> None:
        """Listen, while we may still have the privilege to."""
        try:
            endpoint = serverFromString(self._reactor, self._description)
        except (ValueError, LookupError) as error:
            raise CannotListen(f"lotusguard: {self._setting}: {self._description!r} is no endpoint ({error})") from None
        failed: list[BaseException] = []
        self._opening = endpoint.listen(self._site)
        self._opening.addCallbacks(self._opened, lambda failure: failed.append(failure.value))
        if failed:
            reason = failed[0].socketError if isinstance(failed[0], CannotListenError) else failed[0]
            raise CannotListen(f"lotusguard: {self._setting}: cannot listen on {self._description}: {reason}")

    def startService(self) -> None:
        super().startService()
        if self._opening is None:
            self.privilegedStartService()

    def _opened(self, port: IListeningPort) -> IListeningPort:
        self.port = port
        log.info(
            "{name} listens on {address}", name=self.name, address=_readable(port.getHost()), event_name="listening"
        )
        return port

    async def close(self, patience: float) -> None:
        """Accept nobody any more, let what is being answered be answered, then hang up.

        :param patience: seconds after which we hang up on whoever still waits.
        """
        super().stopService()
        if self.port is not None:
            await stopped(self.port)
            self.port = None
        self._site.closing = True
        empty = Deferred.fromCoroutine(self._site.emptied())
        try:
            await empty.addTimeout(patience, self._reactor)
        except (TimeoutError, CancelledError):
            log.warn("hanging up on {n} callers who still wait", n=len(self._site.channels), event_name="drained_out")
        for channel in list(self._site.channels):
            channel.loseConnection()
        end = self._reactor.seconds() + FLUSHING
        while self._site.channels and self._reactor.seconds() < end:
            await deferLater(self._reactor, 0.01)
        for channel in list(self._site.channels):
            channel.forceAbortClient()


async def stopped(port: IListeningPort) -> None:
    """Stop listening."""
    stopping = port.stopListening()
    if stopping is not None:
        await stopping


def _readable(address: Any) -> str:
    return f"{address.host}:{address.port}" if hasattr(address, "port") else str(getattr(address, "name", address))
