# SPDX-License-Identifier: Apache-2.0
"""A stand-in for LiveKit: RoomService over HTTP, and webhooks. Sandbox.

Read from LiveKit 1.13's ``pkg/service`` (``roomservice.go``, ``auth.go``, ``utils.go``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from livekit.protocol.webhook import WebhookEvent
from twisted.internet.defer import Deferred

from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.go.http import NOT_FOUND
from lotusguard.sandbox.livekit import twirp
from lotusguard.sandbox.livekit.control import SfuControl
from lotusguard.sandbox.livekit.room_service import RoomService
from lotusguard.sandbox.livekit.sfu import Sfu
from lotusguard.sandbox.livekit.tokens import BadToken, Claims
from lotusguard.sandbox.livekit.webhooks import WebhookSender
from lotusguard.sandbox.standin import StandIn
from lotusguard.sandbox.wire import Asked, Refusal, Reply

CONTROL = "/sandbox/"


class FakeLiveKit(Sfu, StandIn):
    """LiveKit. Route names for ``faults``: RoomService's methods, ``control``, or ``""`` for everything else.

    :param webhook_urls: where events are sent; ``webhooks.urls`` may be changed later.
    :param auto_create: whether connecting creates a room that does not exist.
    :param exp_required: refuse tokens without ``exp``, as LiveKit does after 1.13.5.
    :param remote_unmute: LiveKit's ``enable_remote_unmute``.
    :param now: the time for tokens and IDs, in seconds since the epoch.
    :ivar room_faults: by alias, faults for RoomService requests about that room.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        key: str,
        secret: str,
        webhook_urls: Iterable[str] = (),
        auto_create: bool = True,
        exp_required: bool = False,
        remote_unmute: bool = False,
        now: Callable[[], float] = time.time,
        port: int = 0,
        clock: Any = None,
    ) -> None:
        StandIn.__init__(self, reactor, port=port, clock=clock)
        Sfu.__init__(
            self,
            key=key,
            secret=secret,
            auto_create=auto_create,
            exp_required=exp_required,
            remote_unmute=remote_unmute,
            now=now,
            clock=self.clock,
        )
        self.room_faults: dict[str, Fault] = {}
        self.webhooks = WebhookSender(
            reactor, self.clock, self.pool, key=key, secret=secret, urls=webhook_urls, now=now
        )
        self._service = RoomService(self)
        self._control = SfuControl(self)

    async def stop(self) -> None:
        self.webhooks.stop()
        for room in self.rooms.values():
            room.forget_timers()
        await super().stop()

    def drained(self) -> Deferred[None]:
        """Fires when every webhook was delivered or given up."""
        return self.webhooks.drained()

    def route_of(self, asked: Asked) -> str:
        if asked.path.startswith(twirp.PREFIX):
            return asked.path.removeprefix(twirp.PREFIX)
        return "control" if asked.path.startswith(CONTROL) else ""

    def fault_for(self, asked: Asked, route: str) -> Fault | None:
        if self.room_faults and route in twirp.REQUESTS:
            about = getattr(twirp.read(asked, route)[0], "room", "")
            if about in self.room_faults:
                return self.room_faults[about]
        return super().fault_for(asked, route)

    async def answer(self, asked: Asked, route: str) -> Reply:
        if route == "control":
            return self._control.answer(asked)
        claims = self._authenticated(asked)
        if asked.path == "/":
            return Reply(200, b"OK", [("Content-Type", "text/plain; charset=utf-8")])
        if not route:
            return NOT_FOUND
        message, as_json = twirp.read(asked, route)
        answered = self._service.call(route, message, claims.video if claims else None)
        return twirp.reply(answered, as_json=as_json)

    def emit(self, event: WebhookEvent) -> None:
        super().emit(event)
        self.webhooks.send(event)

    def restart(self, *, graceful: bool = False) -> None:
        super().restart(graceful=graceful)
        if not graceful:
            self.webhooks.stop()

    def _authenticated(self, asked: Asked) -> Claims | None:
        """The middleware in front of all routes; its own errors are plain text."""
        header = asked.header("Authorization")
        if not header:
            return None
        if not header.startswith("Bearer "):
            raise _plain_401("invalid authorization header. Must start with Bearer ")
        try:
            return self.verified(header.removeprefix("Bearer "))
        except BadToken as error:
            raise _plain_401(str(error)) from None


def _plain_401(text: str) -> Refusal:
    return Refusal(Reply(401, text.encode(), [("Content-Type", "text/plain; charset=utf-8")]))
