# SPDX-License-Identifier: Apache-2.0
"""Moderators decide by reacting to a notice in the room."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import pytest_twisted
from attrs import define, field
from twisted.internet.task import Clock

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.lobby.notices import LobbyNotices
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.remembered import RememberedPolicies
from lotusguard.metrics import Metrics
from lotusguard.rules.lobby import LobbyEntry, LobbyState
from lotusguard.rules.membership import Membership
from lotusguard.rules.state import StateEvent
from lotusguard.wiring import guard as wiring
from tests.calls import BOB as SANDBOX_BOB
from tests.conftest import StartSandbox, until
from tests.lobby.test_joining import asking, lobby_room, waits
from tests.lobby.voice import FakeVoice, lobby_on, now

ROOM, MOD, BOB, EVE = "!room:example.org", "@mod:example.org", "@bob:example.org", "@eve:example.org"


@define(eq=False)
class Room:
    """A homeserver with one room. :ivar level: the moderator's power level."""

    level: int = 50
    message: str = ""
    failing: bool = False

    async def room_state(self, room_id: str, types: Collection[str]) -> Mapping[str, StateEvent]:
        if self.failing:
            raise DependencyFailed("synapse", "timeout")
        contents: dict[str, Any] = {
            "m.room.create": {},
            "m.room.power_levels": {"users": {MOD: self.level}},
            "io.lotus.lobby": {"enabled": True, "message": self.message},
        }
        return {type: StateEvent(type, content, "@creator:example.org") for type, content in contents.items()}

    async def membership(self, user_id: str, room_id: str) -> Membership:
        return Membership.JOIN

    async def members(self, room_id: str) -> frozenset[str] | None:
        return None


@define(eq=False)
class Asked:
    """A lobby whose moderators are asked by notices, on a clock."""

    operators: bool = True
    clock: Clock = field(factory=Clock)
    voice: FakeVoice = field(factory=FakeVoice)
    room: Room = field(factory=Room)
    lobby: Lobby = field(init=False)
    policies: Policies = field(init=False)
    notices: LobbyNotices = field(init=False)

    def __attrs_post_init__(self) -> None:
        metrics = Metrics()
        self.lobby = lobby_on(self.clock, metrics)
        self.policies = Policies(self.room, RememberedPolicies(metrics), self.clock, metrics, ttl=10, stale=3600)
        self.notices = LobbyNotices(self.lobby, self.policies, self.voice, self.clock, 1.5, self.operators)
        self.notices.start()

    def lose_answers(self) -> None:
        """Notices arrive in the room, which the guard has read, and it is not told."""
        now(self.policies.get(ROOM, Deadline.after(self.clock, 1.5)))
        self.voice.answers_lost = True

    def ask(self, room_id: str, user: str) -> LobbyEntry:
        return now(self.lobby.ask(room_id, user))

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.advance(1.0)
            now(self.lobby.pass_time())
            self.notices.pass_time()


def test_one_notice_asks_about_a_person_and_offers_two_reactions() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.ask(ROOM, BOB)
    assert asked.voice.notices == [(ROOM, "$0", f"{BOB} asks to join the call: ✅ admit, ❌ deny")]
    assert asked.voice.reactions == [("$0", "✅"), ("$0", "❌")]


@pytest.mark.parametrize(
    ("key", "state"), [("✅", LobbyState.ACCEPTED), ("✅\ufe0f", LobbyState.ACCEPTED), ("❌", LobbyState.DENIED)]
)
def test_a_moderators_reaction_decides_and_the_notice_is_redacted(key: str, state: LobbyState) -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.voice.hear(MOD, key)
    assert asked.lobby.state_of(ROOM, BOB) is state
    assert asked.voice.redacted == ["$0"]


@pytest.mark.parametrize(("sender", "key"), [(BOB, "✅"), (EVE, "❌"), (MOD, "👍")])
def test_other_reactions_decide_nothing(sender: str, key: str) -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.voice.hear(sender, key)
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING
    assert asked.voice.redacted == []


def test_a_reaction_in_another_room_decides_nothing() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.voice.hear(MOD, "✅", room_id="!other:example.org")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING


def test_the_level_counts_that_the_sender_has_when_the_reaction_arrives() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.room.level = 0
    asked.voice.hear(MOD, "✅")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING
    asked.clock.advance(0.1)
    asked.room.level = 100
    asked.voice.hear(MOD, "✅")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


def test_the_last_known_level_counts_while_the_homeserver_does_not_answer() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.voice.hear(EVE, "✅")  # reads the room
    asked.room.failing = True
    asked.clock.advance(0.1)
    asked.voice.hear(MOD, "✅")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


def test_the_second_of_two_moderators_changes_nothing() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.voice.hear(MOD, "✅")
    asked.voice.hear(MOD, "❌")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


def test_a_notice_that_was_redacted_is_not_taken_over_after_a_restart() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    assert [entry.notice for _, entry in asked.lobby.noticed()] == ["$0"]
    asked.voice.hear(MOD, "✅")
    assert asked.lobby.noticed() == []


def test_somebody_who_asks_again_soon_gets_no_second_notice() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.wait(5)
    assert asked.lobby.state_of(ROOM, BOB) is None
    asked.ask(ROOM, BOB)
    asked.wait(1)
    assert len(asked.voice.notices) == 1
    asked.voice.hear(MOD, "✅")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


