# SPDX-License-Identifier: Apache-2.0
"""A step on a room costs the same however many people are in it."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest
from attrs import define, field

from lotusguard.clients.redis.client import Script
from lotusguard.guard.seats.redis.scripts import IDLE_ROOM, NEWS_KEPT, STEP, room_key, room_keys

from .server import shared_client

ALIAS, LIMIT, TTL = "alias", 1_000_000, 30.0
SMALL, LARGE = 10, 1_000
_COUNTED = """
local server, work = redis, 0
local function size(value)
  if type(value) ~= 'table' then return 1 end
  local sum = 0
  for _, item in ipairs(value) do sum = sum + size(item) end
  return sum
end
local redis = {call = function(...)
  local answer = server.call(...)
  work = work + select('#', ...) + size(answer)
  server.call('SET', 'test:work', work)
  return answer
end}
"""
"""Lua that counts what a script asks of Redis: the words of all commands, and of all answers."""
COUNTED = Script(_COUNTED + STEP.text)
_rooms = count(1)


@define(eq=False)
class RoomOf:
    """A call of so many people. Each step tells what it has cost."""

    people: int
    name: str = field(init=False, factory=lambda: f"!of{next(_rooms)}")
    work: int = field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        for _ in range(2):
            self.listed(range(self.people))

    def step(self, *operation: Any) -> Any:
        request = {
            "epoch": "e", "confirmed": False, "complete": True, "guarding_since": 0.0, "remembered_since": 0.0,
            "room_id": self.name, "operations": [operation],
        }  # fmt: skip
        keys = room_keys(self.name)
        answer = shared_client().eval(COUNTED.text, len(keys), *keys, json.dumps(request))
        self.work = int(shared_client().get("test:work"))
        return json.loads(answer)[-1][0]

    @property
    def now(self) -> float:
        seconds, microseconds = shared_client().time()
        return float(seconds + microseconds / 1e6)

    def listed(self, users: Any) -> Any:
        present = [[f"PA_{user}", f"identity {user}", f"@{user}:x", 1.0] for user in users]
        return self.step("apply_listing", ALIAS, present, LIMIT, self.now, TTL)

    def taken(self, user: str, limit: int = LIMIT, number: str | None = None) -> Any:
        return self.step("take", f"hold of {user}", user, limit, ALIAS, False, None, 4.5, number)

    def issued(self, user: str) -> Any:
        return self.step("issue", f"hold of {user}", user, ALIAS, f"identity {user}", "PHONE", TTL)


def _costs(room: RoomOf) -> dict[str, int]:
    """What each step on a room costs."""
    version, costs = room.listed(range(room.people)), dict[str, int]()
    number, _, _ = room.step("occupants", None)

    def note(name: str, answer: Any, expected: Any) -> None:
        assert answer == expected
        costs[name] = room.work

    note("an unchanged listing", room.step("listed_again", ALIAS, LIMIT, room.now, version), True)
    for user in ("@new:x", "@newer:x"):
        note("a join", room.taken(user), ["", False])
        room.step("renew", [f"hold of {user}"], 4.5)
        costs["a renewal"] = room.work
        note("a token", room.issued(user)[:2], [user, "issued"])
        arrival = [f"PA_{user}", f"identity {user}", user, room.now]
        note("an arrival", room.step("arrive", ALIAS, arrival, LIMIT), True)
        note("a question about a seat", room.step("owns_seat", user), True)
        note("a departure", room.step("leave", ALIAS, f"PA_{user}", f"identity {user}", room.now, True), True)
        note("no removal", room.step("overflow", LIMIT), {})
        room.taken(f"{user}.org")
        note("a release", room.step("release", f"hold of {user}.org"), True)
        note("a refusal", room.taken("@late:x", room.people, number)[0], "full")
        note("a question about nothing", room.step("nothing"), True)
    number, _, _ = room.step("occupants", None)
    room.taken("@newest:x")
    note("a change of the occupants", room.step("occupants", number)[1:], [False, [["@newest:x", True]]])
    return costs


def test_a_step_on_a_large_room_asks_redis_for_no_more_than_one_on_a_small_room() -> None:
    small, large = _costs(RoomOf(SMALL)), _costs(RoomOf(LARGE))
    assert large == small


def test_a_listing_of_all_does_cost_more() -> None:
    costs = []
    for people in (SMALL, LARGE):
        room = RoomOf(people)
        room.listed(range(people))
        costs.append(room.work)
    assert costs[1] > 20 * costs[0], "what the other test measures"


def test_all_occupants_are_told_to_a_guard_that_has_missed_many_changes() -> None:
    room = RoomOf(SMALL)
    number, _, _ = room.step("occupants", None)
    for change in range(NEWS_KEPT // 2):
        room.taken(f"@{change}:y")
        room.step("release", f"hold of @{change}:y")
    assert len(room.step("occupants", number)[2]) == 2 * (NEWS_KEPT // 2)
    room.taken("@one:y")
    room.taken("@another:y")
    _, whole, changes = room.step("occupants", number)
    assert sorted(whole) == sorted([*(f"@{user}:x" for user in range(SMALL)), "@one:y", "@another:y"])
    assert not changes


def test_what_a_room_leaves_in_redis_does_not_grow_with_who_was_there() -> None:
    room = RoomOf(SMALL)
    for user in range(3 * NEWS_KEPT):
        room.taken(f"@{user}:y")
        room.step("release", f"hold of @{user}:y")
    fields = [len(name) for name in shared_client().hkeys(room_key(room.name))]
    assert len(fields) < 2 * NEWS_KEPT


def test_a_room_that_was_deleted_begins_anew_whatever_is_left_of_it() -> None:
    room = RoomOf(SMALL)
    room.taken("@a:y")
    room.issued("@a:y")
    client = shared_client()
    client.delete(room_key(room.name))
    assert any(client.exists(key) for key in room_keys(room.name))
    assert room.step("snapshot")[:2] == [True, 0]
    assert room.taken("@b:y", 1) == ["", False]
    room.issued("@b:y")
    assert room.taken("@c:y", 1)[0] == "full"
    assert room.step("snapshot")[:3] == [False, 1, ["@b:y"]]


@pytest.mark.parametrize("people", [0, SMALL])
def test_all_keys_of_a_room_end_together(people: int) -> None:
    room = RoomOf(people)
    if not people:
        room.step("leave", ALIAS, "PA_gone", "gone", room.now, True)
    client = shared_client()
    left = {client.ttl(key) for key in room_keys(room.name) if client.exists(key)}
    assert max(left) - min(left) <= 1
    assert (max(left) <= IDLE_ROOM) is (not people)
