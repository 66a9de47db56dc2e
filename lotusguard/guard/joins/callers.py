# SPDX-License-Identifier: Apache-2.0
"""Who asks for a token: proven by our homeserver, by the listener they came through, or by upstream alone."""

from __future__ import annotations

import hashlib
from enum import Enum

from attrs import define, field, frozen
from cachetools import TTLCache
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.synapse import OpenIDClient
from lotusguard.clients.waiting import Deadline
from lotusguard.rules.requests import TokenRequest

CALLERS_KEPT = 20_000
"""OpenID tokens whose user is remembered: 100 bytes each and the user's name."""
CALLER_REMEMBERED = 60.0
"""Seconds. The requests of one join often carry the same OpenID token."""


class Identified(Enum):
    """What is known of a caller before upstream was asked."""

    PROVEN = "proven"
    """We know who asks."""
    BAD_TOKEN = "bad_token"
    """The homeserver does not know the OpenID token, or it is somebody else's. Upstream will answer 401."""
    FOREIGN = "foreign"
    """A user of another homeserver, whom only upstream can verify."""
    UNKNOWN = "unknown"
    """Our homeserver does not answer."""


@frozen
class Caller:
    """:ivar user: the Matrix user, if proven. :ivar reason: why the caller is unknown."""

    identified: Identified
    user: str = ""
    reason: str = ""


UNIDENTIFIED = Caller(Identified.UNKNOWN, reason="internal_error")


@define(eq=False)
class Callers:
    """Verifies callers by their OpenID token.

    :param homeserver: what verifies local users.
    """

    _homeserver: OpenIDClient
    _clock: IReactorTime
    _known: TTLCache[bytes, str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._known = TTLCache(CALLERS_KEPT, CALLER_REMEMBERED, timer=self._clock.seconds)

    async def identify(self, request: TokenRequest, deadline: Deadline) -> Caller:
        """Who asks. Never fails, and never waits beyond the deadline."""
        if request.proven_user:
            return Caller(Identified.PROVEN, request.proven_user)
        openid = request.openid
        if openid is None:
            return Caller(Identified.BAD_TOKEN)
        key = hashlib.sha256(f"{openid.server_name}\0{openid.access_token}".encode("utf-8", "surrogatepass")).digest()
        user: str | None = self._known.get(key)
        if user is None:
            try:
                if not self._homeserver.server_name:
                    await deadline.wait(Deferred.fromCoroutine(self._homeserver.know_server_name()))
                if not self._homeserver.is_local(openid):
                    return Caller(Identified.FOREIGN)
                user = await deadline.wait(Deferred.fromCoroutine(self._homeserver.local_user(openid)))
            except TimeoutError:
                return Caller(Identified.UNKNOWN, reason="timeout")
            except DependencyFailed as failed:
                return Caller(Identified.UNKNOWN, reason=failed.reason)
            if user is None:
                return Caller(Identified.BAD_TOKEN)
            self._known[key] = user
        if request.user not in (None, user):
            return Caller(Identified.BAD_TOKEN)  # upstream refuses a claim that the token does not prove
        return Caller(Identified.PROVEN, user)
