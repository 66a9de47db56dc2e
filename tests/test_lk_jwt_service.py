# SPDX-License-Identifier: Apache-2.0
"""How long upstream has for an answer, and what does not count towards that."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent
from zope.interface import implementer

from lotusguard.clients.http import Answer
from lotusguard.clients.lk_jwt_service import Forwarded, LkJwtService, UpstreamFailed
from lotusguard.metrics import Metrics

REQUEST = Forwarded(b"POST", b"/sfu/get", Headers(), b"{}")


class _Connection:
    open = True

    def loseConnection(self) -> None:
        self.open = False


class _Response:
    """An answer whose body comes when told to."""

    code, headers, length = 200, Headers(), 2

    def __init__(self) -> None:
        self.connection = _Connection()
        self.receiver: Any = None

    def deliverBody(self, receiver: Any) -> None:
        self.receiver = receiver
        receiver.makeConnection(self.connection)

    def finish(self) -> None:
        self.receiver.dataReceived(b"{}")
        self.receiver.connectionLost(Failure(ResponseDone()))


@implementer(IAgent)
class Upstream:
    """Refuses connections or takes requests, and sends heads when told to."""

    def __init__(self) -> None:
        self.refuses = False
        self.heads: list[Deferred[Any]] = []

    def request(self, method: bytes, uri: bytes, headers: Any = None, bodyProducer: Any = None) -> Any:
        head: Deferred[Any] = Deferred()
        if self.refuses:
            head.errback(ConnectionRefusedError())
        else:
            self.heads.append(head)
        return head


def authorizer() -> tuple[LkJwtService, Upstream, Clock]:
    clock, upstream = Clock(), Upstream()
    return LkJwtService(upstream, clock, Metrics(), timeout=15, grace=5), upstream, clock


def asked(guard: LkJwtService) -> Deferred[Answer]:
    return Deferred.fromCoroutine(guard.ask(REQUEST))


def brought(answer: Deferred[Answer]) -> Answer:
    answers: list[Answer] = []
    answer.addCallback(answers.append)
    return answers[0]


def code_of(failed: Deferred[Any]) -> int:
    errors: list[Failure] = []
    failed.addErrback(errors.append)
    error = errors[0].value
    assert isinstance(error, UpstreamFailed)
    return error.code


def test_head_and_body_of_an_answer_have_one_deadline() -> None:
    guard, upstream, clock = authorizer()
    answer, response = asked(guard), _Response()
    clock.advance(10)
    upstream.heads[0].callback(response)
    clock.advance(4.9)
    assert not answer.called
    assert response.connection.open
    clock.advance(0.2)
    assert code_of(answer) == 504
    assert not response.connection.open
    assert not clock.getDelayedCalls()


def test_an_answer_within_the_deadline_leaves_nothing_behind() -> None:
    guard, upstream, clock = authorizer()
    answer, response = asked(guard), _Response()
    upstream.heads[0].callback(response)
    clock.advance(14.9)
    response.finish()
    assert brought(answer).body == b"{}"
    assert not clock.getDelayedCalls()


def test_what_is_handed_on_as_it_comes_may_take_longer() -> None:
    guard, upstream, clock = authorizer()
    response = _Response()
    opened: list[Any] = []
    Deferred.fromCoroutine(guard.open(REQUEST)).addCallback(opened.append)
    upstream.heads[0].callback(response)
    clock.advance(100)
    assert opened == [response]
    assert response.connection.open


def test_being_held_while_upstream_restarts_does_not_count() -> None:
    guard, upstream, clock = authorizer()
    upstream.refuses = True
    answer, response = asked(guard), _Response()
    clock.pump([0.25] * 16)
    upstream.refuses = False
    clock.pump([0.25] * 3)
    clock.advance(14)  # longer than 15 s altogether
    upstream.heads[0].callback(response)
    response.finish()
    assert brought(answer).code == 200


def test_a_probe_reads_the_whole_answer_within_its_own_time() -> None:
    guard, upstream, clock = authorizer()
    probing = Deferred.fromCoroutine(guard.probe())
    response = _Response()
    upstream.heads[0].callback(response)
    clock.advance(2)
    failures: list[Failure] = []
    probing.addErrback(failures.append)
    assert [str(failure.value) for failure in failures] == ["upstream: timeout"]
    assert not response.connection.open
