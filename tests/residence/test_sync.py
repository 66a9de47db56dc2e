# SPDX-License-Identifier: Apache-2.0
"""How the guard follows /sync: what it asks for after answers that are too large, stuck, lost or hostile. In memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import pytest
from attrs import Factory, define
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from lotusguard.clients.dependency import DependencyFailed, DependencyRefused
from lotusguard.clients.synapse.matrix import FIRST_SYNC, SINCE_UNKNOWN, Whoami
from lotusguard.clients.synapse.sync_answer import RoomEvent, SyncAnswer, read_sync
from lotusguard.guard.rooms.residence import residence as bounds
from lotusguard.guard.rooms.residence.account import GuardAccount, Invites
from lotusguard.guard.rooms.residence.events import RoomEvents
from lotusguard.guard.rooms.residence.invites import InviteHandler
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.guard.rooms.residence.sync import PATIENCE, ROOMS_A_PART, TIMELINES, SyncService
from lotusguard.guard.rooms.residence.voice import ResidentVoice
from lotusguard.metrics import Metrics
from lotusguard.rules.state import StateEvent

GUARD, ALICE, MALLORY = "@guard:here", "@alice:here", "@mallory:there"
ROOM = "!room:here"
LIMIT = "io.lotus.voice_limit"
Script = SyncAnswer | DependencyFailed | None
"""Answers of the homeserver, one after the other. At ``None`` it does not answer."""


def event(kind: str, content: object, **more: Any) -> dict[str, Any]:
    return {"type": kind, "content": content, "sender": ALICE, **more}


def state(kind: str, content: object, **more: Any) -> dict[str, Any]:
    return event(kind, content, state_key="", event_id=f"${kind}", **more)


def answer(since: str, rooms: Mapping[str, Any] | None = None, *, now: float | None = None, **more: Any) -> SyncAnswer:
    """An answer with these events in the timelines of these rooms."""
    joined = {room_id: {"timeline": {"events": events}} for room_id, events in (rooms or {}).items()}
    return read_sync({"next_batch": since, "rooms": {"join": joined, **more}}, GUARD, now)


def created(room_ids: Collection[str], since: str = "s1") -> SyncAnswer:
    """A full answer about rooms of Alice's."""
    return answer(since, {room_id: [state("m.room.create", {"room_version": "12"})] for room_id in room_ids})


@define
class Asked:
    since: str
    filter: Mapping[str, Any]


@define
class ScriptedHomeserver:
    """A `MatrixClient` whose syncs answer as a script says; after that there is no news.

    :ivar reading: seconds that reading a member list takes; it tells who was joined when it began.
    """

    clock: Clock
    script: list[Script]
    rooms: list[str] = Factory(list)
    members: frozenset[str] | DependencyFailed = frozenset({GUARD, ALICE})
    state: Mapping[str, StateEvent] | DependencyFailed = Factory(dict)
    reading: float = 0.0
    syncs: list[Asked] = Factory(list)
    calls: list[str] = Factory(list)

    async def whoami(self) -> Whoami:
        return Whoami(GUARD, "DEVICE")

    async def probe(self) -> None:
        """The account is not an admin's."""
        raise DependencyRefused("synapse", "status_403")

    async def devices(self) -> int:
        return 1

    async def sync(self, user_id: str, since: str, room_filter: str, *, wait: bool) -> SyncAnswer:
        self.syncs.append(Asked(since, json.loads(room_filter)["room"]))
        if not self.script:
            await deferLater(self.clock, 10.0 if wait else 0.0)
            return answer(since)
        step = self.script.pop(0)
        if isinstance(step, DependencyFailed):
            raise step
        if step is None:
            await Deferred()
        assert step is not None
        return step

    async def joined_rooms(self) -> list[str]:
        return self.rooms

    async def joined_members(self, room_id: str) -> frozenset[str]:
        self.calls.append("members")
        members = self.members
        if self.reading:
            await deferLater(self.clock, self.reading)
        if isinstance(members, DependencyFailed):
            raise members
        return members

    async def room_state(self, room_id: str, kinds: Collection[str]) -> Mapping[str, StateEvent]:
        self.calls.append("state")
        if isinstance(self.state, DependencyFailed):
            raise self.state
        return self.state

    async def leave(self, room_id: str) -> None:
        self.calls.append(f"leave {room_id}")

    async def join(self, room_id: str) -> None:
        self.calls.append(f"join {room_id}")

    async def forget(self, room_id: str) -> None:
        self.calls.append(f"forget {room_id}")


