# SPDX-License-Identifier: Apache-2.0
"""The app-service listener: MSC4195 requests that a homeserver proxies, naming the caller in a header or the body."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from klein import Klein
from twisted.python.failure import Failure

from lotusguard.rules.requests import proxied_route
from lotusguard.web.answers import NO_BEARER, NO_ROUTE, Rejected, answer_failure
from lotusguard.web.bearer import has_bearer
from lotusguard.web.handlers import RequestHandler
from lotusguard.web.site import GuardRequest, GuardSite


@define(slots=False, eq=False)
class AppServiceApi:
    """The routes of the app-service listener.

    :param hs_token: the homeserver's ``hs_token``, which every request must carry; ``""`` for a homeserver that sends
        none, in which case only the homeserver may be able to reach the listener.
    """

    app = Klein()

    _handler: RequestHandler
    hs_token: str = field(repr=False)

    @app.route("/_matrix/<any(client, federation):api>/unstable/<prefix>/rtc/livekit/get_token")
    @app.route("/_matrix/<any(client, federation):api>/<version>/rtc/livekit/get_token")
    async def token(self, request: GuardRequest, **_: Any) -> None:
        """A token for the SFU."""
        self._authorise(request)
        await self._handler.token(request)

    @app.route("/_matrix", branch=True)
    async def relay(self, request: GuardRequest) -> None:
        """Other requests that a homeserver sends to an app service."""
        self._authorise(request)
        await self._handler.relay(request)

    @app.route("/", branch=True)
    def nothing(self, request: GuardRequest) -> None:
        """Clients' routes are on the public listener only."""
        self._authorise(request)
        raise Rejected(NO_ROUTE)

    @app.handle_errors(Exception)  # type: ignore[arg-type]
    def failed(self, request: GuardRequest, failure: Failure) -> None:
        """See ``web/answers.py``."""
        answer_failure(request, failure)

    def _authorise(self, request: GuardRequest) -> None:
        """:raises Rejected: the request does not carry the homeserver's token."""
        if self.hs_token and not has_bearer(request, self.hs_token):
            raise Rejected(NO_BEARER)

    def site(self, reactor: Any, *, max_body: int) -> GuardSite:
        """The listener's site."""
        return GuardSite(self.app, reactor, max_body=max_body, token_route=proxied_route)
