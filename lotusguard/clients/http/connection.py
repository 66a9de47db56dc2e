# SPDX-License-Identifier: Apache-2.0
"""One HTTP connection to a dependency."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
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


class State(Enum):
    """What a connection is doing."""

    UNUSED = "unused"
    WAITING = "waiting"
    """For the head of an answer."""
    READING = "reading"
    """The body of an answer."""
    CLOSED = "closed"
    """Closed, or about to be: whatever still arrives is ignored."""


@define(eq=False, slots=False)
class Connection(Protocol):
    """A connection to a dependency: one request after the other, never two at once.

    :param kept: called when an answer is complete and the next request can be sent.
    :param lost: called when no request can be sent any more.
    :ivar unused_since: when its last answer was complete, on the clock of the pool.
    :ivar closed: fires when the connection is closed.
    """

    _kept: Callable[[Connection], None]
    _lost: Callable[[Connection], None]
    unused_since: float = field(init=False, default=0.0)
    closed: Deferred[None] = field(init=False, factory=Deferred)
    _state: State = field(init=False, default=State.UNUSED)
    _used_before: bool = field(init=False, default=False)
    _has_body: bool = field(init=False, default=True)
    _waiting: Deferred[Answer] | None = field(init=False, default=None)
    _unfinished: Answer | None = field(init=False, default=None)
    _reader: Reader = field(init=False, factory=Reader)

    def ask(self, request: bytes, *, has_body: bool) -> Deferred[Answer]:
        """Send a request. Cancelled, it drops the connection.

        :param has_body: whether the answer may have a body; that to ``HEAD`` has none, whatever its head says.
        :return: fires when the head of the answer is here. Fails with ``ResponseNeverReceived`` (`StaleConnection`
            if the connection brought an answer before) if nothing arrives, and with ``ResponseFailed`` if what arrives
            is not a whole head.
        :raises RuntimeError: an answer is expected already, or the connection is closed.
        """
        if self._state is not State.UNUSED:
            raise RuntimeError(f"a request on a connection that is {self._state.value}")
        self._state, self._has_body = State.WAITING, has_body
        waiting = self._waiting = Deferred(lambda _: self.abort())
        self._transport.write(request)
        return waiting

    @property
    def _transport(self) -> Any:
        return self.transport

    def dataReceived(self, data: bytes) -> None:
        if self._state is State.CLOSED:
            return
        if self._state is State.UNUSED:
            self.abort()  # nobody asked for this
            return
        try:
            self._reader.feed(data)
        except Malformed:
            self._fail(Failure())
            self.abort()
            return
        if self._waiting is not None and self._reader.has_head:
            self._head_arrived(self._waiting)
        elif self._unfinished is not None:
            self._body_arrived(self._unfinished)

    def _head_arrived(self, waiting: Deferred[Answer]) -> None:
        reader, self._waiting = self._reader, None
        length: Any = UNKNOWN_LENGTH if reader.length is None else reader.length
        if not self._has_body:
            length, reader.parts, reader.complete, reader.keeps_open = 0, [], True, False
        parts, reader.parts = reader.parts, []
        answer = Answer(reader.code, reader.headers, phrase=reader.phrase, length=length, parts=parts, connection=self)
        if reader.complete:
            self._release()
            answer.end(DONE)
            waiting.callback(answer)
        else:
            self._state, self._unfinished = State.READING, answer
            waiting.callback(answer)
            answer.arrived([])

    def _body_arrived(self, answer: Answer) -> None:
        parts, self._reader.parts = self._reader.parts, []
        complete = self._reader.complete
        answer.arrived(parts)
        if complete:
            self._unfinished = None
            self._release()
            answer.end(DONE)

    def _release(self) -> None:
        """The answer is complete: let the next request be sent, or close the connection."""
        if self._state is State.CLOSED:
            return
        if self._reader.surplus or not self._reader.keeps_open:
            self.abort()
            return
        if self._state is State.READING:
            self.resume()
        self._reader.next()
        self._state, self._used_before = State.UNUSED, True
        self._kept(self)

    def _fail(self, reason: Failure) -> None:
        """The answer that is expected will not come, or not all of it."""
        waiting, self._waiting = self._waiting, None
        answer, self._unfinished = self._unfinished, None
        if waiting is not None:
            if self._reader.has_begun:
                waiting.errback(ResponseFailed([reason]))
            else:
                waiting.errback((StaleConnection if self._used_before else ResponseNeverReceived)([reason]))
        elif answer is not None:
            until_closed = self._reader.length is None and not self._reader.coding
            whole = until_closed and reason.check(ConnectionDone)
            answer.end(Failure(PotentialDataLoss() if whole else ResponseFailed([reason], answer)))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._state = State.CLOSED
        self._lost(self)
        self._fail(reason)
        self._reader.close()
        self.closed.callback(None)

    def pause(self) -> None:
        self._transport.pauseProducing()

    def resume(self) -> None:
        self._transport.resumeProducing()

    def abort(self) -> None:
        """Close the connection at once, without waiting for the other end: nothing that could still be sent or read is
        wanted."""
        self._state, self._waiting = State.CLOSED, None
        self._lost(self)
        self._transport.abortConnection()
