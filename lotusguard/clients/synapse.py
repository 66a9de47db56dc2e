# SPDX-License-Identifier: Apache-2.0
"""Synapse's admin API, and the little of the client and federation APIs that the guard needs. Floor: clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from twisted.web.http_headers import Headers

from lotusguard.clients.dependency import Dependency
from lotusguard.clients.http import Answer, json_object
from lotusguard.clients.waiting import SharedLookups, gather
from lotusguard.rules.identity import server_of
from lotusguard.rules.policy import ROOM_QUALITY, VOICE_LIMIT
from lotusguard.rules.requests import OpenID

ROOMS_A_PAGE = 500
LONGEST_TOKEN = 2048
"""Characters of an OpenID token; Synapse's are a tenth of that. It travels in a target."""


class SynapseClient:
    """What the guard asks of Synapse. PeriodicService method raises `DependencyFailed` when there is no usable answer.

    :param token: an admin's access token.
    :ivar server_name: the homeserver's name; learnt by `whoami` when it was not given.
    """

    def __init__(self, dependency: Dependency, token: str, server_name: str = "") -> None:
        self.server_name = server_name
        self._dependency = dependency
        self._headers = Headers({b"Authorization": [b"Bearer " + token.encode("utf-8")]})
        self._ignores_type = False
        self._naming: SharedLookups[str, str] = SharedLookups(lambda _: self.whoami())
        dependency.probe = self.probe

    @property
    def well(self) -> bool:
        """Whether it is waited for."""
        return not self._dependency.breaker.open

    async def policy_events(self, room_id: str) -> dict[str, Any]:
        """The contents of the room's ``io.lotus.…`` state events by type, those with state key ``""``.

        Asked for by type, both at once. An older Synapse ignores the type and answers the room's whole state, so
        what comes is filtered again, and such a server is then asked only once a room. A room it does not know
        has no events.
        """
        if self._ignores_type:
            events = await self._state(room_id, VOICE_LIMIT)
            # it may have become a newer one, which answers what was asked for and nothing else
            return events if self._ignores_type else events | await self._state(room_id, ROOM_QUALITY)
        both = await gather(self._state(room_id, kind) for kind in (VOICE_LIMIT, ROOM_QUALITY))
        return {kind: content for contents in both for kind, content in contents.items()}

    async def _state(self, room_id: str, kind: str) -> dict[str, Any]:
        def read(answer: Answer) -> dict[str, Any]:
            if _no_such_room(answer):
                return {}
            events = _ok(answer)["state"]
            if not isinstance(events, list):
                raise TypeError("state is no list")
            self._ignores_type = any(event["type"] != kind for event in events)
            return {
                event["type"]: event["content"]
                for event in events
                if event["type"] in (VOICE_LIMIT, ROOM_QUALITY) and event.get("state_key") == ""
            }

        return await self._dependency.call(b"GET", _state_of(room_id, kind), self._headers, read=read)

    async def room_ids(self, most: int) -> AsyncIterator[str]:
        """The IDs of the rooms it knows, page by page, ``most`` at the most."""
        start: int | None = 0
        while start is not None and start < most:
            path = f"/_synapse/admin/v1/rooms?from={start}&limit={ROOMS_A_PAGE}"
            page = await self._dependency.call(b"GET", path.encode("ascii"), self._headers, read=_ok)
            for room in page.get("rooms", []):
                yield room["room_id"]
            following = page.get("next_batch")
            start = following if isinstance(following, int) and following > start else None

    async def local_user(self, openid: OpenID) -> str | None:
        """Whose OpenID token this is, if it is one of this homeserver's; ``None`` when it is not, or nobody's.

        Asked of the configured address only, whatever server a caller names. The token travels in the path, as the
        federation API wants it, and nowhere else.
        """
        if not self.server_name:
            await self._naming.get("")
        plain = openid.access_token.isascii() and openid.access_token.isprintable()
        if openid.server_name != self.server_name or not plain or len(openid.access_token) > LONGEST_TOKEN:
            return None

        def read(answer: Answer) -> str | None:
            if 400 <= answer.code < 500:
                return None
            user = _ok(answer)["sub"]
            if not isinstance(user, str) or not user.startswith("@"):
                raise ValueError("no user")
            return user if server_of(user) == openid.server_name else None

        path = f"/_matrix/federation/v1/openid/userinfo?access_token={quote(openid.access_token, safe='')}"
        return await self._dependency.call(b"GET", path.encode("ascii"), Headers(), read=read, expected=(401, 403))

    async def whoami(self) -> str:
        """Whose access token we hold, and so on which server."""
        user = await self._dependency.call(b"GET", _WHOAMI, self._headers, read=_user_id)
        self.server_name = self.server_name or server_of(user)
        return user

    async def probe(self) -> None:
        """Ask as for a room's policy, of a room that there is not: shows that it answers, and that it answers us.

        :raises DependencyRefused: our token is not an admin's.
        """
        path = _state_of(NO_ROOM, VOICE_LIMIT)
        await self._dependency.call(b"GET", path, self._headers, read=_room_or_none, is_probe=True)


_WHOAMI = b"/_matrix/client/v3/account/whoami"
NO_ROOM = "!lotusguard:probe"


def _state_of(room_id: str, kind: str) -> bytes:
    return f"/_synapse/admin/v1/rooms/{quote(room_id, safe='')}/state?type={kind}".encode("ascii")


def _no_such_room(answer: Answer) -> bool:
    """Whether Synapse says so: a proxy that keeps the admin API to itself, or a worker without it, answers 404 too, and
    to take that for «no policy» would lift every room's."""
    return answer.code == 404 and json_object(answer).get("errcode") == "M_NOT_FOUND"


def _room_or_none(answer: Answer) -> None:
    if not _no_such_room(answer):
        _ok(answer)


def _ok(answer: Answer) -> dict[str, Any]:
    if answer.code != 200:
        raise ValueError(answer.code)
    return json_object(answer)


def _user_id(answer: Answer) -> str:
    user = _ok(answer)["user_id"]
    if not isinstance(user, str) or not user.startswith("@"):
        raise ValueError("no user")
    return user
