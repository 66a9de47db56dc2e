# SPDX-License-Identifier: Apache-2.0
"""HTTP calls to dependencies: `fetch` makes one call and returns the whole answer, in bounded memory."""

from __future__ import annotations

from typing import Any, cast

import treq
from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from lotusguard.clients.fixed_agent import IDLE_CONNECTIONS, FixedAgent, StaleConnection, connection_pool
from lotusguard.clients.json_answers import parse_json

__all__ = [
    "IDLE_CONNECTIONS",
    "Answer",
    "BodyTooLarge",
    "BytesBody",
    "FixedAgent",
    "StaleConnection",
    "answer_of",
    "collected",
    "connection_pool",
    "fetch",
    "json_object",
]


class BodyTooLarge(Exception):
    """An answer is longer than its limit."""


@frozen
class Answer:
    """A complete HTTP answer."""

    code: int
    headers: Headers
    body: bytes = field(repr=False)


def fetch(
    agent: IAgent, method: bytes, target: bytes, headers: Headers, body: bytes | None = None, *, limit: int
) -> Deferred[Answer]:
    """Make one call and return the whole answer. Cancelled, it drops the connection.

    A Deferred and no coroutine: each thing that a join awaits resumes all the coroutines around it.

    :param agent: takes request targets (`FixedAgent`).
    :param limit: bytes that the body of the answer may have. Fails with `BodyTooLarge` if it is longer; the connection
        is dropped.
    """
    asked = agent.request(method, target, headers, None if body is None else BytesBody(body))
    return asked.addCallback(answer_of, limit)


def answer_of(response: IResponse, limit: int) -> Deferred[Answer]:
    """The whole answer, for the head of one. See `fetch`."""
    return collected(response, limit).addCallback(lambda body: Answer(response.code, response.headers, body))


@implementer(IBodyProducer)
class BytesBody:
    """A request body that is in memory."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.length = len(body)

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(self.body)
        done: Deferred[None] = Deferred()
        done.callback(None)
        return done

    def pauseProducing(self) -> None: ...
    def resumeProducing(self) -> None: ...
    def stopProducing(self) -> None: ...


def collected(response: IResponse, limit: int) -> Deferred[bytes]:
    """The whole body of a response. Cancelled, it drops the connection.

    :param limit: bytes. Fails with `BodyTooLarge` if there are more; the connection is dropped.
    """
    parts: list[bytes] = []
    size = 0
    abortable = _Abortable(response)

    def part(chunk: bytes) -> None:
        nonlocal size
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge
        parts.append(chunk)

    def failed(reason: Failure) -> Failure:
        if reason.check(CancelledError):
            abortable.abort()
        return reason

    return treq.collect(cast(IResponse, abortable), part).addCallbacks(lambda _: b"".join(parts), failed)


class _Abortable:
    """A response whose delivery can be aborted. treq would read a body that never ends for ever."""

    def __init__(self, response: IResponse) -> None:
        self._response = response
        self.length = response.length
        self._receiver: Any = None

    def deliverBody(self, receiver: Any) -> None:
        self._receiver = receiver
        self._response.deliverBody(receiver)

    def abort(self) -> None:
        transport = getattr(self._receiver, "transport", None)
        if transport is not None:
            transport.loseConnection()


def json_object(answer: Answer) -> dict[str, Any]:
    """The JSON object in an answer. :raises ValueError: the body is not a JSON object."""
    content = parse_json(answer.body)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
