# SPDX-License-Identifier: Apache-2.0
"""What a stand-in can be told to do instead of answering as the real service would. Sandbox.

Set ``standin.fault`` for every route or ``standin.faults["route name"]`` for one::

    homeserver.faults["room_state"] = Fault.hang()
    sfu.fault = Fault.status(503, times=2)
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPullProducer, IReactorTime
from twisted.internet.task import deferLater
from twisted.web import http
from zope.interface import implementer

from lotusguard.sandbox.wire import Reply

Answer = Callable[[], Awaitable[Reply]]


@dataclass
class Fault:
    """One way of being ill; made by the class methods below.

    :ivar times: how many requests it still spoils, ``None`` for all.
    """

    kind: str
    times: int | None = None
    seconds: float = 0.0
    reply: Reply = field(default_factory=Reply)

    @classmethod
    def hang(cls, times: int | None = None) -> Fault:
        """Accept the request and never answer."""
        return cls("hang", times)

    @classmethod
    def delay(cls, seconds: float, times: int | None = None) -> Fault:
        """Answer properly, but so many seconds later by the stand-in's clock."""
        return cls("delay", times, seconds=seconds)

    @classmethod
    def status(cls, code: int, body: bytes = b'{"errcode":"M_UNKNOWN"}', times: int | None = None) -> Fault:
        """Answer with that status, without doing anything."""
        return cls("status", times, reply=Reply(code, body, [("Content-Type", "application/json")]))

    @classmethod
    def invalid_response(cls, body: bytes = b"\xff\xfe<html>oops", times: int | None = None) -> Fault:
        """200 with the usual content type and bytes that are nothing like it."""
        return cls("invalid_response", times, reply=Reply(200, body, [("Content-Type", "application/json")]))

    @classmethod
    def truncated(cls, times: int | None = None) -> Fault:
        """The proper answer, cut in half: the connection closes before Content-Length bytes were sent."""
        return cls("truncated", times)

    @classmethod
    def redirect(cls, location: str, code: int = 302, times: int | None = None) -> Fault:
        """Send the caller elsewhere."""
        return cls("redirect", times, reply=Reply(code, b"", [("Location", location)]))

    @classmethod
    def too_large(cls, times: int | None = None) -> Fault:
        """200, and a body without end, as fast as the caller reads it."""
        return cls("too_large", times)

    @classmethod
    def wrong_types(cls, times: int | None = None) -> Fault:
        """The proper answer, well formed, with every value of another type than promised."""
        return cls("wrong_types", times)

    @classmethod
    def close(cls, times: int | None = None) -> Fault:
        """Drop the connection without having done anything."""
        return cls("close", times)

    @classmethod
    def late_close(cls, times: int | None = None) -> Fault:
        """Do everything that was asked, then drop the connection without an answer."""
        return cls("late_close", times)

    @classmethod
    def drip(cls, seconds: float = 1.0, times: int | None = None) -> Fault:
        """The proper answer, one byte every so many seconds: never silent, never done."""
        return cls("drip", times, seconds=seconds)

    async def spoil(self, request: http.Request, clock: IReactorTime, answer: Answer) -> Reply | None:
        """Demo the fault.

        :param answer: does what was asked and gives the proper reply.
        :return: what to answer instead, or ``None`` when nothing more is to be sent.
        """
        if self.kind == "hang":
            await Deferred()
        if self.kind == "delay":
            await deferLater(clock, self.seconds)
            return await answer()
        if self.kind in ("status", "invalid_response", "redirect"):
            return self.reply
        if self.kind == "wrong_types":
            return mistyped(await answer())
        if self.kind == "too_large":
            request.setHeader(b"Content-Type", b"application/json")
            request.registerProducer(_Endless(request), False)
            await Deferred()
        if self.kind == "truncated":
            reply = await answer()
            body = _begin(request, reply)
            request.write(body[: len(body) // 2])
            # Not abortConnection: that would throw away what has just been written.
            _transport(request).loseConnection()
            return None
        if self.kind == "drip":
            for byte in _begin(request, await answer()):
                request.write(bytes([byte]))
                await deferLater(clock, self.seconds)
            request.finish()
            return None
        if self.kind == "late_close":
            await answer()
        _transport(request).abortConnection()
        return None


def _transport(request: http.Request) -> Any:
    return request.channel.transport if request.channel else None


def _begin(request: http.Request, reply: Reply) -> bytes:
    """Write the headers of the reply; return the body that is owed now (at least two bytes)."""
    body = reply.body.ljust(2)
    request.setResponseCode(reply.status)
    for name, value in reply.headers:
        request.setHeader(name.encode("latin-1"), value.encode("utf-8"))
    request.setHeader(b"Content-Length", b"%d" % len(body))
    return body


@implementer(IPullProducer)
class _Endless:
    """Writes whenever the transport has room; stopped by the peer's going away."""

    def __init__(self, request: http.Request) -> None:
        self._request = request
        self._next = b'{"state":['

    def resumeProducing(self) -> None:
        self._request.write(self._next)
        self._next = b" " * 65536

    def stopProducing(self) -> None:
        self._next = b""


def mistyped(reply: Reply) -> Reply:
    """The same reply with other types inside; in protobuf, field 1 is a number where there should be text."""
    if "json" not in (reply.header("Content-Type") or ""):
        return replace(reply, body=b"\x08\x01")
    try:
        value = json.loads(reply.body)
    except ValueError:
        return reply
    if not isinstance(value, dict):
        return replace(reply, body=json.dumps(_other_type(value)).encode())
    wrong = {key: _other_type(inner) for key, inner in value.items()}
    return replace(reply, body=json.dumps(wrong).encode())


def _other_type(value: Any) -> Any:
    if isinstance(value, str):
        return 7
    if isinstance(value, list):
        return {str(at): _other_type(inner) for at, inner in enumerate(value)}
    if isinstance(value, dict):
        return [_other_type(inner) for inner in value.values()]
    return "true" if isinstance(value, bool) else [value]