@define
class Recorded:
    """Who enforces, and who answers commands."""

    changed: list[tuple[str, str]] = Factory(list)
    left: list[str] = Factory(list)
    commands: list[str] = Factory(list)

    async def resident_room_changed(self, room_id: str, user: str = "") -> None:
        self.changed.append((room_id, user))

    async def resident_room_left(self, room_id: str) -> None:
        self.left.append(room_id)

    def received(self, room_id: str, event: RoomEvent) -> None:
        self.commands.append(str(event.mapping["body"]))

    def stop(self) -> None:
        pass


class Listening:
    """A guard that listens to a scripted homeserver, with a clock of its own."""

    def __init__(self, *script: Script, **homeserver: Any) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        self.homeserver = ScriptedHomeserver(self.clock, list(script), **homeserver)
        client: Any = self.homeserver
        account = GuardAccount(client, client, Invites.LOCAL)
        self.residence = Residence(None, self.clock, self.clock.seconds, self.metrics)
        voice = ResidentVoice(client, self.residence, self.clock, self.metrics)
        self.recorded = Recorded()
        events = RoomEvents(client, account, self.residence, voice, self.recorded, self.clock)
        events.commands = self.recorded
        invites = InviteHandler(client, account, self.residence, self.clock, self.metrics)
        self.service = SyncService(client, account, self.residence, events, invites, self.clock, lambda failures: 1.0)
        self.service.startService()

    def wait(self, seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            self.clock.advance(0.1)

    def limit(self, room_id: str = ROOM) -> object:
        pushed = self.residence.state_of(room_id)
        assert pushed is not None
        event = pushed.events.get(LIMIT)
        return event.mapping.get("max_users") if event is not None else None


def failure(reason: str) -> DependencyFailed:
    return DependencyFailed("matrix_sync", reason)


# -- what is asked for next --------------------------------------------------------------------------------------


def test_answer_that_is_too_large_is_asked_for_again_with_fewer_events() -> None:
    too_large = [failure("too_large")] * (len(TIMELINES) - 1)
    guard = Listening(created([ROOM]), *too_large, answer("s2", {ROOM: [state(LIMIT, {"max_users": 3})]}))
    guard.wait(10)
    asked = guard.homeserver.syncs
    assert [one.filter["timeline"]["limit"] for one in asked[1:]] == [*TIMELINES, TIMELINES[0]]
    assert [one.since for one in asked[1:]] == ["s1"] * len(TIMELINES) + ["s2"]
    assert guard.limit() == 3


@pytest.mark.parametrize(("first", "seconds"), [(failure("too_large"), 10), (None, FIRST_SYNC + 10)])
def test_full_answer_that_is_too_large_or_too_slow_is_asked_for_in_parts(
    first: DependencyFailed | None, seconds: float
) -> None:
    rooms = [f"!{number:03}:here" for number in range(2 * ROOMS_A_PART + 1)]
    parts = [rooms[start : start + ROOMS_A_PART] for start in range(0, len(rooms), ROOMS_A_PART)]
    answers = [created(part, f"s{number}") for number, part in enumerate(parts, 1)]
    guard = Listening(first, *answers, rooms=rooms)
    guard.wait(seconds)
    assert sorted(guard.residence.room_ids()) == rooms
    asked = [one.filter.get("rooms") for one in guard.homeserver.syncs]
    assert asked[: len(parts) + 2] == [None, *parts, None]
    assert guard.homeserver.syncs[-1].since == "s1"  # nothing that happened between the parts is missed
    assert guard.residence.alive


def test_parts_of_which_one_fails_are_not_taken_for_everything() -> None:
    rooms = [f"!{number:03}:here" for number in range(ROOMS_A_PART + 1)]
    first = created(rooms[:ROOMS_A_PART])
    guard = Listening(failure("too_large"), first, failure("timeout"), rooms=rooms)
    guard.wait(10)
    assert not guard.residence.alive
    assert guard.homeserver.syncs[-1].since == ""


@pytest.mark.parametrize("reason", [SINCE_UNKNOWN, "too_large"])
def test_place_in_the_stream_that_is_of_no_use_is_given_up(reason: str) -> None:
    failures = [failure(reason)] * (len(TIMELINES) if reason == "too_large" else 1)
    guard = Listening(created([ROOM, "!gone:here"]), *failures, created([ROOM], "s9"))
    guard.wait(10)
    assert guard.homeserver.syncs[-2].since == ""
    assert guard.residence.room_ids() == [ROOM]
    assert guard.recorded.left == ["!gone:here"]


@pytest.mark.parametrize(("reason", "gives_up"), [("status_500", True), ("invalid_response", True), ("timeout", False)])
def test_stream_at_which_the_homeserver_itself_fails_is_given_up_after_many_attempts(
    reason: str, gives_up: bool
) -> None:
    guard = Listening(created([ROOM]), *[failure(reason)] * PATIENCE, created([ROOM], "s2"))
    guard.wait(PATIENCE + 5)
    asked = [one.since for one in guard.homeserver.syncs]
    assert asked[: PATIENCE + 1] == ["", *["s1"] * PATIENCE]
    assert (asked[PATIENCE + 1] == "") is gives_up


def test_homeserver_that_sends_the_same_answer_for_ever_is_asked_once_a_second() -> None:
    message = event("m.room.message", {"msgtype": "m.text", "body": "!call end"}, event_id="$same")
    same = answer("s1", {ROOM: [message, state(LIMIT, {"max_users": 2})]})
    guard = Listening(created([ROOM]), *[same] * 1000)
    guard.wait(60)
    assert 50 <= len(guard.homeserver.syncs) <= 70
    assert guard.recorded.commands == ["!call end"]  # and not once for each answer
    assert guard.limit() == 2


def test_homeserver_that_always_answers_at_once_is_asked_a_few_times_a_second() -> None:
    guard = Listening(created([ROOM]), *[answer(f"s{number}") for number in range(2, 5_000)])
    guard.wait(60)
    assert 500 <= len(guard.homeserver.syncs) <= 2_000


# -- what is believed ----------------------------------------------------------------------------------------------


def test_events_of_wrong_types_are_skipped_and_the_others_count() -> None:
    bad: list[Any] = [
        None, 7, [], {}, {"type": LIMIT}, event(LIMIT, {"max_users": 1}, state_key=0), event(LIMIT, 3, state_key=[]),
        {**state(LIMIT, {"max_users": 1}), "sender": None}, {**state(LIMIT, {}), "type": {}},
        state("m.room.power_levels", []), state("m.room.member", "x"), event("m.room.member", None, state_key=ALICE),
        event("m.room.redaction", {"redacts": {}}), event("m.room.redaction", {}, redacts=[LIMIT]),
        event("m.reaction", {"m.relates_to": 1}), event("m.reaction", {"m.relates_to": {"event_id": {}, "key": 1}}),
        event("m.room.message", {"msgtype": "m.text", "body": {"!call": 1}}),
        event("m.room.message", {"msgtype": "m.text", "body": "!call"}, unsigned={"age": 1e400}),
        event("m.room.message", {"msgtype": "m.text", "body": "!call"}, unsigned={"age": 10**400}),
    ]  # fmt: skip
    rooms: Any = {"join": {ROOM: {"timeline": {"events": [*bad, state(LIMIT, {"max_users": 4})]}}, "!x:here": 7}}
    odd = read_sync({"next_batch": "s2", "rooms": {**rooms, "invite": {"!y:here": []}, "leave": []}}, GUARD)
    guard = Listening(created([ROOM]), odd)
    guard.wait(1)
    assert guard.residence.alive
    assert guard.limit() == 4


def test_names_that_are_longer_than_matrix_allows_are_not_kept() -> None:
    long = "@" + 300 * "x" + ":here"
    join = {"membership": "join"}
    events = [
        event("m.room.member", join, state_key=long), state(LIMIT, {"max_users": 4}) | {"event_id": 300 * "x"},
        event("m.room.member", join, state_key=MALLORY), state(LIMIT, {"max_users": 5}),
    ]  # fmt: skip
    guard = Listening(created([ROOM]), answer("s2", {ROOM: events, "!" + 300 * "x": []}))
    guard.wait(1)
    assert not guard.residence.is_joined(ROOM, long)
    assert guard.residence.is_joined(ROOM, MALLORY)
    assert guard.limit() == 5
    assert guard.residence.room_ids() == [ROOM]


def test_inviter_whom_another_homeserver_merely_claims_is_not_believed() -> None:
    """The unverified state of the inviting homeserver comes first; the invitation itself is the last event."""
    claimed = {"type": "m.room.member", "state_key": GUARD, "sender": ALICE, "content": {"membership": "invite"}}
    invites = {"!evil:there": {"invite_state": {"events": [claimed, {**claimed, "sender": MALLORY}]}}}
    guard = Listening(created([ROOM]), answer("s2", invite=invites))
    guard.wait(1)
    assert [call for call in guard.homeserver.calls if "!evil" in call] == ["leave !evil:there", "forget !evil:there"]


@pytest.mark.parametrize(("sent", "heard"), [(1_000_000, True), (930_000, False), (1_060_000, True), ("soon", True)])
def test_age_of_a_command_is_told_by_when_it_was_sent_if_the_homeserver_says_nothing_else(
    sent: object, heard: bool
) -> None:
    message = event("m.room.message", {"msgtype": "m.text", "body": "!call"}, event_id="$1", origin_server_ts=sent)
    guard = Listening(created([ROOM]), answer("s2", {ROOM: [message]}, now=1000.0))
    guard.wait(1)
    assert (guard.recorded.commands == ["!call"]) is heard


def test_rooms_of_too_much_state_do_not_displace_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "STATE_KEPT", 20_000)
    filler = [state(LIMIT, {"max_users": 1, "x": "x" * 15_000})]
    changes = [state(LIMIT, {"max_users": 5, "x": "x" * 6_000})]
    guard = Listening(
        created([ROOM, "!large:here"]), answer("s2", {"!large:here": filler}), answer("s3", {ROOM: changes})
    )
    guard.wait(1)
    assert guard.limit() == 5
    assert guard.residence.state_of("!large:here") is None
    assert guard.residence.is_resident("!large:here")  # its state is looked up as a member


