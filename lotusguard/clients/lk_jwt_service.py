# SPDX-License-Identifier: Apache-2.0
"""lk-jwt-service, our upstream: what comes in is handed to it as it came. Floor: clients."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from attrs import frozen
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.error import ConnectError, ConnectionDone, ConnectionLost, DNSLookupError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.web.client import ResponseNeverReceived
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.http import Answer, BodyTooLarge, BytesBody, collected
from lotusguard.metrics import Metrics

T = TypeVar("T")

TOKEN_ANSWER_LIMIT = 1024 * 1024
"""Bytes that an answer with a token may have."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.5
"""Seconds between two tries while connections are refused."""
PROBE_TIMEOUT = 2.0
STALE_TRIES = 3
"""Kept-alive connections that may turn out to be dead before it is upstream who hangs up."""


class UpstreamFailed(Exception):
    """No answer. ``code`` is what the caller is to be told: 502 not reachable, 504 not in time."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@frozen
class Forwarded:
    """A request as it goes on.

    :ivar target: the raw request target, undecoded, query and all.
    """

    method: bytes
    target: bytes
    headers: Headers
    body: bytes | None


class LkJwtService:
    """Upstream.

    :param agent: takes request targets (`FixedAgent`).
    :param timeout: seconds for an answer: a whole one for `ask`, its head for `open`.
    :param grace: seconds for which a request is held while connections are refused.
    """

    def __init__(self, agent: IAgent, clock: IReactorTime, metrics: Metrics, *, timeout: float, grace: float) -> None:
        self._agent = agent
        self._clock = clock
        self._timeout = timeout
        self._grace = grace
        self._seconds = metrics.dependency_seconds.labels("upstream")
        self._answered = metrics.dependency_calls.labels("upstream", "ok")
        self._unanswered = metrics.dependency_calls.labels("upstream", "failed")

    async def ask(self, request: Forwarded) -> Answer:
        """Forward a request and wait for the whole answer. :raises UpstreamFailed:"""
        return await self._asked(request, self._whole)

    async def open(self, request: Forwarded) -> IResponse:
        """Forward a request and wait for the head of the answer; its body is the caller's to read.

        :raises UpstreamFailed:
        """
        return await self._asked(request, self._send)

    async def _asked(self, request: Forwarded, attempt: Callable[[Forwarded], Coroutine[Any, Any, T]]) -> T:
        """Make an attempt, and others where that harms nobody.

        While connections are refused (it is restarting) the request is held. A kept-alive connection that upstream
        had closed meanwhile is not the caller's affair: the request goes out again on another.
        """
        began = self._clock.seconds()
        pause, stale = FIRST_PAUSE, 0
        while True:
            try:
                outcome = await Deferred.fromCoroutine(attempt(request)).addTimeout(self._timeout, self._clock)
            except (CancelledError, UpstreamFailed):
                raise
            except TimeoutError:
                raise self._failed(504, "timeout") from None
            except (ConnectError, DNSLookupError, OSError):
                if self._clock.seconds() + pause > began + self._grace:
                    raise self._failed(502, "unreachable") from None
                await deferLater(self._clock, pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            except ResponseNeverReceived as never:
                hung_up = all(reason.check(ConnectionDone, ConnectionLost) for reason in never.reasons)
                stale += 1
                if not hung_up or stale >= STALE_TRIES:
                    raise self._failed(502, "hung_up") from None
            except Exception:
                raise self._failed(502, "invalid_response") from None
            else:
                self._seconds.observe(self._clock.seconds() - began)
                self._answered.inc()
                return outcome

    async def _send(self, request: Forwarded) -> IResponse:
        producer = None if request.body is None else BytesBody(request.body)
        return await self._agent.request(request.method, request.target, request.headers, producer)

    async def _whole(self, request: Forwarded) -> Answer:
        response = await self._send(request)
        try:
            return Answer(response.code, response.headers, await collected(response, TOKEN_ANSWER_LIMIT))
        except CancelledError:
            raise
        except BodyTooLarge:
            raise self._failed(502, "too_large") from None
        except Exception:
            raise self._failed(502, "truncated") from None

    async def probe(self) -> None:
        """See whether it answers at all. :raises DependencyFailed: it does not, with the reason."""
        asked = Deferred.fromCoroutine(self._whole(Forwarded(b"GET", b"/healthz", Headers(), None)))
        try:
            await asked.addTimeout(PROBE_TIMEOUT, self._clock)
        except CancelledError:
            raise
        except TimeoutError:
            raise DependencyFailed("upstream", "timeout") from None
        except Exception:
            raise DependencyFailed("upstream", "unreachable") from None

    def _failed(self, code: int, reason: str) -> UpstreamFailed:
        self._unanswered.inc()
        return UpstreamFailed(code, reason)
