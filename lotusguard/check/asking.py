# SPDX-License-Identifier: Apache-2.0
"""How ``lotusguard check`` asks: like the guard, but it tells in words why there is no answer, and reads clocks.
Under the roof.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.web.client import HTTPConnectionPool, ResponseFailed
from twisted.web.http import stringToDatetime
from twisted.web.http_headers import Headers

from lotusguard.clients.http import Answer, BodyTooLarge, BytesBody, FixedAgent, collected

LONGEST_ANSWER = 8 * 1024 * 1024


class NoAnswer(Exception):
    """There is no answer. The text says why, the remedy what to do about it."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


class Dependency:
    """Somebody to ask.

    :param setting: the setting that holds the address.
    :param patience: seconds for one answer.
    :param now: our clock, in seconds since the epoch.
    :ivar skew: seconds by which its clock is ahead of ours, as far as its last ``Date`` tells; ``None`` unknown.
    """

    def __init__(
        self, setting: str, base: str, reactor: Any, pool: HTTPConnectionPool, patience: float, now: Callable[[], float]
    ) -> None:
        self.setting = setting
        self.base = base
        self.skew: float | None = None
        self._reactor = reactor
        self._patience = patience
        self._now = now
        self._agent = FixedAgent(reactor, base, pool)

    async def ask(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request, answered whole. :raises NoAnswer:"""
        exchange = Deferred.fromCoroutine(self._exchange(method, target, body, headers or {}))
        try:
            return await exchange.addTimeout(self._patience, self._reactor)
        except CancelledError:
            raise
        except Exception as error:
            raise self._explained(error) from None

    async def post_json(self, target: str, value: object, **headers: str) -> Answer:
        """:raises NoAnswer:"""
        content_type = {"Content-Type": "application/json"}
        return await self.ask("POST", target, json.dumps(value).encode(), content_type | headers)

    async def _exchange(self, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        given = Headers({name: [value] for name, value in headers.items()})
        producer = None if body is None else BytesBody(body)
        asked_at = self._now()
        response = await self._agent.request(method.encode(), target.encode("ascii"), given, producer)
        dated = (response.headers.getRawHeaders(b"date") or [b""])[0]
        self._read_clock(dated, asked_at)
        return Answer(response.code, response.headers, await collected(response, LONGEST_ANSWER))

    def _read_clock(self, dated: bytes, asked_at: float) -> None:
        """``Date`` has whole seconds, and was written between the question and now."""
        try:
            theirs = float(stringToDatetime(dated))
        except (ValueError, IndexError, KeyError, TypeError):
            return
        earliest, latest = theirs - self._now(), theirs + 1 - asked_at
        self.skew = 0.0 if earliest <= 0 <= latest else min(earliest, latest, key=abs)

    def _explained(self, error: Exception) -> NoAnswer:
        parts = urlsplit(self.base)
        host = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        secure = parts.scheme == "https"
        if isinstance(error, TimeoutError):
            doing = f"see what {self.setting} ({self.base}) is doing"
            return NoAnswer(
                f"no answer within {self._patience:g} s", f"{doing}; it may not speak TLS" if secure else doing
            )
        if isinstance(error, DNSLookupError):
            return NoAnswer(f"the name {parts.hostname!r} is not known", f"correct the host name in {self.setting}")
        if isinstance(error, ConnectError):
            correct = f"start it, or correct the address in {self.setting} ({self.base})"
            if error.osError == errno.ECONNREFUSED:
                return NoAnswer(f"nothing listens on {host}", correct)
            why = f" ({os.strerror(error.osError)})" if error.osError else ""
            return NoAnswer(f"cannot connect to {host}{why}", correct)
        if isinstance(error, BodyTooLarge):
            return NoAnswer("the answer does not end", f"see what {self.setting} ({self.base}) points to")
        if isinstance(error, ResponseFailed):
            why = "; ".join(
                sorted({reason.getErrorMessage() or type(reason.value).__name__ for reason in error.reasons})
            )
            other = "it may not speak TLS, or its certificate is not trusted" if secure else "it may want https"
            return NoAnswer(f"no HTTP answer ({why})", f"{other}: correct {self.setting} ({self.base})")
        return NoAnswer(
            f"no usable answer ({type(error).__name__})", f"see what {self.setting} ({self.base}) points to"
        )


def json_of(answer: Answer) -> dict[str, Any]:
    """The JSON object of an answer; empty when there is none."""
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def errcode_of(answer: Answer) -> str:
    """An answer's status and Matrix error code, such as ``401 M_UNKNOWN_TOKEN``."""
    return f"{answer.code} {json_of(answer).get('errcode', '')}".strip()
