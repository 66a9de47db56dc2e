# SPDX-License-Identifier: Apache-2.0
"""What moderators command by messages in rooms the guard is in."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted
from attrs import Factory, define
from twisted.internet import reactor

from lotusguard.guard.calls.moderation import ModerationAction
from lotusguard.rules.commands import Authority, Command, NotACommand, Verb, is_command, read_command
from lotusguard.rules.state import StateEvent
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, DAVE, counted, seen_in
from tests.conftest import StartSandbox, until
from tests.residence.helpers import GUARD, invited_room, notices, resident_sandbox

LIMIT = "io.lotus.voice_limit"


@define
class RecordedModeration:
    """Does what it is told to those it knows."""

    known: tuple[str, ...] = (BOB, CAROL)
    done: list[tuple[str, str, str]] = Factory(list)

    async def act(self, room_id: str, user: str, action: ModerationAction, by: str) -> bool:
        if user in self.known:
            self.done.append((action.value, user, by))
        return user in self.known


async def answer_to(sandbox: Sandbox, room_id: str, sender: str, body: str, **content: Any) -> str:
    """Send a message, and wait for what the guard answers."""
    before = len(notices(sandbox, room_id))
    sandbox.homeserver.send_event(
        room_id, "m.room.message", {"msgtype": "m.text", "body": body, **content}, sender=sender
    )
    await until(lambda: len(notices(sandbox, room_id)) > before)
    return notices(sandbox, room_id)[before]


async def arrived(sandbox: Sandbox, room_id: str, user: str) -> None:
    """Wait until the guard knows that a user is in the call."""
    end = reactor.seconds() + 15
    while (user, True) not in await seen_in(sandbox, room_id):
        assert reactor.seconds() < end


def let_guard_write(sandbox: Sandbox, room_id: str) -> None:
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, GUARD: 50, BOB: 50}})


# -- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "command"),
    [
        ("!call", Command(Verb.STATUS)),
        ("  !call  status ", Command(Verb.STATUS)),
        ("!call limit 10", Command(Verb.LIMIT, limit=10)),
        ("!call limit 0", Command(Verb.LIMIT)),
        ("!call remove @bob:example.org:8448", Command(Verb.REMOVE, "@bob:example.org:8448")),
        ("!call MUTE @bob:[::1]", Command(Verb.MUTE, "@bob:[::1]")),
        ("!call admit all", Command(Verb.ADMIT)),
        ("!call deny all", Command(Verb.DENY)),
        ("!call end", Command(Verb.END)),
        ("!call leave", Command(Verb.LEAVE)),
    ],
)
def test_command_is_read(body: str, command: Command) -> None:
    assert is_command(body)
    assert read_command(body) == command


@pytest.mark.parametrize(
    "body",
    ["!call limit", "!call limit ten", "!call limit -1", "!call limit ٣", "!call remove", "!call remove bob",
     "!call remove all", "!call mute all", "!call dance"],
)  # fmt: skip
def test_unreadable_command_says_what_is_expected(body: str) -> None:
    with pytest.raises(NotACommand, match="!call"):
        read_command(body)


def test_display_name_stands_for_the_one_user_whom_the_message_mentions() -> None:
    assert read_command("!call remove Bob B.", [BOB]) == Command(Verb.REMOVE, BOB)
    with pytest.raises(NotACommand):
        read_command("!call remove Bob B.", [BOB, CAROL])


@pytest.mark.parametrize("body", ["!callback", "call", "hello !call", "", "!", "> !call"])
def test_other_messages_are_no_commands(body: str) -> None:
    assert not is_command(body)


def test_level_for_state_comes_from_the_event_then_the_default() -> None:
    create = StateEvent("m.room.create", {"room_version": "10"}, ALICE)

    def level(content: dict[str, Any] | None) -> int:
        events = {"m.room.create": create}
        if content is not None:
            events["m.room.power_levels"] = StateEvent("m.room.power_levels", content)
        return Authority.of_state(events).level_to_send(LIMIT)

    assert [level(None), level({}), level({"state_default": 30}), level({"events": {LIMIT: 70}})] == [0, 50, 30, 70]


# -- doing -----------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_status_names_limit_participants_and_what_is_forbidden(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 3, allow_camera=False)
    await sandbox.enter(BOB, room_id)
    await arrived(sandbox, room_id, BOB)
    answer = await answer_to(sandbox, room_id, ALICE, "!call")
    assert answer.splitlines() == ["Limit: 3 (1 taken).", f"In the call: {BOB}.", "Forbidden: camera."]


@pytest_twisted.ensureDeferred
async def test_status_names_rights_exceptions_and_the_lobby(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    content = {"microphone": 50, "users": {BOB: {"microphone": True}, CAROL: {"join": False}}}
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", content)
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True})
    assert (await answer_to(sandbox, room_id, ALICE, "!call")).splitlines() == [
        "No limit.", "In the call: nobody.", "Power levels: microphone 50.",
        f"Exceptions: {BOB} (microphone), {CAROL} (no join).", "Lobby: on.",
    ]  # fmt: skip


@pytest_twisted.ensureDeferred
async def test_status_says_what_is_not_enforced(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox, guard_dry_run=True)
    room_id = await invited_room(sandbox, 3)
    assert "GUARD_DRY_RUN is on" in await answer_to(sandbox, room_id, ALICE, "!call")


@pytest_twisted.ensureDeferred
async def test_member_without_the_level_is_told_which_one_it_takes(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 3)
    answer = await answer_to(sandbox, room_id, CAROL, "!call end")
    assert answer == f"{CAROL}: this needs power level 50, yours is 0."
    assert counted(sandbox, "commands_total", outcome="refused") == 1


@pytest_twisted.ensureDeferred
async def test_level_is_the_one_at_the_moment_of_the_command(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 3)
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", {"moderate": 20})
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, CAROL: 20}})
    assert (await answer_to(sandbox, room_id, CAROL, "!call end")) == "Nobody is in the call."
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100}})
    assert "power level 20" in await answer_to(sandbox, room_id, CAROL, "!call end")


@pytest_twisted.ensureDeferred
async def test_limit_is_written_into_room_state_and_holds(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    sandbox.homeserver.set_state(room_id, LIMIT, {"max_users": 9, "note": "kept"})
    let_guard_write(sandbox, room_id)
    answer = await answer_to(sandbox, room_id, ALICE, "!call limit 1")
    assert answer == "At most 1 people may be in the call now."
    assert sandbox.homeserver.rooms[room_id].content(LIMIT) == {"max_users": 1, "note": "kept"}
    await until(lambda: sandbox.guard.policies.last_known(room_id).max_users == 1)
    await sandbox.enter(BOB, room_id)
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_guard_that_may_not_write_state_says_which_level_it_lacks(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 3)
    answer = await answer_to(sandbox, room_id, ALICE, "!call limit 1")
    assert answer == f"I cannot change the limit: {LIMIT} needs power level 50, mine is 0."
    assert sandbox.homeserver.rooms[room_id].content(LIMIT) == {"max_users": 3}


@pytest_twisted.ensureDeferred
async def test_moderator_who_may_not_write_state_does_not_do_it_through_the_guard(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox, 3)
    levels = {"users": {ALICE: 100, GUARD: 100, BOB: 50}, "events": {LIMIT: 100}}
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", levels)
    answer = await answer_to(sandbox, room_id, BOB, "!call limit 1")
    assert answer == f"{BOB}: changing {LIMIT} needs power level 100, yours is 50."
    assert sandbox.homeserver.rooms[room_id].content(LIMIT) == {"max_users": 3}


@pytest_twisted.ensureDeferred
async def test_people_are_removed_muted_admitted_and_denied(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    moderation = RecordedModeration()
    sandbox.guard.commands.moderation = moderation
    sandbox.guard.commands.waiting = lambda room_id: (BOB, CAROL)
    for body in (f"!call remove {BOB}", f"!call mute {CAROL}", f"!call admit {BOB}", "!call deny all"):
        await answer_to(sandbox, room_id, ALICE, body)
    assert moderation.done == [
        ("remove", BOB, ALICE), ("mute", CAROL, ALICE), ("admit", BOB, ALICE), ("deny", BOB, ALICE),
        ("deny", CAROL, ALICE),
    ]  # fmt: skip
    assert await answer_to(sandbox, room_id, ALICE, f"!call remove {DAVE}") == f"{DAVE} is not in the call."


@pytest_twisted.ensureDeferred
async def test_end_removes_everybody_who_may_come_back(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    bob, carol = await sandbox.enter(BOB, room_id), await sandbox.enter(CAROL, room_id, new=True)
    assert await answer_to(sandbox, room_id, ALICE, "!call end") == "The call was ended; 2 participants were removed."
    assert not bob.connected
    assert not carol.connected
    assert (await sandbox.enter(BOB, room_id)).connected


@pytest_twisted.ensureDeferred
async def test_leave_makes_the_guard_leave_and_forget_the_room(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    assert "leave" in await answer_to(sandbox, room_id, ALICE, "!call leave")
    await until(lambda: GUARD in sandbox.homeserver.rooms[room_id].forgotten_by)
    assert not sandbox.guard.residence.is_resident(room_id)


@pytest_twisted.ensureDeferred
async def test_notices_edits_and_old_messages_are_not_answered(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = sandbox.homeserver.create_room(ALICE)
    sandbox.homeserver.send_message(room_id, ALICE, "!call end")
    sandbox.homeserver.invite(room_id, GUARD, sender=ALICE)
    await until(lambda: sandbox.guard.residence.is_resident(room_id))
    for content in (
        {"msgtype": "m.notice", "body": "!call end"},
        {"msgtype": "m.text", "body": "!call end", "m.relates_to": {"rel_type": "m.replace", "event_id": "$1"}},
        {"msgtype": "m.text", "body": 7},
    ):
        sandbox.homeserver.send_event(room_id, "m.room.message", content, sender=ALICE)
    await answer_to(sandbox, room_id, ALICE, "!call help")
    assert len(notices(sandbox, room_id)) == 1


@pytest_twisted.ensureDeferred
async def test_flood_of_commands_is_answered_ten_times(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    for _ in range(40):
        sandbox.homeserver.send_message(room_id, ALICE, "!call")
    await until(lambda: counted(sandbox, "commands_total", outcome="dropped") >= 29)
    await sandbox.guard.commands.worker.idle()
    assert len(notices(sandbox, room_id)) <= 12


@pytest_twisted.ensureDeferred
async def test_flood_of_commands_by_others_does_not_silence_the_moderators(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    for _ in range(40):
        sandbox.homeserver.send_message(room_id, CAROL, "!call end")
    await until(lambda: counted(sandbox, "commands_total", outcome="dropped") >= 35)
    await sandbox.guard.commands.worker.idle()
    assert len(notices(sandbox, room_id)) <= 5
    assert await answer_to(sandbox, room_id, ALICE, "!call end") == "Nobody is in the call."


@pytest_twisted.ensureDeferred
async def test_moderator_who_is_demoted_before_the_command_is_done_is_refused(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    let_guard_write(sandbox, room_id)
    carol = await sandbox.enter(CAROL, room_id)
    sandbox.homeserver.send_message(room_id, BOB, "!call end")  # both arrive with one answer
    sandbox.homeserver.set_state(room_id, "m.room.power_levels", {"users": {ALICE: 100, GUARD: 50}})
    await until(lambda: notices(sandbox, room_id))
    assert notices(sandbox, room_id) == [f"{BOB}: this needs power level 50, yours is 0."]
    assert carol.connected


@pytest_twisted.ensureDeferred
async def test_leaving_that_fails_is_said_and_stops_no_later_command(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    sandbox.homeserver.faults["leave"] = Fault.status(500, times=1)
    assert "I leave" in await answer_to(sandbox, room_id, ALICE, "!call leave")
    await until(lambda: "I could not leave (status_500)." in notices(sandbox, room_id))
    assert await answer_to(sandbox, room_id, ALICE, "!call end") == "Nobody is in the call."


@pytest_twisted.ensureDeferred
async def test_user_ids_of_any_characters_do_not_forge_a_notice(start_sandbox: StartSandbox) -> None:
    sandbox = await resident_sandbox(start_sandbox)
    room_id = await invited_room(sandbox)
    forged = {f"@x{number}\nLobby: off.\u202e:evil": {"join": False} for number in range(3000)}
    sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", {"users": forged})
    lines = (await answer_to(sandbox, room_id, ALICE, "!call")).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["No limit.", "In the call", "Exceptions"]
    assert "\u202e" not in lines[2]
    assert lines[2].endswith("and 2980 more.")
