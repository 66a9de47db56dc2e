# SPDX-License-Identifier: Apache-2.0
"""The seats of one room as Lua rules in Valkey, behind the interface of `RoomSeats`, and both side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from itertools import count
from typing import Any, Protocol

from lotusguard.guard.seats.redis.scripts import room_keys, with_rules
from lotusguard.rules.refusals import Refusal
from lotusguard.rules.room_seats import RoomSeats
from lotusguard.rules.seats import Arrival, Hold, HoldState, IdentityKey, Session

from .server import shared_client

_RUN = """
local call = cjson.decode(ARGV[1])
local function or_nil(value) if value == cjson.null then return nil end return value end
now = 0
Store.open(Seats.new(call.unlimited_at, ''))
now = or_nil(call.now) or 0
if or_nil(call.now) then Seats.advance() end

-- what only one guard alone does, or only a test asks
function Seats.users() return names_of(Store.all('s')) end
function Seats.is_exempt(user) return user_of(user).exempt == true end
function Seats.restore_present(hold_id, user, alias, identity, ended, device)
  put_reserved(key_of(alias, identity), {
    id = hold_id, user = user, state = 'left', alias = alias, identity = identity, sid = '', began = now,
    expires = math.min(now, ended), device = device,
  })
  room.vacated = math.max(room.vacated, now)
end

local given = {}
for place = 1, call.size do given[place] = or_nil(call.arguments[place]) end
if call.name == 'arrive' then given[2].joined = or_nil(given[2].joined) end
if call.name == 'apply_listing' then
  for _, who in ipairs(given[2]) do who.joined = or_nil(who.joined) end
end
local answer = Seats[call.name](unpack(given, 1, call.size))
local function precise(value)
  if type(value) == 'number' then return {number = string.format('%.17g', value)} end
  if type(value) ~= 'table' then return value end
  local copy = {}
  for key, item in pairs(value) do copy[key] = precise(item) end
  return copy
end
local holds = in_order(all_holds())
Seats.close(600)
if answer == nil then answer = cjson.null end
return cjson.encode({answer = precise(answer), holds = precise(holds), listed = precise(room.listed),
                      vacated = precise(room.vacated), version = room.version})
