# SPDX-License-Identifier: Apache-2.0
"""The public listener, for clients through the reverse proxy and for LiveKit's webhooks."""

from __future__ import annotations

from typing import Any

from attrs import define
from klein import Klein
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from lotusguard.rules.requests import TOKEN_ROUTES
from lotusguard.web.answers import NO_ROUTE, Rejected, answer_failure
from lotusguard.web.handlers import RequestHandler
from lotusguard.web.site import GuardRequest, GuardSite
from lotusguard.web.webhooks import Webhooks


@define(slots=False, eq=False)
class PublicApi:
    """The routes of the public listener."""

    app = Klein()

    _handler: RequestHandler
    _webhooks: Webhooks

    @app.route("/sfu/get")
    @app.route("/get_token")
    async def token(self, request: GuardRequest) -> None:
        """A token for the SFU."""
        await self._handler.token(request)

    @app.route("/sfu_webhook")
    async def webhook(self, request: GuardRequest) -> None:
        """LiveKit's webhook to upstream, which the guard acts on too."""
        self._webhooks.handle(request, request.body())
        await self._handler.relay(request)

    @app.route("/_matrix/<any(client, federation):api>/unstable/<prefix>/rtc/livekit", branch=True)
    @app.route("/_matrix/<any(client, federation):api>/<version>/rtc/livekit", branch=True)
    def proxied(self, request: GuardRequest, **_: Any) -> None:
        """Not served here: on these routes a homeserver names the caller, and anybody could pretend to be one."""
        raise Rejected(NO_ROUTE)

    @app.route("/", branch=True)
    async def relay(self, request: GuardRequest) -> None:
        """Everything else is upstream's."""
        await self._handler.relay(request)

    @app.handle_errors(Exception)  # type: ignore[arg-type]
    def failed(self, request: GuardRequest, failure: Failure) -> None:
        """See ``web/answers.py``."""
        answer_failure(request, failure)

    def answer_token(self, request: GuardRequest) -> None:
        """Do what Klein does for `token`, without looking the route up."""
        request.answering = Deferred.fromCoroutine(self._handler.token(request))
        request.answering.addErrback(lambda failure: self.failed(request, failure))

    def site(self, reactor: Any, *, max_body: int) -> GuardSite:
        """The listener's site."""
        return GuardSite(
            self.app, reactor, max_body=max_body, token_route=TOKEN_ROUTES.get, answer_token=self.answer_token,
            rejected=self._handler.count_rejected_body,
        )  # fmt: skip
