# SPDX-License-Identifier: Apache-2.0
"""lk-jwt-service, our upstream: requests are forwarded to it, and it is probed by what only it answers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from attrs import define, field, frozen
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.error import ConnectError, ConnectionDone, ConnectionLost, DNSLookupError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.web.client import ResponseFailed, ResponseNeverReceived
from twisted.web.http_headers import Headers

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.http import Agent, Answer, BodyTooLarge, StaleConnection, whole
from lotusguard.metrics import Metrics

T = TypeVar("T")

TOKEN_ANSWER_LIMIT = 1024 * 1024
"""Bytes that an answer with a token may have."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 0.5
"""Seconds between two attempts while connections are refused."""
PROBE_TIMEOUT = 2.0
VIA = b"1.1 lotusguard"
"""The ``Via`` of every forwarded request (RFC 9110 §7.6.3); a guard that receives it is part of a loop."""


def came_through_a_guard(headers: Headers) -> bool:
    """Whether a guard is among the hops that ``Via`` names."""
    hops = (hop.split() for value in headers.getRawHeaders(b"via") or () for hop in value.split(b","))
    return any(len(hop) > 1 and hop[1].lower() == b"lotusguard" for hop in hops)


def mark(headers: Headers) -> None:
    """Name the guard in ``Via``."""
    headers.setRawHeaders(b"Via", [b", ".join([*(headers.getRawHeaders(b"via") or ()), VIA])])


class UpstreamFailed(Exception):
    """There is no answer. ``code`` is the caller's status: 502 if upstream cannot be reached, 504 if it is late."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@frozen
class Forwarded:
    """A request as it is forwarded.

    :ivar target: the raw request target, undecoded, with its query.
    """

    method: bytes
    target: bytes
    headers: Headers
    body: bytes | None


@define
class LkJwtService:
    """Upstream.

    :param agent: takes request targets (`FixedAgent`).
    :param timeout: seconds for an answer: for a whole one in `ask`, for its head in `open`.
    :param grace: seconds for which a request is held while connections are refused.
    """

    _agent: Agent
    _clock: IReactorTime
    _metrics: Metrics
    _timeout: float = field(kw_only=True)
    _grace: float = field(kw_only=True)
    _seconds: Any = field(init=False)
    _answered: Any = field(init=False)
    _unanswered: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._seconds = self._metrics.dependency_seconds.labels("upstream")
        self._answered = self._metrics.dependency_calls.labels("upstream", "ok")
        self._unanswered = self._metrics.dependency_calls.labels("upstream", "failed")

    def ask(self, request: Forwarded, deadline: float | None = None) -> Coroutine[Any, Any, Answer]:
        """Forward a request and wait for the whole answer.

        :param deadline: the time on the clock at which all attempts end. Without one, each attempt may take
            ``timeout``, and the grace comes before that.
        :raises UpstreamFailed:
        """
        return self._attempted(request, self._whole, deadline, self._grace)

    def open(self, request: Forwarded, *, hold: bool = True) -> Coroutine[Any, Any, Answer]:
        """Forward a request and wait for the head of the answer; the caller reads its body.

        :param hold: the request, while connections are refused. Otherwise it fails at once.
        :raises UpstreamFailed:
        """
        return self._attempted(request, self._send, None, self._grace if hold else 0.0)

    async def _attempted(
        self,
        request: Forwarded,
        attempt: Callable[[Forwarded], Deferred[T]],
        deadline: float | None,
        grace: float,
    ) -> T:
        """Make an attempt, and further ones if upstream has not seen the request.

        While connections are refused (upstream is restarting) the request is held. If upstream closes a connection that
        was used before, it has probably not seen the request, which is sent once more.
        """
        began = self._clock.seconds()
        held_until = began + grace if deadline is None else min(began + grace, deadline)
        pause, repeated = FIRST_PAUSE, False
        while True:
            try:
                seconds = self._seconds_left(deadline)
                outcome = await attempt(request).addTimeout(seconds, self._clock)
            except (CancelledError, UpstreamFailed):
                raise
            except TimeoutError:
                raise self._failed(504, "timeout") from None
            except (ConnectError, DNSLookupError, OSError):
                if self._clock.seconds() + pause > held_until:
                    raise self._failed(502, "unreachable") from None
                await deferLater(self._clock, pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            except ResponseNeverReceived as never:
                closed = all(reason.check(ConnectionDone, ConnectionLost) for reason in never.reasons)
                if repeated or not closed or not isinstance(never, StaleConnection):
                    raise self._failed(502, "hung_up") from None
                repeated = True
                await deferLater(self._clock, 0)  # by then the pool has dropped the others that were closed with it
            except BodyTooLarge:
                raise self._failed(502, "too_large") from None
            except ResponseFailed as failed:
                raise self._failed(502, "truncated" if failed.response else "invalid_response") from None
            except Exception:
                raise self._failed(502, "invalid_response") from None
            else:
                self._seconds.observe(self._clock.seconds() - began)
                self._answered.inc()
                return outcome

    def _seconds_left(self, deadline: float | None) -> float:
        """What one attempt may take. :raises TimeoutError: there is no time left for one."""
        if deadline is None:
            return self._timeout
        seconds = min(self._timeout, deadline - self._clock.seconds())
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def _send(self, request: Forwarded) -> Deferred[Answer]:
        return self._agent.request(request.method, request.target, request.headers, request.body)

    def _whole(self, request: Forwarded) -> Deferred[Answer]:
        return self._send(request).addCallback(whole, TOKEN_ANSWER_LIMIT)

    async def probe(self) -> None:
        """Check that lk-jwt-service answers, by the preflight headers of its token route.

        :raises DependencyFailed: with ``timeout``, ``unreachable``, ``loop`` (another guard answers) or
            ``not_lk_jwt_service``.
        """
        headers = Headers()
        mark(headers)
        asked = self._whole(Forwarded(b"OPTIONS", b"/sfu/get", headers, None))
        try:
            answer = await asked.addTimeout(PROBE_TIMEOUT, self._clock)
        except CancelledError:
            raise
        except TimeoutError:
            raise DependencyFailed("upstream", "timeout") from None
        except Exception:
            raise DependencyFailed("upstream", "unreachable") from None
        if came_through_a_guard(answer.headers):
            raise DependencyFailed("upstream", "loop")
        allowed = answer.headers.getRawHeaders(b"access-control-allow-methods") or ()
        if answer.code != 200 or list(allowed) != [b"POST"]:
            raise DependencyFailed("upstream", "not_lk_jwt_service")

    def _failed(self, code: int, reason: str) -> UpstreamFailed:
        self._unanswered.inc()
        return UpstreamFailed(code, reason)