# -- what could not be read ----------------------------------------------------------------------------------------


def test_member_list_that_could_not_be_read_is_read_again_ever_later() -> None:
    guard = Listening(created([ROOM]), members=failure("status_500"))
    guard.wait(300)
    assert 4 <= guard.homeserver.calls.count("members") <= 8
    guard.homeserver.members = frozenset({GUARD, ALICE})
    guard.wait(600)
    assert guard.residence.is_joined(ROOM, ALICE)
    read = guard.homeserver.calls.count("members")
    guard.wait(2000)
    assert guard.homeserver.calls.count("members") == read


def test_member_list_that_was_too_long_is_read_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MEMBERS_KEPT", 1)
    guard = Listening(created([ROOM]))
    guard.wait(3000)
    assert not guard.residence.is_joined(ROOM, ALICE)
    assert guard.homeserver.calls.count("members") == 1
    monkeypatch.setattr(bounds, "MEMBERS_KEPT", 2)
    guard.wait(700)
    assert guard.residence.is_joined(ROOM, ALICE)


def test_members_who_are_heard_to_join_are_kept_no_longer_than_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MEMBERS_KEPT", 6)
    joins = [
        event("m.room.member", {"membership": "join"}, state_key=f"@{number}:here", event_id=f"${number}")
        for number in range(5)
    ]
    guard = Listening(created([ROOM, "!small:here"]), answer("s2", {ROOM: joins[:2]}), answer("s3", {ROOM: joins}))
    guard.wait(5)
    assert not guard.residence.is_joined(ROOM, ALICE)  # looked up from now on
    assert guard.residence.is_joined("!small:here", ALICE)
    assert guard.residence.has_room_for(4)


