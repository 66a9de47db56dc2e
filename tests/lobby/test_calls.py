# SPDX-License-Identifier: Apache-2.0
"""The lobby and the call: restarts, the end of a call, users of other homeservers, requests a homeserver proxies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from lotusguard.clients.http import Answer
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.lobby import Lobby, switching
from lotusguard.guard.lobby.switching import LobbySwitch
from lotusguard.guard.rooms.policies import Freshness, KnownPolicy
from lotusguard.rules.identity import room_alias
from lotusguard.rules.lobby import LobbyState
from lotusguard.rules.permissions import Lobby as LobbyPolicy
from lotusguard.rules.policy import Policy
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, old_token, room_of, seen_in
from tests.conftest import StartSandbox, until
from tests.guardprocess import ProcessSandbox
from tests.lobby.test_joining import asking, lobby_room, moderate, waiting_in, waits
from tests.lobby.voice import lobby_on
from tests.running_calls.test_restore import at_rest

ROOM = "!room:example.org"
ON = KnownPolicy(Policy(lobby=LobbyPolicy()), Freshness.FRESH, room_exists=True)
OFF = KnownPolicy(Policy(), Freshness.FRESH, room_exists=True)
UNKNOWN = KnownPolicy(Policy(), Freshness.UNKNOWN, None)
STALE_OFF = KnownPolicy(Policy(), Freshness.STALE, None)


class Call:
    """The few questions that the switch asks about calls and rooms.

    :ivar asked: how often it was asked who is in the call.
    :ivar answers_when: fires when who is in the call can be told.
    :ivar read_anew: the policy as the homeserver has it.
    """

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.asked = 0
        self.answers_when: Deferred[None] | None = None
        self.read_anew = OFF

    async def get_anew(self, room_id: str, deadline: Deadline, since: float) -> KnownPolicy:
        return self.read_anew

    async def occupants(self, room_id: str) -> set[str]:
        self.asked += 1
        if self.answers_when is not None:
            await self.answers_when
        return self.users if room_id == ROOM else set()


def switched(clock: Clock, call: Call, *, decidable: bool = True) -> tuple[Lobby, LobbySwitch]:
    lobby = lobby_on(clock)
    stub: Any = call
    return lobby, LobbySwitch(lobby, stub, stub, stub, stub, stub, clock, lambda room_id: decidable, 1.5)


@pytest_twisted.ensureDeferred
async def test_people_are_accepted_until_the_call_has_been_empty_for_a_minute_and_a_half_at_most() -> None:
    clock, call = Clock(), Call()
    lobby, switch = switched(clock, call)
    await lobby.let_in(ROOM, BOB)
    call.users = {BOB}
    for _ in range(60):
        clock.advance(2.0)
        await switch.pass_time()
    assert lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED
    call.users, asked = set(), call.asked
    for _ in range(29):
        clock.advance(2.0)
        await switch.pass_time()
        assert lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED
    assert call.asked - asked <= 5
    for _ in range(17):
        clock.advance(2.0)
        await switch.pass_time()
    assert lobby.state_of(ROOM, BOB) is None


@pytest_twisted.ensureDeferred
async def test_people_in_a_call_are_accepted_when_its_lobby_is_switched_on_but_not_when_it_was_on_before() -> None:
    call = Call()
    call.users = {BOB}
    lobby, switch = switched(Clock(), call)
    assert await switch.is_on(ROOM, ON)
    assert lobby.state_of(ROOM, BOB) is None
    lobby, switch = switched(Clock(), call)
    assert not await switch.is_on(ROOM, OFF)
    assert await switch.is_on(ROOM, ON)
    assert lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


@pytest_twisted.ensureDeferred
async def test_people_in_a_call_are_accepted_however_many_other_rooms_were_seen_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(switching, "ROOMS_REMEMBERED", 3)
    clock, call = Clock(), Call()
    call.users = {BOB}
    lobby, switch = switched(clock, call)
    assert not await switch.is_on(ROOM, OFF)
    for number in range(20):
        assert not await switch.is_on(f"!made-up-{number}:example.org", OFF)
        clock.advance(2.0)
        await switch.pass_time()
    assert await switch.is_on(ROOM, ON)
    assert lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


@pytest_twisted.ensureDeferred
async def test_rooms_without_occupants_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switching, "ROOMS_REMEMBERED", 3)
    call = Call()
    call.users = {BOB}
    _, switch = switched(Clock(), call, decidable=False)
    for number in range(20):
        await switch.is_on(f"!room-{number}:example.org", ON)
    assert switch.undecidable_rooms == 20
    await switch.pass_time()
    assert switch.undecidable_rooms == 3


@pytest_twisted.ensureDeferred
async def test_a_lobby_is_not_on_for_anybody_before_everybody_in_the_call_is_accepted() -> None:
    call = Call()
    call.users = {BOB, CAROL}
    lobby, switch = switched(Clock(), call)
    assert not await switch.is_on(ROOM, OFF)
    answers: Deferred[None] = Deferred()
    call.answers_when = answers
    accepted: list[bool] = []
    asking_twice = [Deferred.fromCoroutine(switch.is_on(ROOM, ON)) for _ in range(2)]
    for asked in asking_twice:
        asked.addCallback(
            lambda on: accepted.append(on and lobby.state_of(ROOM, CAROL) is LobbyState.ACCEPTED),
        )
    assert accepted == []
    call.answers_when = None
    answers.callback(None)
    assert accepted == [True, True]


@pytest_twisted.ensureDeferred
async def test_lobbies_that_are_switched_off_are_noticed_soon_although_the_homeserver_is_slow() -> None:
    clock = Clock()

    class SlowRooms(Call):
        async def get(self, room_id: str, deadline: Deadline) -> KnownPolicy:
            await deferLater(clock, 0.5)
            return OFF

    lobby, switch = switched(clock, SlowRooms())
    for number in range(64):
        await lobby.ask(f"!{number}:example.org", f"@{number}:example.org")
    passing = Deferred.fromCoroutine(switch.pass_time())
    clock.pump([0.5] * 17)
    assert passing.called
    assert lobby.waiting() == []


@pytest_twisted.ensureDeferred
async def test_an_unknown_policy_keeps_nobody_waiting_and_ends_no_waiting() -> None:
    lobby, switch = switched(Clock(), Call())
    await switch.is_on(ROOM, ON)
    await lobby.ask(ROOM, BOB)
    assert not await switch.is_on(ROOM, UNKNOWN)
    assert lobby.state_of(ROOM, BOB) is LobbyState.WAITING


@pytest.mark.parametrize("newer", [ON, UNKNOWN, STALE_OFF])
@pytest_twisted.ensureDeferred
async def test_a_policy_that_may_be_out_of_date_ends_no_waiting(newer: KnownPolicy) -> None:
    call = Call()
    lobby, switch = switched(Clock(), call)
    await lobby.ask(ROOM, BOB)  # at another guard
    call.read_anew = newer
    assert await switch.is_on(ROOM, OFF) is (newer is ON)
    assert lobby.state_of(ROOM, BOB) is LobbyState.WAITING
    call.read_anew = OFF
    assert not await switch.is_on(ROOM, OFF)
    assert lobby.state_of(ROOM, BOB) is None


@pytest_twisted.ensureDeferred
async def test_waiting_ends_when_an_unknown_policy_turns_out_to_have_no_lobby() -> None:
    lobby, switch = switched(Clock(), Call())
    await lobby.ask(ROOM, BOB)
    await switch.is_on(ROOM, UNKNOWN)
    assert not await switch.is_on(ROOM, OFF)
    assert lobby.state_of(ROOM, BOB) is None


@pytest_twisted.ensureDeferred
async def test_nobody_waits_on_in_a_room_of_unknown_policy_where_nobody_could_admit_them() -> None:
    clock, call = Clock(), Call()
    lobby, switch = switched(clock, call, decidable=False)
    await lobby.ask(ROOM, BOB)
    assert not await switch.is_on(ROOM, UNKNOWN)
    assert lobby.state_of(ROOM, BOB) is None


@pytest_twisted.ensureDeferred
async def test_rooms_whose_lobby_nobody_could_decide_are_counted() -> None:
    _, switch = switched(Clock(), Call(), decidable=False)
    assert not await switch.is_on(ROOM, ON)
    assert switch.undecidable_rooms == 1
    assert not await switch.is_on(ROOM, OFF)
    assert switch.undecidable_rooms == 0


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
@pytest_twisted.ensureDeferred
async def test_waiting_and_decisions_survive_a_restart(tmp_path: Path, signal: str) -> None:
    sandbox = ProcessSandbox(reactor, guard_state_dir=tmp_path / "state")
    await sandbox.start()
    try:
        room_id = lobby_room(sandbox)
        held = asking(sandbox, BOB, room_id)
        held.addErrback(lambda failure: None)
        await until_waiting(sandbox, room_id)
        await sandbox.end(signal)
        await held
        await sandbox.start_guard()
        assert await waiting_in(sandbox, room_id) == [BOB]
        assert await moderate(sandbox, room_id, BOB, "admit") == 200
        await until_stored(sandbox)
        await sandbox.end(signal)
        await sandbox.start_guard()
        assert (await sandbox.ask_token(BOB, room_id)).code == 200
    finally:
        await sandbox.stop()


async def until_waiting(sandbox: ProcessSandbox, room_id: str) -> None:
    """Wait until somebody waits and that is on disk."""
    while not await waiting_in(sandbox, room_id):
        pass
    await until_stored(sandbox)


async def until_stored(sandbox: ProcessSandbox) -> None:
    while json.loads((await sandbox.request("GET", f"{sandbox.admin_url}/readyz")).body)["state"]["waiting_writes"]:
        pass


@pytest_twisted.ensureDeferred
async def test_a_user_of_another_homeserver_waits_after_upstream_verified_them(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_server_name="elsewhere.example")
    room_id = lobby_room(sandbox)
    delay = {"delay_id": "d", "delay_timeout": 1000, "delay_cs_api_url": sandbox.homeserver.url}
    answer = asking(sandbox, BOB, room_id, **delay)
    await waits(sandbox)
    assert "delay_id" not in json.loads(sandbox.upstream.seen[-1].body)
    assert await waiting_in(sandbox, room_id) == [BOB]
    before = len(sandbox.upstream.seen)
    await moderate(sandbox, room_id, BOB, "admit")
    assert (await answer).code == 200
    assert len(sandbox.upstream.seen) > before
    assert json.loads(sandbox.upstream.seen[-1].body)["delay_id"] == "d"


@pytest_twisted.ensureDeferred
async def test_a_person_waits_once_on_both_listeners(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(
        guard_appservice_port=0, guard_appservice_token="hs", upstream_options={"hs_token": "hs"}
    )
    room_id = lobby_room(sandbox)
    public = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    path = "/_matrix/client/v1/rtc/livekit/get_token"
    body = {"room_id": room_id, "slot_id": "m.call#ROOM", "member_id": "m", "url": sandbox.livekit.url}
    headers = {"Authorization": "Bearer hs", "X-Matrix-User-Identifier": BOB, "Prefer": "respond-async"}
    answer = await sandbox.request("POST", sandbox.appservice_url + path, json.dumps(body).encode(), headers)
    assert answer.code == 202
    assert await waiting_in(sandbox, room_id) == [BOB]
    await moderate(sandbox, room_id, BOB, "admit")
    assert (await public).code == 200


@pytest_twisted.ensureDeferred
async def test_a_banned_person_is_not_accepted_any_more_when_they_come_back(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_policy_ttl=0.1)
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    await moderate(sandbox, room_id, BOB, "admit")
    bob = sandbox.livekit.connect(json.loads((await answer).body)["jwt"])
    sandbox.homeserver.ban(room_id, BOB)
    await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id, "user": BOB}).encode())
    await until(lambda: not bob.connected)
    sandbox.homeserver.unban(room_id, BOB)
    sandbox.homeserver.join(room_id, BOB)
    await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id, "user": BOB}).encode())
    again = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    await moderate(sandbox, room_id, BOB, "deny")
    assert (await again).code == 403


@pytest_twisted.ensureDeferred
async def test_rooms_without_a_lobby_have_no_entries(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox()
    room_id = room_of(sandbox)
    await sandbox.enter(BOB, room_id)
    assert await waiting_in(sandbox, room_id) == []
    assert await moderate(sandbox, room_id, BOB, "admit") == 404


@pytest_twisted.ensureDeferred
async def test_a_removed_person_is_removed_again_where_nothing_else_is_checked(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only="off")
    room_id = room_of(sandbox)
    for user in (ALICE, BOB):
        await sandbox.enter(user, room_id)
    await at_rest(sandbox)
    assert await moderate(sandbox, room_id, BOB, "remove") == 200
    sandbox.livekit.connect(old_token(BOB, room_id))
    await at_rest(sandbox)
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]


@pytest_twisted.ensureDeferred
async def test_a_person_whom_nobody_admitted_is_not_accepted_because_the_policy_was_out_of_date(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.0001)
    room_id = lobby_room(sandbox)
    await sandbox.enter(ALICE, room_id)
    await at_rest(sandbox)
    sandbox.homeserver.faults["room_state"] = Fault.status(500)
    sandbox.livekit.connect(old_token(BOB, room_id))
    await until_seen(sandbox, room_id, [(ALICE, True), (BOB, True)])
    sandbox.homeserver.faults.clear()
    await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    await until_seen(sandbox, room_id, [(ALICE, True)])


@pytest.mark.parametrize("slot", ["m.call#ROOM", "other"])
@pytest_twisted.ensureDeferred
async def test_somebody_who_was_in_the_call_before_the_guard_does_not_wait_whatever_slot_it_is(
    start_sandbox: StartSandbox, slot: str
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = lobby_room(sandbox)
    await sandbox.guard.stopService()
    sandbox.livekit.webhooks.urls[:] = []
    in_call = sandbox.livekit.connect(old_token(BOB, room_id, room=room_alias(room_id, slot)))
    in_call.joined_at -= 3600
    await sandbox.start_guard()
    await until(lambda: sandbox.livekit.asked["ListRooms"] > 0)
    await at_rest(sandbox)
    assert (await poll(sandbox, BOB, room_id, slot)).code == 200
    assert (await poll(sandbox, CAROL, room_id, slot)).code == 202


async def poll(sandbox: Sandbox, user: str, room_id: str, slot: str) -> Answer:
    """Ask for a token as a client that polls while it waits."""
    body = {
        "room_id": room_id, "slot_id": slot, "openid_token": sandbox.homeserver.openid_token(user),
        "member": {"id": "member", "claimed_user_id": user, "claimed_device_id": "PHONE"},
    }  # fmt: skip
    url = f"{sandbox.url}/get_token?lobby=poll"
    return await sandbox.request("POST", url, json.dumps(body).encode(), {"Content-Type": "application/json"})


async def until_seen(sandbox: Sandbox, room_id: str, expected: list[tuple[str, bool]]) -> None:
    """Wait until the guard knows these users in the call, with or without a seat."""
    end = reactor.seconds() + 15
    while await seen_in(sandbox, room_id) != expected:
        assert reactor.seconds() < end, await seen_in(sandbox, room_id)
        await at_rest(sandbox)
