# SPDX-License-Identifier: Apache-2.0
"""``/sync`` and filters. Sandbox.

Read from Synapse 1.163's ``rest/client/sync.py`` and ``handlers/sync.py``. As there, a state event is reported in the
timeline if ``room.timeline.types`` has its type, and else nowhere: the ``state`` section of an incremental sync
only covers the gap before a limited timeline.
"""

from __future__ import annotations

import json
from typing import Any

from attrs import Factory, define
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from lotusguard.sandbox.synapse.errors import error, forbidden, json_object, query
from lotusguard.sandbox.synapse.event_filter import SyncFilter
from lotusguard.sandbox.synapse.matrix import Login, Matrix
from lotusguard.sandbox.synapse.sync_rooms import SECTIONS, Span
from lotusguard.sandbox.wire import Asked

ROUTES = {
    "sync": r"/_matrix/client/(?:v3|r0)/sync",
    "create_filter": r"/_matrix/client/(?:v3|r0)/user/([^/]*)/filter",
    "get_filter": r"/_matrix/client/(?:v3|r0)/user/([^/]*)/filter/([^/]*)",
}
METHODS = {"create_filter": ("POST",)}


@define
class SyncApi:
    """``/sync`` for every login.

    :ivar presence: the latest ``set_presence`` by user ID; ``online`` if the client named none.
    """

    matrix: Matrix
    clock: IReactorTime
    presence: dict[str, str] = Factory(dict)
    _filters: dict[str, list[dict[str, Any]]] = Factory(dict)
    _to_device: dict[Login, list[tuple[int, dict[str, Any]]]] = Factory(dict)
    _waiting: list[Deferred[None]] = Factory(list)
    _wake_is_due: bool = False

    def __attrs_post_init__(self) -> None:
        self.matrix.on_event.append(self._wake_later)

    async def answer(self, login: Login, route: str, asked: Asked, groups: list[str]) -> dict[str, Any]:
        if route == "sync":
            return await self._sync(login, asked)
        if groups[0] != login.user_id:
            raise forbidden("Cannot create filters for other users")
        filters = self._filters.setdefault(login.user_id, [])
        if route == "create_filter":
            filters.append(json_object(asked))
            return {"filter_id": str(len(filters) - 1)}
        return self._stored_filter(login, groups[1])

    def send_to_device(self, token: str, type: str, content: dict[str, Any], sender: str) -> None:
        """Queue a to-device message. The next ``/sync`` delivers it, the one after that deletes it."""
        self.matrix.position += 1
        message = {"type": type, "content": content, "sender": self.matrix.user_id(sender)}
        self._to_device.setdefault(self.matrix.logins[token], []).append((self.matrix.position, message))
        self._wake_later()

    async def _sync(self, login: Login, asked: Asked) -> dict[str, Any]:
        given = query(asked)
        since, wanted = _position(given.get("since")), self._filter(login, given.get("filter", "{}"))
        self.presence[login.user_id] = given.get("set_presence", "online")
        ends = self.clock.seconds() + int(given.get("timeout", "0")) / 1000
        while True:
            answer = self._compute(login, wanted, Span(since, self.matrix.position))
            left = ends - self.clock.seconds()
            if since is None or left <= 0 or "rooms" in answer or "to_device" in answer:
                return answer
            await self._wait(left)

    async def _wait(self, seconds: float) -> None:
        """Wait for the next event, at most so long."""
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        timer = self.clock.callLater(seconds, self._wake_one, waiting)
        try:
            await waiting
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            if timer.active():
                timer.cancel()

    def _wake_one(self, waiting: Deferred[None]) -> None:
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            waiting.callback(None)

    def _wake_later(self) -> None:
        """Wake all once the caller is done: what belongs to the event, such as module callbacks, comes first."""
        if self._waiting and not self._wake_is_due:
            self._wake_is_due = True
            self.clock.callLater(0, self._wake)

    def _wake(self) -> None:
        self._wake_is_due = False
        for waiting in list(self._waiting):
            self._wake_one(waiting)

    # -- filters -------------------------------------------------------------------------------------------

    def _filter(self, login: Login, given: str) -> SyncFilter:
        try:
            value = json.loads(given) if given.startswith("{") else self._stored_filter(login, given)
            return SyncFilter.of_json(value)
        except (ValueError, AttributeError):
            raise error(400, "M_INVALID_PARAM", "Invalid filter JSON") from None

    def _stored_filter(self, login: Login, filter_id: str) -> dict[str, Any]:
        filters = self._filters.get(login.user_id, [])
        if not filter_id.isdecimal() or int(filter_id) >= len(filters):
            raise error(400, "M_INVALID_PARAM", "No such filter")
        return filters[int(filter_id)]

    # -- one answer ----------------------------------------------------------------------------------------

    def _compute(self, login: Login, wanted: SyncFilter, span: Span) -> dict[str, Any]:
        rooms: dict[str, dict[str, Any]] = {}
        for room_id, room in self.matrix.rooms.items():
            membership = room.membership(login.user_id)
            if membership not in SECTIONS or not wanted.wants(room_id) or login.user_id in room.forgotten_by:
                continue
            section, report = SECTIONS[membership]
            entry = report(room, login.user_id, wanted, span)
            if entry is not None:
                rooms.setdefault(section, {})[room_id] = entry
        answer: dict[str, Any] = {"next_batch": f"s{span.until}"}
        if rooms:
            answer["rooms"] = rooms
        messages = self._take_to_device(login, span)
        if messages:
            answer["to_device"] = {"events": messages}
        return answer | {"device_one_time_keys_count": {"signed_curve25519": 0}}

    def _take_to_device(self, login: Login, span: Span) -> list[dict[str, Any]]:
        kept = [one for one in self._to_device.get(login, ()) if span.since is None or one[0] > span.since]
        self._to_device[login] = kept
        return [message for _, message in kept]


def _position(since: str | None) -> int | None:
    if since is None:
        return None
    if not since.startswith("s") or not since[1:].isdecimal():
        raise error(400, "M_UNKNOWN", "Invalid stream token")
    return int(since[1:])
