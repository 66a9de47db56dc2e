# SPDX-License-Identifier: Apache-2.0
"""Connections that are kept open until the next request."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IDelayedCall

from lotusguard.clients.http.connection import Connection

IDLE_CONNECTIONS = 512
"""Connections kept open to one address. With fewer, most calls in a burst of joins open a new connection, which costs a
third of a join."""
IDLE_TIMEOUT = 30.0
"""Seconds for which an unused connection stays open."""

Address = tuple[bytes, bytes, int]
"""Scheme, host and port."""


@define(eq=False)
class ConnectionPool:
    """The unused connections of all clients of one service. The one that was used last is used first.

    :param at_most: connections kept open to one address.
    """

    _reactor: Any
    _at_most: int = IDLE_CONNECTIONS
    _unused: dict[Address, list[Connection]] = field(init=False, factory=dict)
    _closed: bool = field(init=False, default=False)
    _expiring: IDelayedCall | None = field(init=False, default=None)

    def take(self, address: Address) -> Connection | None:
        """A connection for a request, which nobody else gets until `keep`."""
        unused = self._unused.get(address)
        return unused.pop() if unused else None

    def keep(self, address: Address, connection: Connection) -> None:
        """Take back a connection that can be used again."""
        unused = self._unused.setdefault(address, [])
        if self._closed or len(unused) >= self._at_most:
            connection.abort()
            return
        connection.unused_since = self._reactor.seconds()
        unused.append(connection)
        if self._expiring is None:
            self._expiring = self._reactor.callLater(IDLE_TIMEOUT, self._expire)

    def forget(self, address: Address, connection: Connection) -> None:
        """A connection was closed."""
        unused = self._unused.get(address, [])
        if connection in unused:
            unused.remove(connection)

    def _expire(self) -> None:
        """Close what has been unused for too long; look again when the next one will have been."""
        self._expiring = None
        now = self._reactor.seconds()
        for unused in self._unused.values():
            while unused and unused[0].unused_since + IDLE_TIMEOUT <= now:
                unused[0].abort()
        oldest = min((unused[0].unused_since for unused in self._unused.values() if unused), default=None)
        if oldest is not None:
            self._expiring = self._reactor.callLater(oldest + IDLE_TIMEOUT - now, self._expire)

    async def close(self) -> None:
        """Close all unused connections, and wait until they are closed. Those that are in use are closed after their
        answer."""
        self._closed = True
        if self._expiring is not None:
            self._expiring.cancel()
            self._expiring = None
        closing = [connection for unused in self._unused.values() for connection in unused]
        for connection in closing:
            connection.abort()
        for connection in closing:
            await connection.closed