def test_member_list_is_read_as_soon_as_the_homeserver_answers_again() -> None:
    guard = Listening(created([ROOM]), *[failure("unreachable")] * 200, answer("s2"), members=failure("unreachable"))
    guard.wait(190)
    guard.homeserver.members = frozenset({GUARD, ALICE})
    guard.wait(40)
    assert guard.residence.is_joined(ROOM, ALICE)


def test_flood_that_causes_gap_after_gap_does_not_have_a_long_member_list_read_each_time() -> None:
    gap = {"!large:here": {"timeline": {"events": [], "limited": True}}}
    gaps = [read_sync({"next_batch": f"s{number}", "rooms": {"join": gap}}, GUARD) for number in range(2, 1_000)]
    members = frozenset({ALICE, *(f"@{number}:here" for number in range(5_000))})
    guard = Listening(created(["!large:here"]), *gaps, members=members)
    guard.wait(30)
    assert 2 <= guard.homeserver.calls.count("members") <= 5
    guard.homeserver.script.clear()
    guard.wait(30)
    assert guard.residence.is_joined("!large:here", ALICE)


def test_member_list_that_was_read_across_a_gap_is_not_believed() -> None:
    gap = {ROOM: {"timeline": {"events": [], "limited": True}}}
    guard = Listening(created([ROOM]), read_sync({"next_batch": "s2", "rooms": {"join": gap}}, GUARD), reading=5.0)
    guard.wait(4)
    guard.homeserver.members = frozenset({GUARD})
    guard.wait(4)
    assert not guard.residence.is_joined(ROOM, ALICE)
    guard.wait(10)
    assert guard.residence.is_joined(ROOM, GUARD)
    assert not guard.residence.is_joined(ROOM, ALICE)


