# SPDX-License-Identifier: Apache-2.0
"""Listening: starts with the service, and stops without dropping requests that are being answered."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any

from attrs import define, field
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
"""Seconds for which callers may read the last bytes before their connections are aborted."""


class CannotListen(SystemExit):
    """A listener cannot listen; ends the process with one line."""


@define(slots=False, eq=False)
class Listener(Service):
    """A site on an endpoint.

    :param name: for logs.
    :param endpoints: as ``twisted.internet.endpoints.serverFromString`` takes them, so also ``systemd:`` and ``unix:``.
    :param setting: the setting to name when the endpoint cannot be listened on.
    """

    name: str
    _endpoints: Sequence[str]
    _setting: str
    site: GuardSite
    _reactor: Any
    ports: list[IListeningPort] = field(init=False, factory=list)
    _begun: bool = field(init=False, default=False)

    @property
    def port(self) -> IListeningPort | None:
        """The first port; ``None`` while it does not listen."""
        return self.ports[0] if self.ports else None

    @property
    def place(self) -> str:
        """The host's name and the port, or the socket's path: it tells several guards apart. "" while it is closed."""
        if self.port is None:
            return ""
        address = self.port.getHost()
        where = address.port if hasattr(address, "port") else os.fsdecode(getattr(address, "name", None) or b"")
        return f"{socket.gethostname()}:{where}"

    def privilegedStartService(self) -> None:
        """Listen while the process may still have the privilege to."""
        self._begun = True
        for endpoint in self._endpoints:
            self._listen(endpoint)

    def _listen(self, description: str) -> None:
        try:
            endpoint = serverFromString(self._reactor, description)
        except (ValueError, LookupError) as error:
            raise CannotListen(f"lotusguard: {self._setting}: {description!r} is not an endpoint ({error})") from None
        failed: list[BaseException] = []
        opening = endpoint.listen(self.site)
        opening.addCallbacks(self._opened, lambda failure: failed.append(failure.value))
        if failed:
            reason = failed[0].socketError if isinstance(failed[0], CannotListenError) else failed[0]
            no_address = isinstance(reason, socket.gaierror) or getattr(reason, "errno", 0) == errno.EADDRNOTAVAIL
            setting = self._setting.replace("_PORT", "_HOST") if no_address else self._setting
            raise CannotListen(f"lotusguard: {setting}: cannot listen on {description}: {reason}")

    def startService(self) -> None:
        super().startService()
        if not self._begun:
            self.privilegedStartService()

    def _opened(self, port: IListeningPort) -> IListeningPort:
        self.ports.append(port)
        log.info(
            "{name} listens on {address}", name=self.name, address=_readable(port.getHost()), event_name="listening"
        )
        return port

    async def close(self, patience: float) -> None:
        """Stop accepting, let requests in flight be answered, then close all connections.

        :param patience: seconds after which connections are closed even if a request is not answered.
        """
        super().stopService()
        while self.ports:
            await stopped(self.ports.pop())
        self.site.closing = True
        empty = Deferred.fromCoroutine(self.site.emptied())
        try:
            await empty.addTimeout(patience, self._reactor)
        except (TimeoutError, CancelledError):
            log.warn(
                "closing {n} connections with requests that are not answered",
                n=len(self.site.channels),
                event_name="drained_out",
            )
        for channel in list(self.site.channels):
            channel.loseConnection()
        end = self._reactor.seconds() + FLUSHING
        while self.site.channels and self._reactor.seconds() < end:
            await deferLater(self._reactor, 0.01)
        for channel in list(self.site.channels):
            channel.forceAbortClient()


async def stopped(port: IListeningPort) -> None:
    """Stop listening."""
    stopping = port.stopListening()
    if stopping is not None:
        await stopping


def _readable(address: Any) -> str:
    return f"{address.host}:{address.port}" if hasattr(address, "port") else str(getattr(address, "name", address))
