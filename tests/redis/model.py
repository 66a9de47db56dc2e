# SPDX-License-Identifier: Apache-2.0
"""One room by the rules in Python, which does what Valkey is seen to do: both must come to the same."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from attrs import define, field

from lotusguard.guard.seats.redis.scripts import LISTING_KEPT, room_key, room_keys, with_rules
from lotusguard.rules.listings import Listings
from lotusguard.rules.room_seats import RoomSeats
from lotusguard.rules.seats import Arrival, HoldEvent, HoldState, IdentityKey

from .direct import Server


@define
class ModelSeats(RoomSeats):
    """The rules, and what only the shared book does.

    :ivar listed: when each SFU room was listed last.
    """

    listed: dict[str, float] = field(factory=dict, init=False)

    def distrust(self) -> None:
        """Another data set."""
        for hold_id in list(self.pending):
            self.release(hold_id)
        self._listings = Listings()
        self.listed.clear()

    def seat_sessions(self, key: IdentityKey, user: str) -> None:
        """A guard gives back a hold whose user is in the call."""
        self.rename(key, user)
        for hold in list(self._sessions_of.get(key, ())):
            if hold.state is HoldState.UNSEATED:
                self._move(hold, HoldEvent.SEAT)

    def seat_failed_open(self, limit: int) -> None:
        """Somebody looks for a seat: tokens of a guard that was alone come first."""
        if self.listed:
            self._seat_failed_open(limit)

    def note_listing(self, alias: str, limit: int | None, since: float, now: float) -> None:
        self._note_listing(alias, limit, since, now)

    def _note_listing(self, alias: str, limit: int | None, since: float, now: float) -> None:
        self.listed[alias] = since
        super()._note_listing(alias, limit, since, now)

    def advance(self, now: float) -> None:
        self._advance(now)

    def forget_old(self, now: float, ttl: float) -> None:
        """Another guard may rely on a recent listing of an SFU room in which nobody holds a seat."""
        super().forget_old(now, ttl)
        for alias, since in list(self.listed.items()):
            if since >= now - LISTING_KEPT:
                self._listings.note(alias, since)
            elif alias not in self._listings:
                del self.listed[alias]


@define
class _State:
    """:ivar settled: versions that Redis told when a listing told nothing new → the version here."""

    seats: ModelSeats
    leases: dict[str, float] = field(factory=dict)
    epoch: str = ""
    before: str = ""
    made: bool = False
    settled: dict[str, int] = field(factory=dict)


@define(eq=False)
class RoomModel:
    """Replays each step that Valkey carries out on a room, and compares who owns a seat afterwards."""

    room: str
    server: Server
    seat_ttl: float
    _now: _State = field(init=False, factory=lambda: _State(ModelSeats(0.0)))
    _complete: bool = field(init=False, default=False)
    _saved: _State = field(init=False, factory=lambda: _State(ModelSeats(0.0)))

    def save(self) -> None:
        self._saved = deepcopy(self._now)

    def restore(self, *, older: bool) -> None:
        self._now = deepcopy(self._saved) if older else _State(ModelSeats(0.0))

    def owners(self) -> set[str]:
        """Who owns a seat, as of the last step."""
        seats = self._now.seats
        return {user for user in "abcd" if seats.owns_seat(user)}

    def pending_at(self, now: float) -> set[str]:
        return {hold_id for hold_id in self._now.seats.pending if self._now.leases.get(hold_id, 0.0) > now}

    def replay(self, key: str, text: str) -> None:
        if key != room_key(self.room):
            return
        request, now = json.loads(text), round(self.server.now, 6)
        state = self._now
        if not state.made and all(operation[0] in READING for operation in request["operations"]):
            return  # it leaves nothing behind
        if state.made and state.before == request["epoch"] and not request["confirmed"]:
            return  # rejected: the guard does not know of the new data set yet
        if not state.made:
            state.seats, state.epoch, state.made = ModelSeats(request["guarding_since"]), request["epoch"], True
            state.seats.vacated = now
        answer = json.loads(self.server.answered)
        if answer == ["changed"]:
            return  # nothing was done
        before = state.seats.version
        self._advance(now)
        writes = any(operation[0] not in READING for operation in request["operations"])
        if not writes and state.seats.version == before and state.epoch == request["epoch"]:
            return
        if state.epoch != request["epoch"]:
            state.seats.distrust()
            state.before, state.epoch = state.epoch, request["epoch"]
        for (name, *arguments), result in zip(request["operations"], answer[-1], strict=True):
            if name not in READING:
                self._complete = request["complete"]
                getattr(self, f"_{name}")(now, *arguments)
            if name == "apply_listing" and result:
                state.settled[result] = state.seats.version
        self._compare()

    def _advance(self, now: float) -> None:
        seats = self._now.seats
        seats.advance(now)
        for hold_id in [hold_id for hold_id in seats.pending if self._now.leases.get(hold_id, now + 1) <= now]:
            seats.release(hold_id)

    def _compare(self) -> None:
        keys = room_keys(self.room)
        found = {tuple(hold) for hold in json.loads(self.server.client.eval(_SHOW.text, len(keys), *keys))}
        seats = self._now.seats
        holds = [*seats.pending.values(), *seats.reserved.values(), *seats.sessions.values()]
        assert found == {(hold.user, hold.state.value) for hold in holds}

    # -- the operations of step.lua ----------------------------------------------------------------------

    def _take(
        self, now: float, hold_id: str, user: str, limit: Any, alias: str, exempt: bool, slots: Any, lease: float,
        known: Any,
    ) -> None:  # fmt: skip
        seats = self._now.seats
        to_give = self._seats_to_give(limit)
        if to_give is not None:
            seats.seat_failed_open(to_give)
        known = hold_id in seats.pending or any(
            hold.id == hold_id for hold in (*seats.reserved.values(), *seats.sessions.values())
        )
        if not known:
            seats.take(hold_id, user, limit, alias, now, exempt=exempt, slots=slots)
            self._now.leases[hold_id] = now + lease

    def _issue(self, now: float, hold_id: str, user: str, alias: str, identity: str, device: str, ttl: float) -> None:
        seats = self._now.seats
        if seats.issue(hold_id, alias, identity, now, ttl, device) is None:
            self._issue_without_seat(now, hold_id, user, alias, identity, device, ttl)
        seats.forget_old(now, ttl)

    def _issue_without_seat(
        self, now: float, hold_id: str, user: str, alias: str, identity: str, device: str, ttl: float
    ) -> None:
        seats = self._now.seats
        if not any(hold.id == hold_id for hold in (*seats.reserved.values(), *seats.sessions.values())):
            seats.issue_without_seat(hold_id, user, alias, identity, now, ttl, device)

    def _release(self, now: float, hold_id: str) -> None:
        self._now.seats.release(hold_id)

    def _renew(self, now: float, hold_ids: list[str], lease: float) -> None:
        for hold_id in hold_ids:
            self._now.leases[hold_id] = now + lease

    def _restore(
        self,
        now: float,
        hold_id: str,
        user: str,
        alias: str,
        identity: str,
        expires: float,
        seated: bool,
        device: str,
    ) -> None:
        seats, key = self._now.seats, IdentityKey(alias, identity)
        if expires <= now:
            return
        if seated:
            seats.seat_sessions(key, user)
        if seats.find(key) is not None:
            return
        if seated:
            if all(hold.id != hold_id for hold in (*seats.reserved.values(), *seats.sessions.values())):
                seats.restore_issued(hold_id, user, key, now, expires, device)
        else:
            seats.issue_without_seat(hold_id, user, alias, identity, now, expires - now, device)

    def _arrive(self, now: float, alias: str, who: list[Any], limit: Any) -> None:
        self._now.seats.arrive(alias, Arrival(*who), self._seats_to_give(limit), now)

    def _leave(self, now: float, alias: str, sid: str, identity: str, left_by: float, by_choice: bool) -> None:
        self._now.seats.leave(alias, sid, identity, now, left_by, by_choice=by_choice)

    def _apply_listing(self, now: float, alias: str, present: list[list[Any]], limit: Any, since: float) -> None:
        seats = self._now.seats
        limit = self._seats_to_give(limit)
        seats.apply_listing(alias, [Arrival(*who) for who in present], limit, min(since, now), now)
        seats.forget_old(now, self.seat_ttl)

    def _listed_again(self, now: float, alias: str, limit: Any, since: float, version: str) -> None:
        assert self._now.settled[version] == self._now.seats.version, "something has changed since that listing"
        self._now.seats.note_listing(alias, limit, min(since, now), now)

    def _overflow(self, now: float, limit: Any) -> None:
        if limit is None or self._complete:
            self._now.seats.overflow(limit, now)

    def _seats_to_give(self, limit: int | None) -> int | None:
        """None while other guards may have holds to give back."""
        return limit if limit is None or self._complete else 0


READING = ("owns_seat", "occupants", "listing_required_since", "is_started", "nothing", "snapshot")
_SHOW = with_rules("""
local shown = {}
for place, hold in ipairs(all_holds()) do shown[place] = {hold.user, hold.state} end
return #shown > 0 and cjson.encode(shown) or '[]'
""")
