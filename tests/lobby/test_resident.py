# SPDX-License-Identifier: Apache-2.0
"""The lobby in a room that the guard's account was invited to: notices, reactions and commands, all over the wire.

There is no operators' token in these tests: only the room's moderators can admit anybody.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.clients.http import Answer
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.metrics import Metrics
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, DAVE, counted, logged, named
from tests.conftest import StartSandbox, until
from tests.lobby.test_joining import asking, error_of, waits
from tests.residence.helpers import GUARD, invited_room, notices, resident_sandbox, use_account
from tests.residence.test_commands import let_guard_write

NOT_ADMITTED = (403, "You were not admitted to this call.")
REMOVED = (403, "You were removed from this call.")


async def resident_lobby(
    start_sandbox: StartSandbox, max_users: int | None = None, *, encrypted: bool = False, **settings: Any
) -> tuple[Sandbox, str]:
    """A room with a lobby that the guard was invited to. Alice moderates; nobody else does."""
    sandbox = await resident_sandbox(start_sandbox, guard_admin_token="", **settings)
    room_id = await invited_room(sandbox, max_users)
    if encrypted:
        sandbox.homeserver.set_state(room_id, "m.room.encryption", {"algorithm": "m.megolm.v1.aes-sha2"})
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True})
    await until(lambda: sandbox.guard.policies.last_known(room_id).lobby is not None)
    return sandbox, room_id


def notice_about(sandbox: Sandbox, room_id: str, user: str) -> str:
    """The event ID of the notice that asks about a user; ``""`` if there is none, or it was redacted."""
    for _, event in sandbox.homeserver.rooms[room_id].timeline:
        if event["sender"] == GUARD and f"{user} asks to join" in str(event["content"].get("body")):
            return str(event["event_id"])
    return ""


async def asked_about(sandbox: Sandbox, room_id: str, user: str) -> str:
    await until(lambda: notice_about(sandbox, room_id, user))
    return notice_about(sandbox, room_id, user)


async def wait_for(sandbox: Sandbox, room_id: str, *users: str) -> list[Deferred[Answer]]:
    """Each of these users asks for a token, and waits."""
    asked = [asking(sandbox, user, room_id) for user in users]
    await waits(sandbox, len(users))
    return asked


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest_twisted.ensureDeferred
async def test_a_moderators_reaction_admits(start_sandbox: StartSandbox, encrypted: bool) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox, encrypted=encrypted)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    event_id = await asked_about(sandbox, room_id, BOB)
    with logged() as events:
        sandbox.homeserver.react(room_id, ALICE, event_id, "👍")
        sandbox.homeserver.react(room_id, CAROL, event_id, "✅")
        await until(lambda: named(events, "lobby_reaction_ignored"))
    assert not answer.called
    sandbox.homeserver.react(room_id, ALICE, event_id, "✅")
    admitted = await answer
    assert admitted.code == 200
    bob = sandbox.livekit.connect(json.loads(admitted.body)["jwt"])
    await until(lambda: not notice_about(sandbox, room_id, BOB))
    await sandbox.livekit.drained()
    await sandbox.guard.enforcement.worker.idle()
    assert bob.connected


@pytest_twisted.ensureDeferred
async def test_a_moderators_reaction_denies(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    sandbox.homeserver.react(room_id, ALICE, await asked_about(sandbox, room_id, BOB), "❌")
    assert error_of(await answer) == NOT_ADMITTED
    assert not sandbox.upstream.issued
    await until(lambda: not notice_about(sandbox, room_id, BOB))


@pytest_twisted.ensureDeferred
async def test_a_moderator_who_was_demoted_does_not_decide_any_more(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    event_id = await asked_about(sandbox, room_id, BOB)
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {DAVE: 50}})
    sandbox.homeserver.react(room_id, ALICE, event_id, "❌")
    await answer_from(sandbox, room_id, "!call help", DAVE)
    assert not answer.called
    sandbox.homeserver.react(room_id, DAVE, event_id, "✅")
    assert (await answer).code == 200


@pytest_twisted.ensureDeferred
async def test_commands_admit_and_deny(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    bob, carol = await wait_for(sandbox, room_id, BOB, CAROL)
    status = await answer_from(sandbox, room_id, "!call")
    assert f"Waiting: {BOB}, {CAROL}." in status
    assert await answer_from(sandbox, room_id, f"!call admit {BOB}") == f"{BOB} was admitted."
    assert (await bob).code == 200
    assert await answer_from(sandbox, room_id, f"!call deny {CAROL}") == f"{CAROL} was denied."
    assert error_of(await carol) == NOT_ADMITTED
    assert await answer_from(sandbox, room_id, f"!call deny {CAROL}") == f"{CAROL} is not waiting."
    assert await answer_from(sandbox, room_id, "!call admit all") == "Nobody is waiting."


@pytest.mark.parametrize(("verb", "code"), [("admit", 200), ("deny", 403)])
@pytest_twisted.ensureDeferred
async def test_one_command_decides_about_all_who_wait(start_sandbox: StartSandbox, verb: str, code: int) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    asked = await wait_for(sandbox, room_id, BOB, CAROL)
    await answer_from(sandbox, room_id, f"!call {verb} all")
    assert [(await answer).code for answer in asked] == [code, code]


@pytest_twisted.ensureDeferred
async def test_a_command_of_somebody_below_the_level_decides_nothing(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    assert "needs power level 50" in await answer_from(sandbox, room_id, "!call admit all", CAROL)
    assert not answer.called
    await answer_from(sandbox, room_id, "!call admit all")
    assert (await answer).code == 200


@pytest_twisted.ensureDeferred
async def test_commands_remove_mute_limit_and_end(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    let_guard_write(sandbox, room_id)  # Bob has level 50 from now on: he does not wait
    alice, bob = await sandbox.enter(ALICE, room_id), await sandbox.enter(BOB, room_id, new=True)
    bob.publish("MICROPHONE")
    assert "muted" in await answer_from(sandbox, room_id, f"!call mute {BOB}")
    assert all(track.muted for track in bob.tracks.values())
    assert await answer_from(sandbox, room_id, "!call limit 2") == "At most 2 people may be in the call now."
    (carol,) = await wait_for(sandbox, room_id, CAROL)
    await answer_from(sandbox, room_id, f"!call admit {CAROL}")
    assert error_of(await carol) == (403, "This voice channel is full.")
    assert "removed" in await answer_from(sandbox, room_id, f"!call remove {BOB}")
    assert not bob.connected
    assert error_of(await sandbox.ask_token(BOB, room_id)) == REMOVED
    assert await answer_from(sandbox, room_id, f"!call admit {BOB}") == f"{BOB} was admitted."
    assert (await sandbox.enter(BOB, room_id)).connected
    assert await answer_from(sandbox, room_id, "!call end") == "The call was ended; 2 participants were removed."
    assert not alice.connected
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_somebody_who_is_banned_while_waiting_is_refused(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    sandbox.homeserver.ban(room_id, BOB, sender=ALICE)
    await answer_from(sandbox, room_id, f"!call admit {BOB}")
    assert error_of(await answer) == (403, "You are not a member of this room.")


@pytest_twisted.ensureDeferred
async def test_switching_the_lobby_off_in_the_room_lets_everybody_in(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": False})
    assert (await answer).code == 200


@pytest_twisted.ensureDeferred
async def test_a_guard_that_is_removed_from_the_room_keeps_nobody_waiting(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    sandbox.homeserver.kick(room_id, GUARD, sender=ALICE)
    assert (await answer).code == 200


@pytest_twisted.ensureDeferred
async def test_after_a_restart_people_wait_on_and_the_old_notice_decides(
    start_sandbox: StartSandbox, tmp_path: Any
) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox, guard_state_dir=tmp_path)
    cut_off = asking(sandbox, BOB, room_id)
    cut_off.addErrback(lambda failure: None)
    event_id = await asked_about(sandbox, room_id, BOB)
    await use_account(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    assert not answer.called
    assert notice_about(sandbox, room_id, BOB) == event_id
    sandbox.homeserver.react(room_id, ALICE, event_id, "✅")
    assert (await answer).code == 200
    assert counted(sandbox, "lobby_decisions_total", decision="admitted") == 1


@pytest_twisted.ensureDeferred
async def test_people_wait_on_while_a_restarted_guard_cannot_hear_the_room_yet(
    start_sandbox: StartSandbox, tmp_path: Any
) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox, guard_state_dir=tmp_path)
    sandbox.homeserver.faults["sync"] = Fault.delay(3)
    await use_account(sandbox)
    answer = asking(sandbox, BOB, room_id)
    await waits(sandbox)
    assert not sandbox.guard.residence.alive
    await until(lambda: sandbox.guard.residence.alive, 30)
    assert not answer.called
    sandbox.homeserver.react(room_id, ALICE, await asked_about(sandbox, room_id, BOB), "✅")
    assert (await answer).code == 200


@pytest_twisted.ensureDeferred
async def test_people_wait_on_while_the_sync_fails_for_a_moment(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    (answer,) = await wait_for(sandbox, room_id, BOB)
    event_id = await asked_about(sandbox, room_id, BOB)
    sandbox.homeserver.faults["sync"] = Fault.status(503, times=2)
    sandbox.homeserver.send_message(room_id, ALICE, "The next sync fails.")
    await until(lambda: not sandbox.guard.residence.alive)
    carol = asking(sandbox, CAROL, room_id)
    await waits(sandbox, 2)
    await until(lambda: sandbox.guard.residence.alive, 60)
    assert not answer.called
    sandbox.homeserver.react(room_id, ALICE, event_id, "✅")
    assert (await answer).code == 200
    sandbox.homeserver.react(room_id, ALICE, await asked_about(sandbox, room_id, CAROL), "❌")
    assert error_of(await carol) == NOT_ADMITTED


def test_a_sync_that_fails_for_a_minute_is_not_waited_for() -> None:
    clock = Clock()
    residence = Residence(None, clock, clock.seconds, Metrics())
    assert residence.hears("!room:example.org")
    clock.advance(59)
    assert residence.hears("!room:example.org")
    clock.advance(1)
    assert not residence.hears("!room:example.org")


async def answer_from(sandbox: Sandbox, room_id: str, body: str, sender: str = ALICE) -> str:
    """Send a command and wait for its answer, whatever notices of the lobby come first."""
    before = len(answers(sandbox, room_id))
    sandbox.homeserver.send_message(room_id, sender, body)
    await until(lambda: len(answers(sandbox, room_id)) > before)
    return answers(sandbox, room_id)[before]


def answers(sandbox: Sandbox, room_id: str) -> list[str]:
    return [text for text in notices(sandbox, room_id) if "asks to join the call" not in text]


@pytest_twisted.ensureDeferred
async def test_a_ban_that_the_guards_account_sees_ends_the_waiting(start_sandbox: StartSandbox) -> None:
    sandbox, room_id = await resident_lobby(start_sandbox)
    answer, other = await wait_for(sandbox, room_id, BOB, CAROL)
    other.addErrback(lambda failure: None)  # the guard stops while Carol waits
    sandbox.homeserver.ban(room_id, BOB)
    assert error_of(await answer) == (403, "You are not a member of this room.")
    await waits(sandbox, 1)
