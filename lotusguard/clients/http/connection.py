# SPDX-License-Identifier: Apache-2.0
"""One HTTP connection to a dependency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import Factory, define
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import UNKNOWN_LENGTH

from lotusguard.clients.http.answer import DONE, Answer
from lotusguard.clients.http.reader import Malformed, Reader


class StaleConnection(ResponseNeverReceived):
    """A connection that had been kept open was closed before it brought an answer: its other end may have closed it
    before it saw the request."""


@define(eq=False, slots=False)
class Connection(Protocol):
    """A connection to a dependency: one request after the other, never two at once.

    :param kept: called when an answer is complete and the next request can be sent.
    :param lost: called when the connection is closed.
    :ivar unused_since: when its last answer was complete, on the clock of whoever keeps it.
    """

    _kept: Callable[[Connection], None]
    _lost: Callable[[Connection], None]
    unused_since: float = 0.0
    _used: bool = False
    _heard: bool = False
    _has_body: bool = True
    _waiting: Deferred[Answer] | None = None
    _unfinished: Answer | None = None
    _aborted: bool = False
    _open: bool = True
    _closed: Deferred[None] | None = None
    _reader: Reader = Factory(Reader)

    def ask(self, request: bytes, *, has_body: bool) -> Deferred[Answer]:
        """Send a request. Cancelled, it drops the connection.

        :param has_body: whether the answer may have a body; that to ``HEAD`` has none, whatever its head says.
        :return: fires when the head of the answer is here. Fails with ``ResponseNeverReceived`` (`StaleConnection`
            if the connection brought an answer before) if nothing arrives, and with ``ResponseFailed`` if what arrives
            is not a whole head.
        """
        self._has_body, self._heard = has_body, False
        waiting = self._waiting = Deferred(self._give_up)
        self._transport.write(request)
        return waiting

    @property
    def _transport(self) -> Any:
        return self.transport

    def _give_up(self, _: Deferred[Answer]) -> None:
        self._waiting = None
        self.abort()

    def dataReceived(self, data: bytes) -> None:
        if self._aborted:
            return
        if self._waiting is None and self._unfinished is None:
            self._lost(self)  # nobody asked for this, or nobody wants it any more
            self.abort()
            return
        self._heard = True
        try:
            self._reader.feed(data)
        except Malformed:
            self._fail(Failure())
            self.abort()
            return
        if self._waiting is not None:
            if self._reader.has_head:
                self._head_arrived(self._waiting)
        elif self._unfinished is not None:
            self._body_arrived(self._unfinished)

    def _head_arrived(self, waiting: Deferred[Answer]) -> None:
        """The head is here."""
        reader = self._reader
        length: Any = UNKNOWN_LENGTH if reader.length is None else reader.length
        if not self._has_body:
            length, reader.parts, reader.complete, reader.surplus = 0, [], True, True
        answer = Answer(
            reader.code, reader.headers, phrase=reader.phrase, length=length, parts=reader.parts, connection=self
        )
        self._waiting = None
        if reader.complete:
            answer.end(DONE)
            self._release()
            waiting.callback(answer)
            return
        reader.parts, self._unfinished = [], answer
        waiting.callback(answer)
        answer.arrived([])

    def _body_arrived(self, answer: Answer) -> None:
        """More of the body is here."""
        parts, self._reader.parts = self._reader.parts, []
        complete = self._reader.complete
        answer.arrived(parts)
        if complete:
            self._unfinished = None
            self._release()
            answer.end(DONE)

    def _release(self) -> None:
        """The answer is complete: let the next request be sent, or close the connection."""
        if self._aborted:
            return
        if self._reader.surplus or not self._reader.keeps_open:
            self.close()
            return
        self._reader.next()
        self._used = True
        self.resume()
        self._kept(self)

    def _fail(self, reason: Failure) -> None:
        """Whoever waits for an answer, or for the rest of one, gets no more."""
        waiting, self._waiting = self._waiting, None
        answer, self._unfinished = self._unfinished, None
        if waiting is not None:
            if self._heard:
                waiting.errback(ResponseFailed([reason]))
            else:
                waiting.errback((StaleConnection if self._used else ResponseNeverReceived)([reason]))
        elif answer is not None:
            until_closed = self._reader.length is None and not self._reader.coding
            whole = until_closed and reason.check(ConnectionDone)
            answer.end(Failure(PotentialDataLoss() if whole else ResponseFailed([reason], answer)))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._fail(reason)
        self._reader.close()
        self._lost(self)
        self._open = False
        if self._closed is not None:
            self._closed.callback(None)

    def close(self) -> None:
        """Close the connection when everything is sent."""
        self._transport.loseConnection()

    def closed(self) -> Deferred[None]:
        """Fires when the connection is closed."""
        if not self._open:
            return succeed(None)
        if self._closed is None:
            self._closed = Deferred()
        return self._closed

    def pause(self) -> None:
        self._transport.pauseProducing()

    def resume(self) -> None:
        self._transport.resumeProducing()

    def abort(self) -> None:
        """Close the connection at once, whatever was to be sent or read."""
        self._aborted = True
        self._transport.abortConnection()
