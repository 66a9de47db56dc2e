# SPDX-License-Identifier: Apache-2.0
"""Waiting in the lobby over the wire, with the stand-ins: held and polling requests, and what ends the waiting."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from lotusguard.clients.http import Answer
from lotusguard.rules import lobby_book
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, counted, old_token, put_policy, room_of
from tests.conftest import StartSandbox, until


def lobby_room(sandbox: Sandbox, max_users: int | None = None, **lobby: Any) -> str:
    """A room with a lobby, in which Alice moderates."""
    room_id = room_of(sandbox, max_users)
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True, **lobby})
    return room_id


def asking(sandbox: Sandbox, user: str, room_id: str, **how: Any) -> Deferred[Answer]:
    """A token request in the background."""
    return Deferred.fromCoroutine(sandbox.ask_token(user, room_id, **how))


async def poll(sandbox: Sandbox, user: str, room_id: str) -> Answer:
    body = {"room": room_id, "device_id": "PHONE", "openid_token": sandbox.homeserver.openid_token(user)}
    headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
    return await sandbox.request("POST", f"{sandbox.url}/sfu/get", json.dumps(body).encode(), headers)


async def waiting_in(sandbox: Sandbox, room_id: str) -> list[str]:
    answer = await sandbox.operator("GET", "/lobby")
    rooms = {room["room_id"]: room["waiting"] for room in json.loads(answer.body)["rooms"]}
    return [entry["user"] for entry in rooms.get(room_id, ())]


async def moderate(sandbox: Sandbox, room_id: str, user: str, action: str) -> int:
    body = json.dumps({"room_id": room_id, "user": user, "action": action}).encode()
    return (await sandbox.operator("POST", "/moderate", body)).code


def error_of(answer: Answer) -> tuple[int, str]:
    return answer.code, json.loads(answer.body)["error"]


async def waits(sandbox: Sandbox, count: int = 1) -> None:
    await until(lambda: counted(sandbox, "lobby_waiting") == count)


@pytest_twisted.ensureDeferred
async def test_a_person_waits_until_a_moderator_admits_them(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    assert await waiting_in(sandbox, room_id) == [BOB]
    assert not answer.called
    assert sandbox.upstream.asked["/sfu/get"] == 0
    assert await moderate(sandbox, room_id, BOB, "admit") == 200
    assert (await answer).code == 200
    assert await waiting_in(sandbox, room_id) == []
    assert counted(sandbox, "lobby_decisions_total", decision="admitted") == 1


@pytest_twisted.ensureDeferred
async def test_a_person_who_is_denied_is_refused_and_may_ask_again_later(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    assert await moderate(sandbox, room_id, BOB, "deny") == 200
    assert error_of(await answer) == (403, "You were not admitted to this call.")
    assert error_of(await sandbox.ask_token(BOB, room_id, new=True)) == (403, "You were not admitted to this call.")


@pytest_twisted.ensureDeferred
async def test_moderators_do_not_wait(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    await sandbox.enter(ALICE, room_id)


@pytest_twisted.ensureDeferred
async def test_an_accepted_person_does_not_wait_again_on_another_device(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    await moderate(sandbox, room_id, BOB, "admit")
    assert (await answer).code == 200
    assert (await sandbox.ask_token(BOB, room_id, device="LAPTOP", new=True)).code == 200


@pytest_twisted.ensureDeferred
async def test_two_requests_of_one_person_are_one_entry_and_end_together(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    answers = [asking(sandbox, BOB, room_id), asking(sandbox, BOB, room_id, device="LAPTOP", new=True)]
    await until(lambda: counted(sandbox, "requests_in_flight") == 2)
    await waits(sandbox)
    assert await waiting_in(sandbox, room_id) == [BOB]
    await moderate(sandbox, room_id, BOB, "admit")
    assert [(await answer).code for answer in answers] == [200, 200]


@pytest_twisted.ensureDeferred
async def test_nobody_waits_longer_than_the_setting_says_and_that_is_remembered(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_lobby_wait=1)
    room_id = lobby_room(sandbox)
    assert error_of(await sandbox.ask_token(BOB, room_id)) == (403, "Nobody admitted you in time.")
    assert error_of(await sandbox.ask_token(BOB, room_id, new=True)) == (403, "Nobody admitted you in time.")
    assert counted(sandbox, "lobby_decisions_total", decision="timed_out") == 1


@pytest_twisted.ensureDeferred
async def test_a_caller_who_disconnects_stops_waiting(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    answer.addErrback(lambda failure: None)
    await waits(sandbox)
    answer.cancel()
    await waits(sandbox, 0)
    assert counted(sandbox, "lobby_decisions_total", decision="left") == 1


@pytest_twisted.ensureDeferred
async def test_a_client_that_polls_is_told_to_wait_and_gets_the_token_when_admitted(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    first, second = await poll(sandbox, BOB, room_id), await poll(sandbox, BOB, room_id)
    told = json.loads(first.body)
    assert (first.code, told["status"], told["retry_after_ms"]) == (202, "waiting", 1000)
    assert told["color"].startswith("hsl(")
    assert json.loads(second.body) == told
    assert first.headers.getRawHeaders(b"access-control-allow-origin") == [b"*"]
    await moderate(sandbox, room_id, BOB, "admit")
    assert (await poll(sandbox, BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_waiting_takes_no_seat_and_a_full_room_is_answered_as_always(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox, 1)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    await sandbox.enter(ALICE, room_id)
    await moderate(sandbox, room_id, BOB, "admit")
    assert error_of(await answer) == (403, "This voice channel is full.")


@pytest_twisted.ensureDeferred
async def test_somebody_who_left_the_room_while_waiting_is_refused_although_admitted(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    sandbox.homeserver.leave(room_id, BOB)
    await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id, "user": BOB}).encode())
    await moderate(sandbox, room_id, BOB, "admit")
    assert error_of(await answer) == (403, "You are not a member of this room.")


@pytest_twisted.ensureDeferred
async def test_somebody_who_was_banned_unheard_while_waiting_is_refused_although_admitted(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    assert await moderate(sandbox, room_id, BOB, "admit") == 200
    assert error_of(await answer) == (403, "You are not a member of this room.")


@pytest_twisted.ensureDeferred
async def test_somebody_who_was_banned_unheard_while_waiting_leaves_the_lobby(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_membership_interval=1)
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    assert await waiting_in(sandbox, room_id) == [BOB]
    sandbox.homeserver.ban(room_id, BOB)
    assert error_of(await answer) == (403, "You are not a member of this room.")
    assert await waiting_in(sandbox, room_id) == []


@pytest_twisted.ensureDeferred
async def test_a_limit_that_was_set_unheard_while_somebody_waited_holds_for_them(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_policy_ttl=3600)
    room_id = lobby_room(sandbox)
    await sandbox.enter(ALICE, room_id)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    put_policy(sandbox, room_id, 1)
    assert await moderate(sandbox, room_id, BOB, "admit") == 200
    assert error_of(await answer) == (403, "This voice channel is full.")


@pytest.mark.parametrize("named", [True, False], ids=["of that user", "of the room"])
@pytest_twisted.ensureDeferred
async def test_a_pushed_ban_ends_the_waiting_at_once(sandbox: Sandbox, named: bool) -> None:
    room_id = lobby_room(sandbox)
    answer, other = asking(sandbox, BOB, room_id), asking(sandbox, CAROL, room_id)
    await waits(sandbox, 2)
    sandbox.homeserver.ban(room_id, BOB)
    told = {"room_id": room_id} | ({"user": BOB} if named else {})
    await sandbox.operator("POST", "/policy-changed", json.dumps(told).encode())
    await waits(sandbox, 1)
    assert await waiting_in(sandbox, room_id) == [CAROL]
    assert error_of(await answer) == (403, "You are not a member of this room.")
    assert not other.called
    assert await moderate(sandbox, room_id, CAROL, "admit") == 200
    assert (await other).code == 200


@pytest_twisted.ensureDeferred
async def test_everybody_who_waits_comes_in_when_the_lobby_is_switched_off(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_policy_ttl=0.2)
    room_id = lobby_room(sandbox)
    answers = [asking(sandbox, BOB, room_id), asking(sandbox, CAROL, room_id)]
    await waits(sandbox, 2)
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": False})
    assert [(await answer).code for answer in answers] == [200, 200]


@pytest_twisted.ensureDeferred
async def test_somebody_who_is_promoted_while_waiting_comes_in(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_policy_ttl=0.2)
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, BOB: 50}})
    assert (await answer).code == 200


@pytest_twisted.ensureDeferred
async def test_people_in_the_call_stay_when_the_lobby_is_switched_on(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    bob = await sandbox.enter(BOB, room_id)
    await sandbox.guard.enforcement.worker.idle()
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True})
    await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    await sandbox.guard.enforcement.worker.idle()
    assert bob.connected
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    answer = asking(sandbox, CAROL, room_id)
    await waits(sandbox)
    await moderate(sandbox, room_id, CAROL, "deny")
    assert (await answer).code == 403


@pytest_twisted.ensureDeferred
async def test_somebody_who_enters_with_an_old_token_past_the_lobby_is_removed(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    await sandbox.enter(ALICE, room_id)
    bob = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not bob.connected)
    await until(lambda: counted(sandbox, "members_removed_total", reason="not_admitted") == 1)


@pytest_twisted.ensureDeferred
async def test_an_admitted_person_stays_in_the_call(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    entering = Deferred.fromCoroutine(sandbox.enter(BOB, room_id))
    await waits(sandbox)
    await moderate(sandbox, room_id, BOB, "admit")
    bob = await entering
    await sandbox.guard.changes.reconcile()
    await sandbox.guard.enforcement.worker.idle()
    assert bob.connected


@pytest_twisted.ensureDeferred
async def test_a_removed_person_is_refused_until_they_are_admitted(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    put_policy(sandbox, room_id, 5)
    bob = await sandbox.enter(BOB, room_id)
    assert await moderate(sandbox, room_id, BOB, "remove") == 200
    assert not bob.connected
    assert error_of(await sandbox.ask_token(BOB, room_id)) == (403, "You were removed from this call.")
    again = sandbox.livekit.connect(old_token(BOB, room_id))
    await until(lambda: not again.connected)
    assert await moderate(sandbox, room_id, BOB, "admit") == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest.mark.parametrize("fault", [Fault.status(503), Fault.hang()], ids=lambda fault: fault.kind)
@pytest_twisted.ensureDeferred
async def test_somebody_who_waits_is_removed_although_livekit_does_not_answer(sandbox: Sandbox, fault: Fault) -> None:
    room_id = lobby_room(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    sandbox.livekit.fault = fault
    assert await moderate(sandbox, room_id, BOB, "remove") == 200
    assert error_of(await answer) == (403, "You were removed from this call.")


@pytest.mark.parametrize("fault", [Fault.status(503), Fault.hang()], ids=lambda fault: fault.kind)
@pytest_twisted.ensureDeferred
async def test_removing_somebody_in_the_call_is_502_while_livekit_does_not_answer(
    sandbox: Sandbox, fault: Fault
) -> None:
    room_id = lobby_room(sandbox)
    await sandbox.enter(ALICE, room_id)
    sandbox.livekit.fault = fault
    assert await moderate(sandbox, room_id, ALICE, "remove") == 502


@pytest.mark.parametrize("action", ["remove", "mute"])
@pytest_twisted.ensureDeferred
async def test_a_dry_run_does_nothing_to_people_and_says_so(start_sandbox: StartSandbox, action: str) -> None:
    sandbox = await start_sandbox(guard_dry_run=True)
    room_id = room_of(sandbox)
    bob = await sandbox.enter(BOB, room_id)
    bob.publish("MICROPHONE")
    body = json.dumps({"room_id": room_id, "user": BOB, "action": action}).encode()
    answer = await sandbox.operator("POST", "/moderate", body)
    assert (answer.code, json.loads(answer.body)) == (200, {"done": False})
    assert bob.connected
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    assert counted(sandbox, "joins_total", verdict="would_refuse", reason="removed") == 0


@pytest_twisted.ensureDeferred
async def test_muting_mutes_what_can_be_heard(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    bob = await sandbox.enter(BOB, room_id)
    microphone, camera = bob.publish("MICROPHONE"), bob.publish("CAMERA")
    assert microphone is not None
    assert camera is not None
    assert await moderate(sandbox, room_id, BOB, "mute") == 200
    assert (bob.tracks[microphone.sid].muted, bob.tracks[camera.sid].muted) == (True, False)


@pytest_twisted.ensureDeferred
async def test_moderating_somebody_who_is_not_there_is_404_and_an_unknown_action_400(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    for action in ("admit", "deny", "remove", "mute"):
        assert await moderate(sandbox, room_id, BOB, action) == 404
    assert await moderate(sandbox, room_id, BOB, "kick") == 400
    assert (await sandbox.operator("POST", "/moderate", b"[]")).code == 400
    for impossible in ("\ud800", "x" * 255):
        assert await moderate(sandbox, "!" + impossible, BOB, "remove") == 400
        assert await moderate(sandbox, room_id, "@" + impossible, "remove") == 400


@pytest_twisted.ensureDeferred
async def test_nobody_waits_where_nobody_could_admit_them(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_admin_token="")
    room_id = lobby_room(sandbox)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    report = await sandbox.request("GET", f"{sandbox.admin_url}/readyz")
    assert any("nobody could admit" in reason for reason in json.loads(report.body)["reasons"])


@pytest_twisted.ensureDeferred
async def test_too_many_people_waiting_are_told_to_come_back(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby_book, "WAITING_PER_ROOM", 1)
    room_id = lobby_room(sandbox)
    assert (await poll(sandbox, BOB, room_id)).code == 202
    answer = await poll(sandbox, CAROL, room_id)
    content = json.loads(answer.body)
    assert (answer.code, content["errcode"], content["retry_after_ms"]) == (429, "M_LIMIT_EXCEEDED", 5000)


@pytest_twisted.ensureDeferred
async def test_one_person_who_waits_in_many_rooms_keeps_nobody_out_of_other_lobbies(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby_book, "WAITING_PER_USER", 2)
    monkeypatch.setattr(lobby_book, "WAITING_IN_ALL", 3)
    rooms = [lobby_room(sandbox) for _ in range(3)]
    assert [(await poll(sandbox, CAROL, room_id)).code for room_id in rooms] == [202, 202, 429]
    assert (await poll(sandbox, BOB, rooms[2])).code == 202


@pytest_twisted.ensureDeferred
async def test_being_in_the_call_with_an_old_token_is_no_way_past_the_lobby(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    await sandbox.enter(ALICE, room_id)
    sandbox.livekit.connect(old_token(BOB, room_id))
    assert (await poll(sandbox, BOB, room_id)).code == 202


@pytest_twisted.ensureDeferred
async def test_a_dry_run_keeps_nobody_waiting(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_dry_run=True)
    assert (await sandbox.ask_token(BOB, lobby_room(sandbox))).code == 200


@pytest_twisted.ensureDeferred
async def test_a_caller_with_a_bad_openid_token_does_not_wait(sandbox: Sandbox) -> None:
    room_id = lobby_room(sandbox)
    bad = {**sandbox.homeserver.openid_token(BOB), "access_token": "nonsense"}
    assert (await sandbox.ask_token(BOB, room_id, openid_token=bad)).code == 401
    assert await waiting_in(sandbox, room_id) == []


@pytest_twisted.ensureDeferred
async def test_stopping_drops_silent_requests_without_an_answer(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox()
    answer = asking(sandbox, BOB, lobby_room(sandbox))
    outcome: list[Any] = []
    answer.addBoth(outcome.append)
    await waits(sandbox)
    await sandbox.guard.stopService()
    await until(lambda: outcome)
    assert not isinstance(outcome[0], Answer)
    await sandbox.start_guard()


@pytest.mark.parametrize("change", ["switched_off", "promoted"])
@pytest_twisted.ensureDeferred
async def test_a_remembered_refusal_does_not_outlast_what_the_room_says_now(
    start_sandbox: StartSandbox, change: str
) -> None:
    sandbox = await start_sandbox(guard_lobby_wait=1, guard_policy_ttl=3600)
    room_id = lobby_room(sandbox)
    assert error_of(await sandbox.ask_token(BOB, room_id)) == (403, "Nobody admitted you in time.")
    if change == "switched_off":
        sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": False})
    else:
        sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, BOB: 50}})
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
