# SPDX-License-Identifier: Apache-2.0
"""How ``lotusguard check`` asks: as the guard does, through a `Dependency`; and it explains why there is no answer."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from attrs import define, field
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.web.client import ResponseFailed
from twisted.web.http_headers import Headers

from lotusguard.clients.dependency import Dependency, DependencyFailed
from lotusguard.clients.http import Answer, BodyTooLarge, ConnectionPool, FixedAgent
from lotusguard.metrics import Metrics

LONGEST_ANSWER = 8 * 1024 * 1024
ANY_STATUS = range(100, 600)


class NoAnswer(Exception):
    """There is no answer. The text says why, the remedy what to do about it."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


@define
class Asking:
    """What all services that are asked have in common.

    :param timeout: seconds for one answer.
    :param now: our clock, in seconds since the epoch.
    """

    reactor: Any
    pool: ConnectionPool
    timeout: float
    now: Callable[[], float]

    def service(self, setting: str, base: str) -> Service:
        """:param setting: the setting that holds the address, for remedies."""
        dependency = Dependency(
            setting,
            FixedAgent(self.reactor, base, self.pool),
            self.reactor,
            Metrics(),
            timeout=self.timeout,
            limit=LONGEST_ANSWER,
            wall_clock=self.now,
        )
        return Service(setting, base, dependency)


@define
class Service:
    """A service that is asked; any status is an answer."""

    setting: str
    base: str
    dependency: Dependency = field(repr=False)

    @property
    def skew(self) -> float | None:
        """Seconds by which its clock is ahead of ours, from its last ``Date``; None while unknown."""
        return self.dependency.skew

    async def ask(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Make one request and return the whole answer. :raises NoAnswer:"""
        given = Headers({name: [value] for name, value in (headers or {}).items()})
        try:
            return await self.dependency.call(
                method.encode(), target.encode("ascii"), given, body, read=_whole, expected=ANY_STATUS, is_probe=True
            )
        except DependencyFailed as failed:
            raise self._explained(failed) from None

    async def post_json(self, target: str, value: object, **headers: str) -> Answer:
        """:raises NoAnswer:"""
        content_type = {"Content-Type": "application/json"}
        return await self.ask("POST", target, json.dumps(value).encode(), content_type | headers)

    def _explained(self, failed: DependencyFailed) -> NoAnswer:
        parts, error = urlsplit(self.base), failed.error
        secure = parts.scheme == "https"
        host = f"{parts.hostname}:{parts.port or (443 if secure else 80)}"
        address = f"{self.setting} ({self.base})"
        if failed.reason == "timeout":
            remedy = f"see what {address} is doing"
            remedy += "; it may not speak TLS" if secure else ""
            return NoAnswer(f"no answer within {self.dependency.timeout:g} s", remedy)
        if isinstance(error, DNSLookupError):
            return NoAnswer(f"the name {parts.hostname!r} is not known", f"correct the host name in {self.setting}")
        if isinstance(error, ConnectError):
            remedy = f"start it, or correct the address in {address}"
            if error.osError == errno.ECONNREFUSED:
                return NoAnswer(f"nothing listens on {host}", remedy)
            why = f" ({os.strerror(error.osError)})" if error.osError else ""
            return NoAnswer(f"cannot connect to {host}{why}", remedy)
        if isinstance(error, BodyTooLarge):
            return NoAnswer("the answer does not end", f"see what {address} points to")
        if isinstance(error, ResponseFailed):
            reasons = {reason.getErrorMessage() or type(reason.value).__name__ for reason in error.reasons}
            other = "it may not speak TLS, or its certificate is not trusted" if secure else "it may want https"
            return NoAnswer(f"no HTTP answer ({'; '.join(sorted(reasons))})", f"{other}: correct {address}")
        return NoAnswer(f"no usable answer ({type(error).__name__})", f"see what {address} points to")


def listener_address(host: str, port: int) -> str:
    """The URL at which a listener of the guard's is asked from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _whole(answer: Answer) -> Answer:
    return answer


def json_of(answer: Answer) -> dict[str, Any]:
    """The JSON object of an answer; empty if there is none."""
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def errcode_of(answer: Answer) -> str:
    """An answer's status and Matrix error code, such as ``401 M_UNKNOWN_TOKEN``."""
    return f"{answer.code} {json_of(answer).get('errcode', '')}".strip()
