# SPDX-License-Identifier: Apache-2.0
"""Names of rooms, as people know them. They are read in the background: no page waits for them."""

from __future__ import annotations

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.guard.rooms.source import RoomStateSource

log = Logger()

NAME, ALIAS = "m.room.name", "m.room.canonical_alias"
NAMES_KEPT = 5_000
LONGEST_NAME = 80
"""Characters of a name that are shown."""
READ_AGAIN = 600.0
"""Seconds after which a name is read again, if it is still wanted."""
AT_ONCE = 2


@define
class _Known:
    """:ivar name: "" for none. :ivar at: when it was asked for."""

    name: str
    at: float


@define(eq=False)
class RoomNames:
    """The name of a room, else its alias, as far as they are known."""

    _source: RoomStateSource
    _clock: IReactorTime
    _known: LRUCache[str, _Known] = field(factory=lambda: LRUCache(NAMES_KEPT), init=False)
    _reader: KeyedWorker[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._reader = KeyedWorker(self._read, AT_ONCE, _failed)

    def of(self, room_id: str) -> str:
        """What is known now; "" if nothing is. What is missing or old is read soon."""
        known = self._known.get(room_id)
        now = self._clock.seconds()
        if known is None or now - known.at >= READ_AGAIN:
            self._known[room_id] = _Known(known.name if known is not None else "", now)
            self._reader.run(room_id, urgent=False)
        return known.name if known is not None else ""

    async def _read(self, room_id: str) -> None:
        events = await self._source.room_state(room_id, (NAME, ALIAS)) or {}
        found = ""
        for kind, key in ((ALIAS, "alias"), (NAME, "name")):
            event = events.get(kind)
            text = event.mapping.get(key) if event is not None else None
            if isinstance(text, str) and text.strip():
                found = " ".join(text.split())
        shown = found if len(found) <= LONGEST_NAME else f"{found[: LONGEST_NAME - 1]}…"
        self._known[room_id] = _Known(shown, self._clock.seconds())


def _failed(room_id: str, failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.debug("the name of {room_id} was not read: {reason}", room_id=room_id, reason=failure.getErrorMessage())
    else:
        log.failure("reading the name of {room_id} failed", failure, room_id=room_id)
