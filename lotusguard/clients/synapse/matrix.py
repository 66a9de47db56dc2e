# SPDX-License-Identifier: Apache-2.0
"""The client-server API, which every homeserver has: what the guard's account does as a member of rooms.

``/sync`` has a dependency of its own, with its own connections: a long poll that hangs delays no other call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from secrets import token_hex
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from attrs import define, frozen

from lotusguard.clients.dependency import Dependency, DependencyRefused
from lotusguard.clients.http import Answer, json_object
from lotusguard.clients.synapse.access_token import AccessToken
from lotusguard.clients.synapse.answers import answered_at, joined_rooms, ok, read_user_id
from lotusguard.clients.synapse.sync_answer import MEMBER, SyncAnswer, read_sync
from lotusguard.clients.waiting import gather
from lotusguard.rules.membership import Membership
from lotusguard.rules.state import StateEvent

T = TypeVar("T")

POLL = 10.0
"""Seconds that the homeserver holds a ``/sync`` without news. A sync that hangs is noticed `SYNC_GRACE` later."""
SYNC_GRACE = 5.0
FIRST_SYNC = 60.0
"""Seconds that the first ``/sync``, or any other answer of the homeserver's, may take."""
SINCE_UNKNOWN = "since_unknown"
LARGEST_SYNC = 16 * 1024 * 1024
"""Bytes. Nothing else happens in the guard while an answer is parsed: 0.2 s for this one."""
_CLIENT = "/_matrix/client/v3"
MOST_EVENTS = 50
"""Events of a room's timeline in one answer; a gap before them is reported as such."""


@frozen
class Whoami:
    """Whose access token we have. :ivar device_id: ``""`` if the token belongs to no device."""

    user_id: str
    device_id: str


def sync_filter(
    types: Collection[str],
    state_types: Collection[str],
    *,
    most_events: int = MOST_EVENTS,
    rooms: Collection[str] | None = None,
    nonce: str = "",
) -> str:
    """A filter that reports these types only, of these rooms only.

    :param nonce: makes the filter another one. Synapse answers a full sync with the same filter from memory for two
        minutes, however old that answer is.

    State types are in both lists: a type that ``timeline`` lacks is reported nowhere, whatever ``state`` says. Member
    events are loaded lazily: a gap in a room of 50,000 members would otherwise be an answer of 25 MB. The members of a
    room are read by `MatrixClient.joined_members` after a gap.
    """
    nothing: dict[str, list[str]] = {"types": []}
    return json.dumps(
        {
            "presence": nothing,
            "account_data": {**nothing, **({"not_senders": [f"@{nonce}:lotusguard.invalid"]} if nonce else {})},
            "room": {
                "timeline": {"types": sorted({*types, *state_types}), "limit": most_events},
                "state": {"types": sorted(state_types), "lazy_load_members": True},
                "ephemeral": nothing,
                "account_data": nothing,
                **({} if rooms is None else {"rooms": sorted(rooms)}),
            },
        },
        separators=(",", ":"),
    )