"""
RUN = with_rules(_RUN)
_rooms = count(1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"number"}:
            return float(value["number"])
        if not value:
            return []
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _hold(fields: dict[str, Any]) -> Hold:
    names = ("id", "user", "alias", "identity", "sid", "began", "expires")
    return Hold(state=HoldState(fields["state"]), **{name: fields[name] for name in names})


class Seats(Protocol):
    """What the rule tests use of a room."""

    sessions: dict[Session, Hold]
    reserved: dict[IdentityKey, Hold]
    pending: dict[str, Hold]


class ValkeySeats:
    """A room whose rules run in Valkey. The time is an argument, as in `RoomSeats`."""

    def __init__(self, unlimited_at: float) -> None:
        self._keys = room_keys(f"test {next(_rooms)}")
        self._unlimited_at = unlimited_at
        self._sha = shared_client().script_load(RUN.text)
        self.holds: list[Hold] = []
        self.vacated = 0.0
        self._listed: dict[str, float] = {}
        self._version = 0
        self._settled: dict[str, int] = {}

    def _run(self, name: str, now: float | None, *arguments: object) -> Any:
        call = {
            "name": name, "now": now, "arguments": arguments, "size": len(arguments),
            "unlimited_at": self._unlimited_at,
        }  # fmt: skip
        told = json.loads(shared_client().evalsha(self._sha, len(self._keys), *self._keys, json.dumps(call)))
        self.holds = [_hold(hold) for hold in _plain(told["holds"])]
        self.vacated = _plain(told["vacated"])
        self._version = told["version"]
        listed = _plain(told["listed"])
        self._listed = dict(listed) if listed else {}
        return _plain(told["answer"])

    @property
    def sessions(self) -> dict[Session, Hold]:
        return {Session(hold.alias, hold.sid): hold for hold in self.holds if hold.rules.in_call}

    @property
    def pending(self) -> dict[str, Hold]:
        return {hold.id: hold for hold in self.holds if hold.state is HoldState.PENDING}

    @property
    def reserved(self) -> dict[IdentityKey, Hold]:
        return {
            IdentityKey(hold.alias, hold.identity): hold
            for hold in self.holds
            if hold.state is not HoldState.PENDING and not hold.rules.in_call
        }

    def take(
        self, hold_id: str, user: str, limit: int | None, alias: str, now: float, *, exempt: bool = False,
        slots: int | None = None,
    ) -> Refusal | None:  # fmt: skip
        refusal = self._run("take", now, hold_id, user, limit, alias, exempt, slots, None)
        return None if refusal is None else Refusal(refusal)

    def issue(self, hold_id: str, alias: str, identity: str, now: float, ttl: float, device: str = "") -> Hold | None:
        hold = self._run("issue", now, hold_id, alias, identity, ttl, device)
        return None if hold is None else _hold(hold)

    def issue_without_seat(
        self, hold_id: str, user: str, alias: str, identity: str, now: float, ttl: float, device: str = ""
    ) -> Hold:
        return _hold(self._run("issue_without_seat", now, hold_id, user, alias, identity, ttl, device))

    def release(self, hold_id: str) -> None:
        self._run("release", None, hold_id)

    def arrive(self, alias: str, who: Arrival, limit: int | None, now: float) -> None:
        self._run("arrive", now, alias, _fields(who), limit)

    def leave(self, alias: str, sid: str, identity: str, now: float, left_by: float, *, by_choice: bool) -> None:
        self._run("leave", now, alias, sid, identity, left_by, by_choice)

    def apply_listing(
        self, alias: str, present: Collection[Arrival], limit: int | None, since: float, now: float
    ) -> None:
        self._settled.pop(alias, None)
        if self._run("apply_listing", now, alias, [_fields(who) for who in present], limit, since):
            self._settled[alias] = self._version

    def listed_again(self, alias: str, limit: int | None, since: float, now: float) -> bool:
        self._run("seats_taken", now)
        is_same = self._settled.get(alias) == self._version and since >= self._listed.get(alias, since)
        if is_same:
            self._run("listed_again", now, alias, limit, since)
        return is_same

    def overflow(self, limit: int | None, now: float) -> list[Hold]:
        return [_hold(hold) for hold in self._run("overflow", now, limit)]

    def seat_everybody(self) -> None:
        self._run("seat_everybody", None)

    def exempt(self, user: str) -> None:
        self._run("exempt", None, user)

    def rename(self, key: IdentityKey, user: str) -> None:
        self._run("rename", None, key.alias, key.identity, user)

    def restore_issued(
        self, hold_id: str, user: str, key: IdentityKey, now: float, expires: float, device: str = ""
    ) -> None:
        self._run("restore_issued", now, hold_id, user, key.alias, key.identity, expires, device)

    def restore_present(
        self, hold_id: str, user: str, key: IdentityKey, now: float, ended: float, device: str = ""
    ) -> None:
        self._run("restore_present", now, hold_id, user, key.alias, key.identity, ended, device)

    def owns_seat(self, user: str) -> bool:
        return bool(self._run("owns_seat", None, user))

    def is_exempt(self, user: str) -> bool:
        return bool(self._run("is_exempt", None, user))

    def seats_taken(self, now: float) -> int:
        return int(self._run("seats_taken", now))

    def users(self) -> set[str]:
        return set(self._run("users", None))

    def awaited(self, now: float) -> set[str]:
        return set(self._run("awaited", now))

    def occupants(self, now: float) -> set[str]:
        return set(self._run("occupants", now))

    def is_idle(self, now: float) -> bool:
        return bool(self._run("is_idle", now))

    def is_occupied(self, now: float) -> bool:
        return bool(self._run("is_occupied", now))

    def forget_old(self, now: float, ttl: float) -> None:
        self._run("forget_old", now, 0.0)

    def aliases(self) -> set[str]:
        return set(self._run("aliases", None))

    def listed_since(self, aliases: Iterable[str]) -> float | None:
        listed = [self._listed.get(alias) for alias in aliases]
        return None if None in listed else min((at for at in listed if at is not None), default=None)

    def listing_required_since(self, now: float) -> float | None:
        required = self._run("listing_required_since", now)
        return None if required is None else float(required)


def _fields(who: Arrival) -> dict[str, object]:
    return {"sid": who.sid, "identity": who.identity, "user": who.user, "joined": who.joined}


class ComparedSeats:
    """`RoomSeats` and `ValkeySeats` side by side: each call goes to both, and what comes of it has to be the same."""

    def __init__(self, unlimited_at: float) -> None:
        self.memory = RoomSeats(unlimited_at)
        self.valkey = ValkeySeats(unlimited_at)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.memory, name)
        return self._both(name) if callable(value) else value

    def _both(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = getattr(self.memory, name)(*args, **kwargs)
            other = getattr(self.valkey, name)(*args, **kwargs)
            assert _comparable(other) == _comparable(answer), name
            assert _comparable(self.valkey.holds) == _comparable(_holds(self.memory)), name
            assert self.valkey.vacated == self.memory.vacated, name
            return answer

        return call


def _holds(seats: RoomSeats) -> list[Hold]:
    return [*seats.pending.values(), *seats.reserved.values(), *seats.sessions.values()]


def _comparable(answer: Any) -> Any:
    if isinstance(answer, Hold):
        hold = answer
        return (hold.id, hold.user, hold.state, hold.alias, hold.identity, hold.sid, hold.began, hold.expires)
    if isinstance(answer, list):
        return sorted((_comparable(item) for item in answer), key=repr)
    return answer
