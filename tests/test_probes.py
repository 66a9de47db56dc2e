# SPDX-License-Identifier: Apache-2.0
"""Calls to a dependency: probes close its circuit, turns are fair, refused credentials and clock skew are reported."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.web.http import datetimeToString
from twisted.web.http_headers import Headers

from lotusguard.clients.circuit_breaker import FAILURES_TO_OPEN
from lotusguard.clients.clock_skew import clock_skew
from lotusguard.clients.dependency import (
    CALLS_AT_ONCE,
    CALLS_QUEUED,
    QUEUE_TIMEOUT,
    Dependency,
    DependencyFailed,
    DependencyRefused,
    TooManyCalls,
)
from lotusguard.clients.http import Answer
from lotusguard.metrics import Metrics
from tests.calls import logged, named

NOW = 1_790_000_000.25
AUTHORIZED = {b"Authorization": [b"Bearer x"]}


class Service:
    """Answers at once (``up``), refuses connections (``down``) or answers when the test says so (``silent``)."""

    def __init__(self) -> None:
        self.state = "up"
        self.response = Answer(200)
        self.paths: list[bytes] = []
        self.waiting: list[Deferred[Any]] = []

    def request(self, method: bytes, target: bytes, headers: Any = None, body: Any = None) -> Any:
        self.paths.append(target)
        if self.state == "down":
            raise ConnectionError
        waiter: Deferred[Any] = Deferred()
        if self.state == "up":
            waiter.callback(self.response)
        else:
            self.waiting.append(waiter)
        return waiter


class Setting:
    """A dependency with a probe, and a clock that the test advances."""

    def __init__(self) -> None:
        self.clock, self.service, self.metrics = Clock(), Service(), Metrics()
        agent: Any = self.service
        self.dependency = Dependency("livekit", agent, self.clock, self.metrics, timeout=1.5, wall_clock=lambda: NOW)

        async def probe() -> None:
            await self.dependency.call(b"GET", b"/probe", Headers(), read=_code, is_probe=True)

        self.dependency.probe = probe

    def call(self, path: bytes = b"/", turn: str = "", headers: Any = None, **more: Any) -> Deferred[int]:
        headers = Headers(AUTHORIZED if headers is None else headers)
        return Deferred.fromCoroutine(
            self.dependency.call(b"GET", path, headers, read=more.pop("read", _code), turn=turn, **more)
        )

    def open_circuit(self) -> None:
        self.service.state = "down"
        while not self.dependency.breaker.open:
            assert isinstance(outcome(self.call()), DependencyFailed)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"lotusguard_{name}", {"dependency": "livekit", **labels})


def _code(answer: Answer) -> int:
    return answer.code


def outcome(waiting: Deferred[Any]) -> Any:
    """The result or the exception of a Deferred; None while there is neither."""
    waiting.addErrback(lambda failure: failure.value)
    return waiting.result if waiting.called else None


@pytest.fixture
def setting() -> Setting:
    return Setting()


# -- probes --


def test_a_probe_closes_the_circuit_even_if_it_is_answered_at_once(setting: Setting) -> None:
    for _ in range(3):
        setting.open_circuit()
        setting.clock.advance(3)
        assert setting.dependency.breaker.open
        setting.service.state = "up"
        setting.clock.advance(3)
        assert not setting.dependency.breaker.open


@pytest.mark.parametrize("times", [1, 2, 3])
def test_probing_starts_again_after_a_call_closed_the_circuit(setting: Setting, times: int) -> None:
    """Otherwise the circuit would stay open until the next restart, and nothing would be enforced."""
    for _ in range(times):
        setting.service.state = "silent"
        in_flight = setting.call()
        setting.open_circuit()
        setting.service.waiting.pop().callback(Answer(200))
        assert outcome(in_flight) == 200
        assert not setting.dependency.breaker.open
        setting.clock.advance(3)  # the pending probe finds the circuit closed
    setting.open_circuit()
    setting.service.state = "up"
    setting.clock.advance(3)
    assert not setting.dependency.breaker.open


def test_nothing_is_probed_after_stop(setting: Setting) -> None:
    setting.open_circuit()
    setting.dependency.stop()
    before = len(setting.service.paths)
    setting.clock.advance(60)
    assert len(setting.service.paths) == before
    assert setting.clock.getDelayedCalls() == []


# -- what counts as a failure --


def test_calls_that_their_callers_give_up_open_the_circuit_if_they_were_slow(setting: Setting) -> None:
    setting.service.state = "silent"
    for _ in range(FAILURES_TO_OPEN):
        waiting = setting.call()
        setting.clock.advance(1)
        waiting.cancel()
        assert isinstance(outcome(waiting), CancelledError)
    assert setting.dependency.breaker.open


def test_calls_that_are_given_up_early_do_not_open_the_circuit(setting: Setting) -> None:
    setting.service.state = "silent"
    for _ in range(2 * FAILURES_TO_OPEN):
        waiting = setting.call()
        setting.clock.advance(0.5)
        waiting.cancel()
        assert isinstance(outcome(waiting), CancelledError)
    assert not setting.dependency.breaker.open


# -- turns --


def test_calls_for_one_room_do_not_delay_those_for_another(setting: Setting) -> None:
    setting.service.state = "silent"
    for _ in range(CALLS_AT_ONCE + 100):
        setting.call(b"/flood", turn="!flood")
    setting.call(b"/other", turn="!other")
    assert setting.service.paths == [b"/flood"] * CALLS_AT_ONCE
    setting.service.waiting[0].callback(Answer(200))
    setting.service.waiting[1].callback(Answer(200))
    assert setting.service.paths[CALLS_AT_ONCE:] == [b"/flood", b"/other"]


def test_a_full_queue_refuses_calls_and_leaves_the_circuit_closed(setting: Setting) -> None:
    setting.service.state = "silent"
    for _ in range(CALLS_AT_ONCE + CALLS_QUEUED):
        setting.call(turn="!flood")
    refused = [setting.call(turn="!flood") for _ in range(10)]
    assert all(isinstance(outcome(one), TooManyCalls) for one in refused)
    assert setting.metric("dependency_calls_total", outcome="queue_full") == 10
    assert not setting.dependency.breaker.open


def test_wait_for_a_turn_is_limited(setting: Setting) -> None:
    setting.dependency.timeout = 10 * QUEUE_TIMEOUT
    setting.service.state = "silent"
    for _ in range(CALLS_AT_ONCE):
        setting.call()
    waiting = setting.call()
    setting.clock.advance(QUEUE_TIMEOUT)
    assert isinstance(outcome(waiting), TooManyCalls)


# -- credentials --


def test_refused_credentials_are_reported_at_once_and_until_they_are_accepted(setting: Setting) -> None:
    with logged() as events:
        setting.service.response = Answer(401)
        for _ in range(2):
            assert isinstance(outcome(setting.call()), DependencyRefused)
        assert setting.dependency.refused == "status_401"
        setting.service.response = Answer(200)
        assert outcome(setting.call()) == 200
        assert setting.dependency.refused is None
    assert named(events, "credentials_refused") == ["livekit refuses our credentials: status_401"]
    assert named(events, "credentials_accepted") == ["livekit accepts our credentials again"]


def test_call_without_credentials_does_not_change_their_state(setting: Setting) -> None:
    setting.service.response = Answer(401)
    outcome(setting.call())
    setting.service.response = Answer(200)
    assert outcome(setting.call(headers={})) == 200
    assert setting.dependency.refused == "status_401"


def test_success_of_one_api_does_not_clear_the_refusal_of_another(setting: Setting) -> None:
    setting.service.response = Answer(403)
    outcome(setting.call(b"/_synapse/admin/v1/rooms"))
    setting.service.response = Answer(200)
    outcome(setting.call(b"/_matrix/client/v3/account/whoami"))
    assert setting.dependency.refused == "status_403"
    outcome(setting.call(b"/_synapse/admin/v1/rooms"))
    assert setting.dependency.refused is None


def test_a_refusal_that_is_expected_concerns_no_credentials(setting: Setting) -> None:
    setting.service.response = Answer(403)
    assert outcome(setting.call(expected=(403,))) == 403
    assert setting.dependency.refused is None


# -- clocks --


def test_date_header_of_answers_shows_clock_skew(setting: Setting) -> None:
    assert setting.dependency.skew is None
    for ahead in (-3600, 90, 0):
        setting.service.response = Answer(200, [(b"Date", datetimeToString(int(NOW) + ahead))])
        outcome(setting.call())
        assert setting.dependency.skew == pytest.approx(ahead, abs=1)
        assert setting.metric("clock_skew_seconds") == setting.dependency.skew
    assert setting.dependency.skew == 0


@pytest.mark.parametrize("date", [b"", b"yesterday", b"Sun, 06 Xxx 1994 08:49:37 GMT", b"\xff"])
def test_unreadable_date_header_is_ignored(date: bytes) -> None:
    assert clock_skew(date, NOW, NOW) is None


def test_duration_of_a_call_does_not_count_as_clock_skew() -> None:
    assert clock_skew(datetimeToString(NOW + 5), NOW, NOW + 10) == 0.0
