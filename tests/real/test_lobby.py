# SPDX-License-Identifier: Apache-2.0
"""The lobby with the real services: a moderator's reaction in a real Synapse, then a real call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from signal import SIGKILL

import pytest
from attrs import frozen

from tests.real.conftest import RunStack
from tests.real.lobby import ADMIT, DENY, ENCRYPTION, LobbyRoom, run_resident_guard
from tests.real.processes import HttpAnswer, eventually, http
from tests.real.stack import Stack

PATIENCE = 60.0
NOT_ADMITTED = {"errcode": "M_FORBIDDEN", "error": "You were not admitted to this call."}


@frozen
class Lobby:
    """A lobby and the requests of those who wait in it."""

    room: LobbyRoom
    requests: ThreadPoolExecutor

    @property
    def stack(self) -> Stack:
        return self.room.stack

    def asks(self, user: str, **how: object) -> Future[HttpAnswer]:
        """Ask for a token, and wait until the lobby shows it. :return: the answer, once there is one."""
        self.stack.join(user, self.room.room_id)
        asked = self.requests.submit(self.stack.ask_token, user, self.room.room_id, **how)  # type: ignore[arg-type]
        eventually(lambda: asked.done() or user in self.room.waiting(), PATIENCE, f"{user} has to wait")
        assert not asked.done(), asked.result().body
        return asked

    def notice(self, user: str) -> str:
        notice: str = eventually(lambda: self.room.notice(user), PATIENCE, f"a notice about {user}")
        return notice


@pytest.fixture(scope="session")
def guard_account(dependencies: Stack) -> str:
    return dependencies.users("guard")[0]


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def lobby(run_stack: RunStack, guard_account: str, request: pytest.FixtureRequest) -> Iterator[Lobby]:
    """An empty lobby, in a plain and in an encrypted room."""
    stack = run_stack(pushed=True)
    run_resident_guard(stack, guard_account)
    room_id = stack.room()
    if request.param:
        stack.set_state(room_id, "m.room.encryption", ENCRYPTION)
    with ThreadPoolExecutor(8) as requests:
        yield Lobby(LobbyRoom.open(stack, room_id, guard_account, message="Say who you are."), requests)


@pytest.mark.parametrize("new", [False, True], ids=["sfu_get", "get_token"])
def test_a_person_whom_a_reaction_admits_joins_the_call(lobby: Lobby, new: bool) -> None:
    stack, room_id = lobby.stack, lobby.room.room_id
    bob, carol = stack.users("bob", "carol")
    asked = lobby.asks(bob, new=new)
    notice = lobby.notice(bob)
    lobby.room.react(notice, ADMIT, bob)
    assert stack.participants(room_id) == []
    lobby.room.react(notice, ADMIT)
    call = stack.connect(bob, asked.result(PATIENCE).content["jwt"])
    call.publish("MICROPHONE")
    moderator = stack.enter(stack.moderator, room_id, listen=True)
    moderator.hears(call, "MICROPHONE")
    assert stack.ask_token(bob, room_id, device="TABLET", new=new).status == 200, "also for other devices"
    eventually(lambda: not lobby.room.notice(bob), PATIENCE, "the notice is redacted")
    denied = lobby.asks(carol, new=new)
    lobby.room.react(lobby.notice(carol), DENY)
    assert (denied.result(PATIENCE).status, denied.result().content) == (403, NOT_ADMITTED)
    assert call.ended is None


def test_the_answers_to_requests_that_poll(lobby: Lobby) -> None:
    (bob,) = lobby.stack.users("bob")
    lobby.stack.join(bob, lobby.room.room_id)
    content = {
        "room": lobby.room.room_id,
        "device_id": "PHONE",
        "openid_token": lobby.stack.openid_token(bob),
    }
    waiting = http("POST", f"{lobby.stack.guard_url}/sfu/get?lobby=poll", content)
    assert (waiting.status, waiting.content["status"]) == (202, "waiting")
    again = http("POST", f"{lobby.stack.guard_url}/sfu/get", content, Prefer="respond-async")
    assert json.loads(again.body) == waiting.content, "the same entry"
    lobby.room.react(lobby.notice(bob), ADMIT)

    def admitted() -> bool:
        return http("POST", f"{lobby.stack.guard_url}/sfu/get?lobby=poll", content).status == 200

    eventually(admitted, PATIENCE, "the admission")


def test_people_wait_on_after_the_guard_was_killed(lobby: Lobby) -> None:
    stack = lobby.stack
    (bob,) = stack.users("bob")
    cut_off = lobby.asks(bob)
    notice = lobby.notice(bob)
    assert stack.guard is not None
    stack.guard.restart(SIGKILL)
    with pytest.raises(OSError, match=r"Remote end closed|reset"):
        cut_off.result(PATIENCE)
    assert lobby.room.waiting() == [bob], "before they ask again"
    asked = lobby.asks(bob)
    assert lobby.room.notice(bob) == notice, "the notice is still the same"
    lobby.room.react(notice, ADMIT)
    assert stack.connect(bob, asked.result(PATIENCE).content["jwt"]).ended is None


def test_commands_decide_where_messages_can_be_read(run_stack: RunStack, guard_account: str) -> None:
    stack = run_stack(pushed=True)
    run_resident_guard(stack, guard_account)
    with ThreadPoolExecutor(8) as requests:
        lobby = Lobby(LobbyRoom.open(stack, stack.room(), guard_account), requests)
        bob, carol, dave = stack.users("bob", "carol", "dave")
        asked = [lobby.asks(user) for user in (bob, carol, dave)]
        lobby.room.say("!call admit all", bob)
        lobby.room.say(f"!call admit {bob}")
        assert asked[0].result(PATIENCE).status == 200
        assert lobby.room.waiting() == sorted((carol, dave))
        lobby.room.say(f"!call deny {carol}")
        assert asked[1].result(PATIENCE).content == NOT_ADMITTED
        lobby.room.say("!call admit all")
        assert asked[2].result(PATIENCE).status == 200