def redacted() -> list[dict[str, Any]]:
    return [event("m.room.redaction", {"redacts": f"${LIMIT}"}, event_id="$r")]


def test_redacted_state_is_read_until_it_could_be() -> None:
    first = answer("s2", {ROOM: [state(LIMIT, {"max_users": 2})]})
    guard = Listening(created([ROOM]), first, answer("s3", {ROOM: redacted()}), state=failure("timeout"))
    guard.wait(5)
    assert guard.limit() == 2
    guard.homeserver.state = {}
    guard.wait(20)
    assert guard.limit() is None
    assert (ROOM, "") in guard.recorded.changed


def test_state_that_is_redacted_again_and_again_is_read_by_one_reader_ever_later() -> None:
    first = answer("s2", {ROOM: [state(LIMIT, {"max_users": 2})]})
    redactions = [answer(f"s{number}", {ROOM: redacted()}) for number in range(3, 23)]
    guard = Listening(created([ROOM]), first, *redactions, state=failure("timeout"))
    guard.wait(5)
    assert guard.homeserver.calls.count("state") == 20
    guard.wait(3000)
    assert 25 <= guard.homeserver.calls.count("state") <= 35


def test_redacted_state_is_not_read_any_more_in_a_room_that_the_account_left() -> None:
    first = answer("s2", {ROOM: [state(LIMIT, {"max_users": 2})]})
    left, back = answer("s4", leave={ROOM: {}}), answer("s5", {ROOM: [state(LIMIT, {"max_users": 3})]})
    guard = Listening(created([ROOM]), first, answer("s3", {ROOM: redacted()}), left, back, state=failure("timeout"))
    guard.wait(5)
    asked = guard.homeserver.calls.count("state")
    guard.wait(1000)
    assert guard.homeserver.calls.count("state") == asked == 1


def test_state_heard_after_a_redaction_is_not_replaced_by_what_is_read_late() -> None:
    first = answer("s2", {ROOM: [state(LIMIT, {"max_users": 2})]})
    newer = answer("s4", {ROOM: [{**state(LIMIT, {"max_users": 7}), "event_id": "$new"}]})
    guard = Listening(created([ROOM]), first, answer("s3", {ROOM: redacted()}), newer, state=failure("timeout"))
    guard.wait(5)
    guard.homeserver.state = {}
    guard.wait(60)
    assert guard.limit() == 7
