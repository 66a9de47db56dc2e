# SPDX-License-Identifier: Apache-2.0
"""The public door: token requests are read and decided on, everything else is handed on. Floor: web."""

from __future__ import annotations

import re
from random import getrandbits

from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.lk_jwt_service import LkJwtService, UpstreamFailed
from lotusguard.guard.joins.admission import Admission, RoomFull
from lotusguard.metrics import Metrics
from lotusguard.rules.requests import Unreadable, read_request
from lotusguard.web.answers import refuse
from lotusguard.web.forwarding import forwarded, give, has_body, relay
from lotusguard.web.site import RELAY_PATH, WEBHOOK_PATH, PublicRequest
from lotusguard.web.webhooks import Webhooks

log = Logger()

_UNREACHABLE = "The call service cannot be reached."
_PLAIN_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class PublicRoutes:
    """What clients, and the SFU with its webhooks, reach through the reverse proxy.

    :param idle: seconds for which upstream may send nothing in the middle of an answer.
    """

    def __init__(
        self,
        admission: Admission,
        authorizer: LkJwtService,
        webhooks: Webhooks,
        clock: IReactorTime,
        metrics: Metrics,
        *,
        idle: float,
    ) -> None:
        self._admission = admission
        self._authorizer = authorizer
        self._webhooks = webhooks
        self._clock = clock
        self._idle = idle
        self._requests = {kind: metrics.requests.labels(kind) for kind in ("token", "relay")}
        self.app = Klein()
        self.app.route(WEBHOOK_PATH, endpoint=WEBHOOK_PATH)(self._webhook)
        self.app.route(RELAY_PATH, endpoint=RELAY_PATH)(self._relay)
        self.app.handle_errors(UpstreamFailed)(self._upstream_failed)  # type: ignore[arg-type]
        self.app.handle_errors(Exception)(self._unexpected)  # type: ignore[arg-type]

    # -- routes ------------------------------------------------------------------------------------------

    def answer_token(self, request: PublicRequest) -> None:
        """Answer what came for a token route, unless its caller goes away before."""
        request.answering = Deferred.fromCoroutine(self._token(request))
        request.answering.addErrback(self._not_answered, request)

    async def _token(self, request: PublicRequest) -> None:
        """A request for a token: read strictly, decided on, forwarded as we read it."""
        if request.method != b"POST":
            await self._relay(request)
            return
        self._requests["token"].inc()
        route = request.token_route
        assert route is not None
        request_id = _request_id(request)
        try:
            asked = read_request(
                route, request.body(), lambda name: list(request.requestHeaders.getRawHeaders(name) or ())
            )
        except Unreadable as why:
            log.info(
                "unreadable token request from {peer}: {reason} [{request_id}]",
                peer=request.getClientIP(), reason=str(why), request_id=request_id, event_name="unreadable",
            )  # fmt: skip
            refuse(request, 400, "M_NOT_JSON", "Error reading request", cors=route.cors)
            return
        going = forwarded(request, asked.body, request_id)
        try:
            answer = await self._admission.join(asked, request_id, lambda: self._authorizer.ask(going))
        except RoomFull:
            refuse(request, 403, "M_FORBIDDEN", "This voice channel is full.", cors=route.cors)
        else:
            give(request, answer)

    async def _webhook(self, request: PublicRequest) -> None:
        """Upstream's webhook, which we read along."""
        body = request.body()
        self._webhooks.notice(request, body)
        await self._relay(request)

    async def _relay(self, request: PublicRequest) -> None:
        """Anything else: handed on as it came, answered as upstream answers."""
        self._requests["relay"].inc()
        body = request.body()
        going = forwarded(request, body if body or has_body(request) else None, _request_id(request))
        response = await self._authorizer.open(going)
        await relay(request, response, self._clock, self._idle)

    # -- what goes wrong ---------------------------------------------------------------------------------

    def _not_answered(self, failure: Failure, request: PublicRequest) -> None:
        if request.channel is None:
            return  # the caller went away
        if failure.check(UpstreamFailed):
            self._upstream_failed(request, failure)
        else:
            self._unexpected(request, failure)

    def _upstream_failed(self, request: PublicRequest, failure: Failure) -> None:
        error = failure.value
        assert isinstance(error, UpstreamFailed)
        late = error.code == 504
        text = "The call service did not answer in time." if late else _UNREACHABLE
        refuse(request, error.code, "M_UNKNOWN", text, cors=request.cors)

    def _unexpected(self, request: PublicRequest, failure: Failure) -> None:
        if failure.check(CancelledError):
            return
        log.failure("a request could not be answered", failure)
        if request.startedWriting:
            request.channel.forceAbortClient()
        else:
            refuse(request, 502, "M_UNKNOWN", _UNREACHABLE, cors=request.cors)


def _request_id(request: PublicRequest) -> str:
    """The caller's own ``X-Request-ID`` if it is a plain one, else a new one."""
    given = request.requestHeaders.getRawHeaders(b"x-request-id") or [b""]
    return given[0].decode("ascii") if len(given) == 1 and _PLAIN_ID.fullmatch(given[0]) else f"{getrandbits(128):032x}"
