# SPDX-License-Identifier: Apache-2.0
"""Faults: what a stand-in does instead of answering as the real service would. Sandbox.

Set ``standin.fault`` for every route or ``standin.faults["route name"]`` for one::

    homeserver.faults["room_state"] = Fault.hang()
    livekit.fault = Fault.status(503, times=2)
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
    """One kind of misbehaviour; created by the class methods below.

    :ivar times: how many more requests it affects; ``None`` for all.
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
        """Answer correctly, after so many seconds of the stand-in's clock."""
        return cls("delay", times, seconds=seconds)

    @classmethod
    def status(cls, code: int, body: bytes = b'{"errcode":"M_UNKNOWN"}', times: int | None = None) -> Fault:
        """Answer with that status and do nothing."""
        return cls("status", times, reply=Reply(code, body, [("Content-Type", "application/json")]))

    @classmethod
    def invalid_response(cls, body: bytes = b"\xff\xfe<html>oops", times: int | None = None) -> Fault:
        """200 with the usual content type and a body that cannot be parsed."""
        return cls("invalid_response", times, reply=Reply(200, body, [("Content-Type", "application/json")]))

    @classmethod
    def truncated(cls, times: int | None = None) -> Fault:
        """The first half of the correct answer; then the connection closes."""
        return cls("truncated", times)

    @classmethod
    def redirect(cls, location: str, code: int = 302, times: int | None = None) -> Fault:
        """Redirect the caller."""
        return cls("redirect", times, reply=Reply(code, b"", [("Location", location)]))

    @classmethod
    def too_large(cls, times: int | None = None) -> Fault:
        """200 with a body that never ends, as fast as the caller reads it."""
        return cls("too_large", times)

    @classmethod
    def wrong_types(cls, times: int | None = None) -> Fault:
        """The correct answer, but every value has another type than documented."""
        return cls("wrong_types", times)

    @classmethod
    def close(cls, times: int | None = None) -> Fault:
        """Drop the connection and do nothing."""
        return cls("close", times)

    @classmethod
    def late_close(cls, times: int | None = None) -> Fault:
        """Carry out the request, then drop the connection without an answer."""
        return cls("late_close", times)

    @classmethod
    def drip(cls, seconds: float = 1.0, times: int | None = None) -> Fault:
        """The correct answer, one byte every so many seconds."""
        return cls("drip", times, seconds=seconds)

    async def spoil(self, request: http.Request, clock: IReactorTime, answer: Answer) -> Reply | None:
        """Misbehave.

        :param answer: carries out the request and returns the correct reply.
        :return: the reply to send instead; ``None`` if nothing more is to be sent.
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
            # abortConnection would discard what has just been written.
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
    """Write the headers of the reply. :return: the body that must follow, at least two bytes."""
    body = reply.body.ljust(2)
    request.setResponseCode(reply.status)
    for name, value in reply.headers:
        request.setHeader(name.encode("latin-1"), value.encode("utf-8"))
    request.setHeader(b"Content-Length", b"%d" % len(body))
    return body


@implementer(IPullProducer)
class _Endless:
    """Writes whenever the transport has room, until the peer disconnects."""

    def __init__(self, request: http.Request) -> None:
        self._request = request
        self._next = b'{"state":['

    def resumeProducing(self) -> None:
        self._request.write(self._next)
        self._next = b" " * 65536

    def stopProducing(self) -> None:
        self._next = b""


def mistyped(reply: Reply) -> Reply:
    """The reply with wrong types. In protobuf, field 1 is a number instead of a string."""
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
