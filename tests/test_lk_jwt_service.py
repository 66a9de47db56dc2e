# SPDX-License-Identifier: Apache-2.0
"""Timeouts of requests to upstream, and how the probe recognises lk-jwt-service."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers

from lotusguard.clients.http import Answer
from lotusguard.clients.lk_jwt_service import Forwarded, LkJwtService, UpstreamFailed
from lotusguard.metrics import Metrics

REQUEST = Forwarded(b"POST", b"/sfu/get", Headers(), b"{}")


class _Connection:
    open = True

    def abort(self) -> None:
        self.open = False

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class _Response:
    """An answer whose body the test sends."""

    def __init__(self) -> None:
        self.connection = _Connection()
        connection: Any = self.connection
        self.answer = Answer(200, length=2, connection=connection)

    def finish(self) -> None:
        self.answer.arrived([b"{}"])
        self.answer.end(Failure(ResponseDone()))


class Upstream:
    """Refuses connections, or takes requests whose heads the test answers."""

    def __init__(self) -> None:
        self.refuses = False
        self.heads: list[Deferred[Any]] = []
        self.requests: list[tuple[bytes, bytes, Headers]] = []

    def request(self, method: bytes, target: bytes, headers: Any = None, body: Any = None) -> Any:
        head: Deferred[Any] = Deferred()
        self.requests.append((method, target, headers))
        if self.refuses:
            head.errback(ConnectionRefusedError())
        else:
            self.heads.append(head)
        return head


def service() -> tuple[LkJwtService, Upstream, Clock]:
    clock, upstream = Clock(), Upstream()
    return LkJwtService(upstream, clock, Metrics(), timeout=15, grace=5), upstream, clock


def asked(guard: LkJwtService, deadline: float | None = None) -> Deferred[Answer]:
    return Deferred.fromCoroutine(guard.ask(REQUEST, deadline))


def result_of(answer: Deferred[Answer]) -> Answer:
    answers: list[Answer] = []
    answer.addCallback(answers.append)
    return answers[0]


def code_of(failed: Deferred[Any]) -> int:
    errors: list[Failure] = []
    failed.addErrback(errors.append)
    error = errors[0].value
    assert isinstance(error, UpstreamFailed)
    return error.code


def test_head_and_body_of_an_answer_share_one_timeout() -> None:
    guard, upstream, clock = service()
    answer, response = asked(guard), _Response()
    clock.advance(10)
    upstream.heads[0].callback(response.answer)
    clock.advance(4.9)
    assert not answer.called
    assert response.connection.open
    clock.advance(0.2)
    assert code_of(answer) == 504
    assert not response.connection.open
    assert not clock.getDelayedCalls()


def test_answer_in_time_leaves_no_timer_behind() -> None:
    guard, upstream, clock = service()
    answer, response = asked(guard), _Response()
    upstream.heads[0].callback(response.answer)
    clock.advance(14.9)
    response.finish()
    assert result_of(answer).body == b"{}"
    assert not clock.getDelayedCalls()


def test_body_that_is_relayed_may_take_longer() -> None:
    guard, upstream, clock = service()
    response = _Response()
    opened: list[Any] = []
    Deferred.fromCoroutine(guard.open(REQUEST)).addCallback(opened.append)
    upstream.heads[0].callback(response.answer)
    clock.advance(100)
    assert opened == [response.answer]
    assert response.connection.open


def test_without_a_deadline_the_time_held_while_upstream_restarts_does_not_count() -> None:
    guard, upstream, clock = service()
    upstream.refuses = True
    answer, response = asked(guard), _Response()
    clock.pump([0.25] * 16)
    upstream.refuses = False
    clock.pump([0.25] * 3)
    clock.advance(14)  # longer than 15 s altogether
    upstream.heads[0].callback(response.answer)
    response.finish()
    assert result_of(answer).code == 200


def test_deadline_ends_an_attempt_before_its_timeout() -> None:
    guard, _, clock = service()
    answer = asked(guard, deadline=4)
    clock.advance(3.9)
    assert not answer.called
    clock.advance(0.2)
    assert code_of(answer) == 504
    assert not clock.getDelayedCalls()


def test_timeout_ends_an_attempt_before_its_deadline() -> None:
    guard, _, clock = service()
    answer = asked(guard, deadline=100)
    clock.advance(15.1)
    assert code_of(answer) == 504


def test_time_for_which_a_request_is_held_counts_towards_the_deadline() -> None:
    guard, upstream, clock = service()
    upstream.refuses = True
    answer = asked(guard, deadline=4.5)
    clock.pump([0.25] * 16)
    upstream.refuses = False
    clock.pump([0.25])
    assert len(upstream.heads) == 1
    assert not answer.called
    clock.advance(0.3)
    assert code_of(answer) == 504


def test_request_is_not_held_beyond_its_deadline() -> None:
    guard, upstream, clock = service()
    upstream.refuses = True
    answer = asked(guard, deadline=2)
    clock.pump([0.1] * 20)
    assert code_of(answer) == 502
    assert clock.seconds() < 2.1


def test_nothing_is_sent_once_the_deadline_has_passed() -> None:
    guard, upstream, clock = service()
    clock.advance(10)
    assert code_of(asked(guard, deadline=10)) == 504
    assert upstream.heads == []


PREFLIGHT = {"Access-Control-Allow-Methods": ["POST"]}


def probed(code: int, headers: dict[str, list[str]]) -> list[str]:
    """The failure of a probe that got this answer; None if it passed."""
    guard, upstream, _ = service()
    probing = Deferred.fromCoroutine(guard.probe())
    raw = [(name.encode(), value.encode()) for name, values in headers.items() for value in values]
    upstream.heads[0].callback(Answer(code, raw))
    failures: list[str] = []
    probing.addErrback(lambda failure: failures.append(str(failure.value)))
    assert probing.called
    return failures


def test_probe_requires_the_preflight_headers_of_the_token_route() -> None:
    assert probed(200, PREFLIGHT) == []
    for code, headers in (
        (200, {}),
        (404, PREFLIGHT),
        (405, {}),
        (200, {"Access-Control-Allow-Methods": ["GET, POST"]}),
    ):
        assert probed(code, headers) == ["upstream: not_lk_jwt_service"]


def test_probe_distinguishes_a_loop_from_a_wrong_service() -> None:
    assert probed(502, {"Via": ["1.1 lotusguard"]}) == ["upstream: loop"]
    assert probed(200, PREFLIGHT | {"Via": ["1.1 proxy, 1.1 lotusguard"]}) == ["upstream: loop"]
    assert probed(200, PREFLIGHT | {"Via": ["1.1 proxy"]}) == []


def test_probe_asks_for_the_preflight_and_carries_the_marker() -> None:
    guard, upstream, clock = service()
    probing = Deferred.fromCoroutine(guard.probe())
    assert [(method, target) for method, target, _ in upstream.requests] == [(b"OPTIONS", b"/sfu/get")]
    assert upstream.requests[0][2].getRawHeaders(b"via") == [b"1.1 lotusguard"]
    clock.advance(3)
    probing.addErrback(lambda failure: None)


def test_probe_reads_the_whole_answer_within_its_own_time() -> None:
    guard, upstream, clock = service()
    probing = Deferred.fromCoroutine(guard.probe())
    response = _Response()
    upstream.heads[0].callback(response.answer)
    clock.advance(2)
    failures: list[Failure] = []
    probing.addErrback(failures.append)
    assert [str(failure.value) for failure in failures] == ["upstream: timeout"]
    assert not response.connection.open