def test_after_a_denial_the_next_notice_comes_a_minute_after_the_first() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.voice.hear(MOD, "❌")
    for second in range(60):
        assert len(asked.voice.notices) == 1, second
        asked.wait(1)
        if second > 5:
            asked.ask(ROOM, BOB)
    assert len(asked.voice.notices) == 2


def test_the_notice_about_somebody_who_stopped_waiting_is_redacted_after_a_minute() -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.wait(59)
    assert asked.voice.redacted == []
    asked.wait(1)
    assert asked.voice.redacted == ["$0"]


def test_where_the_account_is_not_in_the_room_nothing_is_sent() -> None:
    asked = Asked()
    asked.voice.resident = False
    asked.ask(ROOM, BOB)
    assert asked.voice.notices == []


@pytest.mark.parametrize(("operators", "state"), [(True, LobbyState.WAITING), (False, LobbyState.ACCEPTED)])
def test_a_notice_that_cannot_be_sent_leaves_nobody_waiting_whom_nobody_could_admit(
    operators: bool, state: LobbyState
) -> None:
    asked = Asked(operators)
    asked.voice.failing = True
    asked.ask(ROOM, BOB).held = 1
    asked.wait(19)
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING
    asked.wait(1)
    assert asked.lobby.state_of(ROOM, BOB) is state


@pytest.mark.parametrize("failures", [1, 3])
def test_a_notice_that_fails_for_a_moment_is_sent_again_and_admits_nobody(failures: int) -> None:
    asked = Asked(operators=False)
    asked.voice.failing = True
    asked.ask(ROOM, BOB).held = 1
    asked.wait(failures - 1)
    asked.voice.failing = False
    asked.wait(1)
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING
    assert len(asked.voice.notices) == 1
    asked.voice.hear(MOD, "❌")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.DENIED


@pytest.mark.parametrize(("sender", "seconds", "state"), [
    (MOD, 1, LobbyState.ACCEPTED), (EVE, 1, LobbyState.WAITING), (MOD, 65, LobbyState.WAITING),
])  # fmt: skip
def test_a_reaction_counts_that_is_heard_before_the_answer_to_the_notice(
    sender: str, seconds: int, state: LobbyState
) -> None:
    asked = Asked()
    asked.lose_answers()
    asked.ask(ROOM, BOB).held = 1
    asked.voice.hear(sender, "✅")
    asked.wait(seconds)
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING
    asked.voice.answers_lost = False
    asked.wait(1)
    assert asked.lobby.state_of(ROOM, BOB) is state


def test_reactions_to_other_events_do_not_crowd_out_a_moderators_early_reaction() -> None:
    asked = Asked()
    asked.lose_answers()
    asked.ask(ROOM, BOB)
    asked.voice.hear(MOD, "✅")
    for number in range(1_000):
        asked.voice.hear(EVE, "✅", event_id=f"$made-up-{number}")
    asked.voice.answers_lost = False
    asked.wait(1)
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


def test_a_moderator_who_was_demoted_since_the_reaction_decides_nothing() -> None:
    asked = Asked()
    asked.lose_answers()
    asked.ask(ROOM, BOB)
    asked.voice.hear(MOD, "✅")
    asked.room.level = 0
    asked.voice.answers_lost = False
    asked.wait(1)
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING


def test_a_notice_that_fails_in_an_unexpected_way_is_sent_again() -> None:
    asked = Asked()
    asked.voice.unexpected = RuntimeError("not foreseen")
    asked.ask(ROOM, BOB).held = 1
    asked.wait(1)
    asked.voice.unexpected = None
    asked.wait(1)
    asked.voice.hear(MOD, "✅")
    assert asked.lobby.state_of(ROOM, BOB) is LobbyState.ACCEPTED


@pytest.mark.parametrize(("seconds", "redacted"), [(1, True), (100, True), (200, False)])
def test_a_redaction_that_fails_is_tried_again_for_two_minutes(seconds: int, redacted: bool) -> None:
    asked = Asked()
    asked.ask(ROOM, BOB)
    asked.voice.failing = True
    asked.voice.hear(MOD, "✅")
    asked.wait(seconds)
    asked.voice.failing = False
    asked.wait(100)
    assert asked.voice.redacted == ["$0"] * redacted
    assert bool(asked.lobby.noticed()) is not redacted


@pytest_twisted.ensureDeferred
async def test_a_reaction_admits_over_the_wire(start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = FakeVoice()
    monkeypatch.setattr(wiring, "ResidentVoice", lambda *_: voice)
    sandbox = await start_sandbox(guard_admin_token="")
    room_id = lobby_room(sandbox, message="Please say who you are.")
    answer = asking(sandbox, SANDBOX_BOB, room_id)
    await waits(sandbox)
    await until(lambda: len(voice.reactions) == 2)
    assert voice.notices[0][2].endswith("❌ deny\nPlease say who you are.")
    voice.hear(SANDBOX_BOB, "✅")
    voice.hear("@alice:sandbox.local", "✅")
    assert (await answer).code == 200
    await until(lambda: voice.redacted)


def test_a_flood_of_notices_in_other_rooms_does_not_open_the_lobby() -> None:
    asked = Asked(operators=False)
    asked.voice.seconds, asked.voice.clock = 1.0, asked.clock
    for number in range(50):
        asked.ask(f"!other{number}:example.org", f"@{number}:example.org")
    asked.ask(ROOM, BOB).held = 1
    for _ in range(100):
        asked.wait(1)
        assert asked.lobby.state_of(ROOM, BOB) is LobbyState.WAITING
    assert ROOM in [room_id for room_id, *_ in asked.voice.notices]
