# SPDX-License-Identifier: Apache-2.0
"""A dependency that is not waited for is asked again until it is well, whoever finds out that it is."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

from lotusguard.clients.dependency import Dependency, DependencyFailed
from lotusguard.clients.http import Answer
from lotusguard.metrics import Metrics


@implementer(IAgent)
class Moody:
    """Answers as its mood is: ``well``, ``ill`` (fails at once) or ``mute`` (answers when told to)."""

    def __init__(self) -> None:
        self.mood = "ill"
        self.asked = 0
        self.waiting: list[Deferred[IResponse]] = []

    def request(self, method: bytes, uri: bytes, headers: Any = None, bodyProducer: Any = None) -> Any:
        self.asked += 1
        if self.mood == "ill":
            raise ConnectionError
        waiter: Deferred[Any] = Deferred()
        if self.mood == "well":
            waiter.callback(_Empty())
        else:
            self.waiting.append(waiter)
        return waiter


class _Empty:
    """A response without a body."""

    code, headers, length = 200, Headers(), 0

    def deliverBody(self, protocol: Any) -> None:
        protocol.connectionLost(Failure(ResponseDone()))


def dependency() -> tuple[Dependency, Moody, Clock]:
    clock, agent = Clock(), Moody()
    made = Dependency("livekit", agent, clock, Metrics(), timeout=1.5)

    async def probe() -> None:
        await made.call(b"GET", b"/", Headers(), read=_code, wait=False)

    made.probe = probe
    return made, agent, clock


def _code(answer: Answer) -> int:
    return answer.code


def ask(asked: Dependency) -> Deferred[int]:
    return Deferred.fromCoroutine(asked.call(b"GET", b"/", Headers(), read=_code))


def fall_ill(asked: Dependency, agent: Moody) -> None:
    agent.mood = "ill"
    while not asked.breaker.open:
        failed: list[Any] = []
        ask(asked).addErrback(failed.append)
        assert failed[0].check(DependencyFailed)


def test_a_probe_finds_it_well_again_even_if_it_answers_at_once() -> None:
    livekit, agent, clock = dependency()
    for _ in range(3):
        fall_ill(livekit, agent)
        clock.advance(3)
        assert livekit.breaker.open
        agent.mood = "well"
        clock.advance(3)
        assert not livekit.breaker.open


@pytest.mark.parametrize("times", [1, 2, 3])
def test_it_is_probed_again_after_a_call_and_not_a_probe_found_it_well(times: int) -> None:
    """Else the breaker would stay open for ever, and nothing be enforced until the next restart."""
    livekit, agent, clock = dependency()
    for _ in range(times):
        agent.mood = "mute"
        under_way = ask(livekit)
        fall_ill(livekit, agent)
        agent.waiting.pop().callback(_Empty())  # type: ignore[arg-type]
        assert under_way.result == 200
        assert not livekit.breaker.open
        clock.advance(3)  # the probe that was due finds nothing to do
    fall_ill(livekit, agent)
    agent.mood = "well"
    clock.advance(3)
    assert not livekit.breaker.open


def test_nobody_is_probed_after_the_end() -> None:
    livekit, agent, clock = dependency()
    fall_ill(livekit, agent)
    livekit.stop()
    before = agent.asked
    clock.advance(60)
    assert agent.asked == before
    assert clock.getDelayedCalls() == []
