# SPDX-License-Identifier: Apache-2.0
"""The lobby's rules as they run in Valkey, behind the interface of `LobbyBook`. The time is an argument."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

from attrs import define, field

from lotusguard.guard.lobby.redis.script import lobby_script
from lotusguard.rules.lobby import LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import Answer, LobbyBook

from .server import shared_client

TIME_FROM_ARGUMENT = """
local real, redis = redis, {}
function redis.call(command, ...)
  if command == 'TIME' then return {ARGV[2], '0'} end
  return real.call(command, ...)
end
"""
_books = count(1)


@define(eq=False)
class ValkeyBook:
    """See `LobbyBook`."""

    longest_wait: float
    events: list[str] = field(factory=list)
    _key: str = field(init=False)
    _sha: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._key = f"test:{{lobby{next(_books)}}}"
        self._sha = shared_client().script_load(TIME_FROM_ARGUMENT + lobby_script().text)

    def run(self, now: float, *operation: Any) -> Any:
        request = {"guard": "", "longest_wait": self.longest_wait, "operations": [operation]}
        told = shared_client().evalsha(self._sha, 1, self._key, json.dumps(request), repr(now))
        _, _, _, changes, (result,) = json.loads(told)
        self.events += [event for _, _, event, _, _ in changes if event]
        return result

    def happen(
        self, event: LobbyEvent, room_id: str, user: str, entry_id: str, now: float, *, local: bool = False
    ) -> Answer:
        applied, entry, full = self.run(now, "happen", event.value, room_id, user, entry_id, local)
        return Answer(bool(applied), _entry(entry), bool(full))

    def happen_in_room(self, event: LobbyEvent, room_id: str, now: float) -> None:
        self.run(now, "happen_in_room", event.value, room_id)

    def find(self, room_id: str, user: str, now: float) -> LobbyEntry | None:
        return _entry(self.run(now, "read", room_id, user))

    def pass_time(self, now: float) -> None:
        self.run(now, "pass_time")

    def hold(self, room_id: str, user: str, now: float) -> None:
        self.run(now, "hold", [[room_id, user]])

    @property
    def waiting_in_all(self) -> int:
        return int(shared_client().hget(self._key + ":waiting", "") or 0)


@define(eq=False)
class MemoryBook(LobbyBook):
    """`LobbyBook`, and what tests do to it."""

    def hold(self, room_id: str, user: str, now: float) -> None:
        entry = self.find(room_id, user, now)
        if entry is not None:
            entry.held = 1

    @property
    def events(self) -> list[str]:
        return [change.event.value for change in self.changes if change.event is not None]


AnyBook = MemoryBook | ValkeyBook


def _entry(told: Any) -> LobbyEntry | None:
    if not told:
        return None
    return LobbyEntry(told["id"], told["user"], LobbyState(told["state"]), told["began"], told["expires"])
