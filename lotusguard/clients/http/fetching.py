# SPDX-License-Identifier: Apache-2.0
"""HTTP calls to dependencies: `fetch` makes one call and returns the whole answer, in bounded memory."""

from __future__ import annotations

from typing import Any, Protocol

import treq
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from lotusguard.clients.http.answer import Answer
from lotusguard.clients.json_answers import parse_json


class Agent(Protocol):
    """Makes requests to one address; see `FixedAgent.request`."""

    def request(
        self, method: bytes, target: bytes, headers: Headers | None = None, body: bytes | None = None
    ) -> Deferred[Answer]: ...


class BodyTooLarge(Exception):
    """An answer is longer than its limit."""


def fetch(
    agent: Agent, method: bytes, target: bytes, headers: Headers, body: bytes | None = None, *, limit: int
) -> Deferred[Answer]:
    """Make one call and return the whole answer. Cancelled, it drops the connection.

    A Deferred and no coroutine: each thing that a join awaits resumes all the coroutines around it.

    :param limit: bytes that the body of the answer may have. Fails with `BodyTooLarge` if it is longer.
    """
    return agent.request(method, target, headers, body).addCallback(whole, limit)


def whole(answer: Answer, limit: int) -> Answer | Deferred[Answer]:
    """The answer with its whole body, for the head of one; a callback. Cancelled, it drops the connection.

    :param limit: see `fetch`.
    """
    if answer.read_at_once():
        if len(answer.body) > limit:
            raise BodyTooLarge
        return answer
    parts: list[bytes] = []
    size = 0

    def part(chunk: bytes) -> None:
        nonlocal size
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge
        parts.append(chunk)

    def failed(reason: Failure) -> Failure:
        if reason.check(CancelledError):
            answer.loseConnection()  # treq would read a body that never ends for ever
        return reason

    def complete(_: None) -> Answer:
        answer.body = b"".join(parts)
        return answer

    return treq.collect(answer, part).addCallbacks(complete, failed)


def json_object(answer: Answer) -> dict[str, Any]:
    """The JSON object in an answer. :raises ValueError: the body is not a JSON object."""
    content = parse_json(answer.body)
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