@define(eq=False)
class MatrixClient:
    """The account's own calls. Every method raises `DependencyFailed` if there is no usable answer.

    :param calls: for everything but ``/sync``.
    :param long_polls: for ``/sync``; its timeout must be longer than `FIRST_SYNC`.
    :param token: the account's; it need not be an admin's.
    """

    _calls: Dependency
    _long_polls: Dependency
    token: AccessToken

    def __attrs_post_init__(self) -> None:
        self._calls.probe = lambda: self._whoami(self._calls)
        self._long_polls.probe = lambda: self._whoami(self._long_polls)

    @property
    def refused(self) -> str | None:
        """``status_401`` if the homeserver refused our access token and has not accepted it since."""
        return self._calls.refused or self._long_polls.refused

    # -- the account ---------------------------------------------------------------------------------------

    async def whoami(self) -> Whoami:
        """Whose access token we have. It is asked for even while the circuit is open."""
        return await self._whoami(self._calls)

    async def _whoami(self, dependency: Dependency) -> Whoami:
        def read(answer: Answer) -> Whoami:
            content = ok(answer)
            device = content.get("device_id")
            return Whoami(read_user_id(content["user_id"]), device if isinstance(device, str) else "")

        path = f"{_CLIENT}/account/whoami".encode("ascii")
        return await dependency.call(b"GET", path, self.token.headers, read=read, is_probe=True)

    async def devices(self) -> int:
        """How many devices the account has; 0 if the homeserver does not let it ask (an app-service's account)."""

        def read(answer: Answer) -> int:
            if answer.code in (400, 401, 403, 404):
                return 0
            return len([device for device in ok(answer)["devices"] if device["device_id"]])

        return await self._call("GET", f"{_CLIENT}/devices", read, expected=(400, 401, 403, 404))

    async def sync(self, user_id: str, since: str, room_filter: str, *, wait: bool) -> SyncAnswer:
        """What is new. The first answer, without ``since``, tells the whole state of all rooms.

        It asks for no presence, and does not make the account appear online. It deletes the to-device messages of the
        account's device, which nothing prevents: never call it for an account that somebody else uses too.

        :param wait: for something new, if there is nothing yet.
        :raises DependencyRefused: `SINCE_UNKNOWN`: the homeserver does not know our place in its stream; the next sync
            has to be a full one.
        """
        query = {"filter": room_filter, "set_presence": "offline", "timeout": str(int(POLL * 1000)) if wait else "0"}
        if since:
            query["since"] = since

        def read(answer: Answer) -> SyncAnswer | None:
            if since and answer.code in (400, 404):
                return None
            return read_sync(ok(answer), user_id, answered_at(answer))

        path = f"{_CLIENT}/sync?{urlencode(query)}".encode("ascii")
        answered = await self._long_polls.call(b"GET", path, self.token.headers, read=read)
        if answered is None:
            raise DependencyRefused(self._long_polls.name, SINCE_UNKNOWN)
        return answered

    # -- reading rooms -------------------------------------------------------------------------------------

    async def room_state(self, room_id: str, types: Collection[str]) -> Mapping[str, StateEvent]:
        """The state events of these types with the state key ``""``, without their senders."""
        kinds = list(types)
        contents = await gather(self._state(room_id, kind, "") for kind in kinds)
        return {kind: StateEvent(kind, content) for kind, content in zip(kinds, contents, strict=True) if content}

    async def membership(self, user_id: str, room_id: str) -> Membership:
        """A user's membership of a room that the account is in. The answer is meaningless for other rooms."""
        content = await self._state(room_id, MEMBER, user_id)
        return Membership.ABSENT if content is None else Membership(content["membership"])

    async def _state(self, room_id: str, kind: str, key: str) -> dict[str, Any] | None:
        """The content of a state event; None if there is no such event, or it is empty."""

        def read(answer: Answer) -> dict[str, Any] | None:
            if answer.code == 404 and json_object(answer).get("errcode") == "M_NOT_FOUND":
                return None
            content = ok(answer)
            if kind == MEMBER:
                Membership(content["membership"])
            return content

        path = f"{_room(room_id)}/state/{quote(kind, safe='')}/{quote(key, safe='')}"
        return await self._call("GET", path, read, turn=room_id)

    async def joined_rooms(self) -> list[str]:
        """The rooms that the account is in."""
        return await self._call("GET", f"{_CLIENT}/joined_rooms", joined_rooms)

    async def joined_members(self, room_id: str) -> frozenset[str]:
        """The IDs of the users joined to a room that the account is in. Large for large rooms."""

        def read(answer: Answer) -> frozenset[str]:
            return frozenset(read_user_id(user) for user in ok(answer)["joined"])

        return await self._call("GET", f"{_room(room_id)}/joined_members", read, turn=room_id)

    # -- acting in rooms -----------------------------------------------------------------------------------

    async def join(self, room_id: str) -> None:
        """Accept an invitation."""
        await self._call("POST", f"{_room(room_id)}/join", ok, {}, turn=room_id)

    async def leave(self, room_id: str) -> None:
        """Leave a room, or decline an invitation."""
        await self._call("POST", f"{_room(room_id)}/leave", ok, {}, turn=room_id)

    async def forget(self, room_id: str) -> None:
        """Have the homeserver forget a room that the account has left."""
        await self._call("POST", f"{_room(room_id)}/forget", ok, {}, turn=room_id)

    async def send(self, room_id: str, kind: str, content: Mapping[str, Any], transaction: str = "") -> str:
        """Send an event that is not state. :return: its event ID.

        :param transaction: names it. The homeserver takes the same name for the same event, and sends it once.
        """
        name = quote(transaction or token_hex(8), safe="")
        return await self._put(room_id, f"send/{quote(kind, safe='')}/{name}", content)

    async def redact(self, room_id: str, event_id: str) -> str:
        """Redact an event. :return: the ID of the redaction."""
        return await self._put(room_id, f"redact/{quote(event_id, safe='')}/{token_hex(8)}", {})

    async def put_state(self, room_id: str, kind: str, content: Mapping[str, Any]) -> str:
        """Write a state event with the state key ``""``. :return: its event ID."""
        return await self._put(room_id, f"state/{quote(kind, safe='')}/", content)

    async def _put(self, room_id: str, path: str, content: Mapping[str, Any]) -> str:
        def read(answer: Answer) -> str:
            event_id = ok(answer)["event_id"]
            if not isinstance(event_id, str) or not event_id:
                raise TypeError("event_id is not a string, or empty")
            return event_id

        return await self._call("PUT", f"{_room(room_id)}/{path}", read, content, turn=room_id)

    async def _call(
        self, method: str, path: str, read: Callable[[Answer], T], content: object = None, *, turn: str = "",
        expected: Collection[int] = (),
    ) -> T:  # fmt: skip
        """403 says that the account may not do this in this room; it says nothing about our access token."""
        body, headers = None, self.token.headers
        if content is not None:
            body, headers = json.dumps(content).encode("utf-8"), self.token.json_headers
        return await self._calls.call(
            method.encode("ascii"), path.encode("ascii"), headers, body, read=read, turn=turn,
            expected=(403, *expected),
        )  # fmt: skip


def _room(room_id: str) -> str:
    return f"{_CLIENT}/rooms/{quote(room_id, safe='')}"
