# SPDX-License-Identifier: Apache-2.0
"""Handling of requests for the public and the app-service listener: token requests are decided, others relayed."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from random import getrandbits
from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.http import Answer
from lotusguard.clients.lk_jwt_service import Forwarded, LkJwtService, came_through_a_guard
from lotusguard.guard.joins.admission import Admission
from lotusguard.metrics import Metrics
from lotusguard.rules.requests import TokenRequest, TokenRoute, Unreadable, WrongOrigin, read_request
from lotusguard.web.answers import LoopFound
from lotusguard.web.forwarding import forwarded_headers, give, has_body, relay
from lotusguard.web.held import PUBLIC_SILENCE, HeldRequest
from lotusguard.web.site import GuardRequest

log = Logger()

_PLAIN_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
LOOP_LOGGED_EVERY = 60.0
"""Seconds between two log lines about a loop; anybody can send the marker."""


@define
class RequestHandler:
    """Answers requests with the help of upstream. The same rules hold on every listener.

    :param idle: seconds for which upstream may send nothing in the middle of an answer.
    :param keep_identity: whether ``X-Matrix-*`` headers are forwarded: on the app-service listener only.
    :param silence: seconds for which a request in a lobby is held without sending a byte.
    """

    _admission: Admission
    _upstream: LkJwtService
    _clock: IReactorTime
    _metrics: Metrics
    _idle: float = field(kw_only=True)
    _keep_identity: bool = field(kw_only=True, default=False)
    _silence: float = field(kw_only=True, default=PUBLIC_SILENCE)
    _loop_logged_at: float | None = field(init=False, default=None)
    _counts: dict[str, Any] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._counts = {kind: self._metrics.requests.labels(kind) for kind in ("token", "relay")}

    def count_rejected_body(self, reason: str) -> None:
        """A body was refused as ``too_large``, or because there was ``no_room`` for it."""
        self._metrics.bodies_rejected.labels(reason).inc()

    async def token(self, request: GuardRequest) -> None:
        """A request to a token route: read strictly, decided, forwarded as we read it. Methods other than POST are
        upstream's to answer."""
        route = request.token_route
        if route is None or not request.asks_for_token:
            await self.relay(request)
            return
        self._refuse_loop(request)
        self._counts["token"].inc()
        request_id = _request_id(request)
        asked = _read(request, route, request_id)
        request.drop_body()
        headers = forwarded_headers(request, request_id, keep_identity=self._keep_identity)

        def forward(body: bytes, deadline: float | None) -> Awaitable[Answer]:
            return self._upstream.ask(Forwarded(request.method, request.uri, headers, body), deadline)

        held = HeldRequest(request, self._clock, self._silence)
        try:
            answer = await self._admission.join(asked, request_id, forward, held)
        finally:
            held.end()
        give(request, answer)

    async def relay(self, request: GuardRequest) -> None:
        """Any other request: forwarded as it came, answered as upstream answers.

        While upstream restarts, only what belongs to a join is held: its preflight.
        """
        self._refuse_loop(request)
        self._counts["relay"].inc()
        body = request.body()
        sent = body if body or has_body(request) else None
        headers = forwarded_headers(request, _request_id(request), keep_identity=self._keep_identity)
        going = Forwarded(request.method, request.uri, headers, sent)
        response = await self._upstream.open(going, hold=request.token_route is not None)
        await relay(request, response, self._clock, self._idle)

    def _refuse_loop(self, request: GuardRequest) -> None:
        """:raises LoopFound: a guard forwarded this request."""
        if not came_through_a_guard(request.requestHeaders):
            return
        now = self._clock.seconds()
        if self._loop_logged_at is None or now - self._loop_logged_at >= LOOP_LOGGED_EVERY:
            self._loop_logged_at = now
            log.error(
                "refused a request from {peer} that a guard had forwarded: GUARD_UPSTREAM must be lk-jwt-service's "
                "own address, and not lead back to a guard",
                peer=request.getClientIP(), event_name="loop",
            )  # fmt: skip
        raise LoopFound


def _read(request: GuardRequest, route: TokenRoute, request_id: str) -> TokenRequest:
    """Read a token request.

    :raises Unreadable: also for an error of our own, so that no input that crashes the reading gets past the rules.
    :raises WrongOrigin: see `read_request`.
    """
    headers = request.requestHeaders
    try:
        return read_request(route, request.body(), lambda name: list(headers.getRawHeaders(name) or ()))
    except Unreadable as unreadable:
        log.info(
            "unreadable token request from {peer}: {reason} [{request_id}]",
            peer=request.getClientIP(), reason=str(unreadable), request_id=request_id, event_name="unreadable",
        )  # fmt: skip
        raise
    except WrongOrigin:
        log.warn(
            "a homeserver asked for a token for a user of another one [{request_id}]",
            request_id=request_id, event_name="wrong_origin",
        )  # fmt: skip
        raise
    except Exception:
        log.failure("reading a token request failed [{request_id}]", request_id=request_id)
        raise Unreadable("reading it failed") from None


def _request_id(request: GuardRequest) -> str:
    """The caller's own ``X-Request-ID`` if it is a plain one, else a new one."""
    given = request.requestHeaders.getRawHeaders(b"x-request-id") or [b""]
    return given[0].decode("ascii") if len(given) == 1 and _PLAIN_ID.fullmatch(given[0]) else f"{getrandbits(128):032x}"
