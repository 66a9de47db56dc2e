# SPDX-License-Identifier: Apache-2.0
"""Two whole guards share lobbies, removals, pushed changes and one account through a real Valkey."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.task import deferLater

from lotusguard.clients.waiting import Deadline
from lotusguard.guard.seats import sharing
from lotusguard.guard.seats.redis import account
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.service import Guard
from tests.calls import ALICE, BOB, CAROL, DAVE, old_token, put_policy, room_of
from tests.conftest import StartSandbox, until
from tests.lobby.test_joining import asking, error_of, lobby_room, moderate, waiting_in
from tests.lobby.test_resident import NOT_ADMITTED, REMOVED, answers, asked_about, notice_about
from tests.residence.helpers import NEVER, invited_room, notices, use_account

from .conftest import OwnServer
from .guards import reactor
from .two import Two

SHORT_LEASE = 1.0


@pytest_twisted.async_yield_fixture
async def two(start_sandbox: StartSandbox, own_server: OwnServer) -> AsyncIterator[Two]:
    """Two guards that never reconcile and believe what they read for an hour: what they know is new, they were told."""
    sandbox = await start_sandbox(
        guard_redis_url=own_server.url, guard_reconcile_interval=NEVER, guard_policy_ttl=NEVER,
        guard_membership_interval=NEVER,
    )  # fmt: skip
    both = await Two.start(sandbox)
    yield both
    await both.stop()


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that does not renew its lease is replaced sooner than in operation."""
    monkeypatch.setattr(account, "LEASE_SECONDS", SHORT_LEASE)
    monkeypatch.setattr(sharing, "TURN_INTERVAL", 0.1)


@pytest_twisted.async_yield_fixture
async def resident(short_lease: None, start_sandbox: StartSandbox, own_server: OwnServer) -> AsyncIterator[Two]:
    """The same, with an account without admin rights. The first guard listens; nobody but moderators can admit."""
    sandbox = await start_sandbox(
        guard_redis_url=own_server.url, guard_reconcile_interval=NEVER, guard_policy_ttl=NEVER,
        guard_membership_interval=NEVER, guard_admin_token="",
    )  # fmt: skip
    await use_account(sandbox)
    await until(lambda: sandbox.guard.residence.alive)
    both = await Two.start(sandbox, matrix_token=sandbox.settings.matrix_token)
    await until(lambda: sandbox.guard.residence.status.value == "following")
    both.use(0)
    yield both
    await both.stop()


async def resident_lobby(two: Two, max_users: int | None = None) -> str:
    """A room with a lobby that both guards know."""
    sandbox = two.sandbox
    two.use(0)
    room_id = await invited_room(sandbox, max_users)
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True})
    await until(lambda: two.guards[0].policies.last_known(room_id).lobby is not None)
    await until(lambda: two.guards[1].residence.is_resident(room_id))
    return room_id


async def wait_at(two: Two, number: int, room_id: str, user: str = BOB) -> Any:
    """Somebody waits at one of the guards, and both know."""
    two.use(number)
    answer = asking(two.sandbox, user, room_id)
    await until(lambda: [waiting_at(guard) for guard in two.guards if guard.running] == [1, 1])
    return answer


def waiting_at(guard: Guard) -> float:
    return guard.metrics.registry.get_sample_value("lotusguard_lobby_waiting") or 0.0


@pytest.mark.parametrize(("action", "code"), [("admit", 200), ("deny", 403)])
@pytest_twisted.ensureDeferred
async def test_a_person_who_waits_at_one_guard_enters_when_the_other_is_told(two: Two, action: str, code: int) -> None:
    room_id = lobby_room(two.sandbox)
    answer = await wait_at(two, 0, room_id)
    for number in (1, 0):
        two.use(number)
        assert await waiting_in(two.sandbox, room_id) == [BOB]
    two.use(1)
    assert await moderate(two.sandbox, room_id, BOB, action) == 200
    assert (await answer).code == code
    assert await moderate(two.sandbox, room_id, BOB, "deny") == 404


@pytest_twisted.ensureDeferred
async def test_a_person_admitted_by_one_guard_stays_in_the_call_that_the_other_one_keeps(two: Two) -> None:
    room_id = lobby_room(two.sandbox)
    alice = await two.enter(1, ALICE, room_id)
    answer = await wait_at(two, 0, room_id)
    await moderate(two.sandbox, room_id, BOB, "admit")
    bob = two.sandbox.livekit.connect(json.loads((await answer).body)["jwt"])
    carol = two.sandbox.livekit.connect(old_token(CAROL, room_id))
    await until(lambda: not carol.connected)
    assert bob.connected
    assert alice.connected
    assert (await two.ask(1, BOB, room_id, device="LAPTOP")).code == 200


@pytest_twisted.ensureDeferred
async def test_a_person_removed_through_one_guard_is_refused_by_both_until_either_admits_them(two: Two) -> None:
    room_id = room_of(two.sandbox)
    bob = await two.enter(0, BOB, room_id)
    two.use(1)
    assert await moderate(two.sandbox, room_id, BOB, "remove") == 200
    await until(lambda: not bob.connected)
    for number in (0, 1):
        assert error_of(await two.ask(number, BOB, room_id)) == REMOVED
    two.use(0)
    assert await moderate(two.sandbox, room_id, BOB, "admit") == 200
    for number in (0, 1):
        assert (await two.ask(number, BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_person_whose_guard_stops_asks_another_one_and_is_the_same_entry(two: Two) -> None:
    room_id = lobby_room(two.sandbox)
    cut_off = await wait_at(two, 0, room_id)
    cut_off.addErrback(lambda failure: None)
    await two.guards[0].stopService()
    two.use(1)
    since = (await listed(two))[0]["since"]
    answer = asking(two.sandbox, BOB, room_id)
    assert [entry["since"] for entry in await listed(two)] == [since]
    await moderate(two.sandbox, room_id, BOB, "admit")
    assert (await answer).code == 200


async def listed(two: Two) -> list[dict[str, Any]]:
    content = json.loads((await two.sandbox.operator("GET", "/lobby")).body)
    return [entry for room in content["rooms"] for entry in room["waiting"]]


@pytest_twisted.ensureDeferred
async def test_operators_see_the_same_at_both_guards(two: Two) -> None:
    room_id = room_of(two.sandbox, 3)
    two.sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": True})
    await two.enter(0, ALICE, room_id)
    await wait_at(two, 0, room_id)
    shown = []
    for number in (0, 1):
        two.use(number)
        rooms = json.loads((await two.sandbox.operator("GET", "/rooms")).body)["rooms"]
        shown.append((rooms, [(entry["user"], entry["color"]) for entry in await listed(two)]))
    assert shown[0] == shown[1]
    assert shown[1][0][0]["policy"]["max_users"] == 3
    two.use(1)
    await moderate(two.sandbox, room_id, BOB, "deny")


@pytest_twisted.ensureDeferred
async def test_a_push_to_one_guard_is_enforced_at_once_by_the_one_that_keeps_the_call(two: Two) -> None:
    for told in (0, 1):
        room_id = room_of(two.sandbox)
        bob = await two.enter(1 - told, BOB, room_id)
        bob.publish("CAMERA")
        assert (await two.ask(told, ALICE, room_id)).code == 200
        put_policy(two.sandbox, room_id, allow_camera=False)
        two.use(told)
        await two.sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
        await until(partial(no_tracks, bob))


def no_tracks(participant: Participant) -> bool:
    return not participant.tracks


@pytest_twisted.ensureDeferred
async def test_after_a_lost_subscription_nothing_is_believed_that_was_read_before(two: Two) -> None:
    room_id = room_of(two.sandbox)
    assert (await two.ask(1, ALICE, room_id)).code == 200
    second, policies = two.guards[1].sharing, two.guards[1].policies
    assert second is not None
    second.redis.subscribe_again()
    put_policy(two.sandbox, room_id, 1)
    two.use(0)
    await two.sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    end = reactor.seconds() + 15
    while (await policies.get(room_id, Deadline.after(reactor, 10))).policy.max_users != 1:
        assert reactor.seconds() < end
        await deferLater(reactor, 0.01)


@pytest_twisted.ensureDeferred
async def test_one_guard_listens_and_asks_about_people_who_wait_at_the_other(resident: Two) -> None:
    room_id = await resident_lobby(resident)
    sandbox = resident.sandbox
    answer = await wait_at(resident, 1, room_id)
    event_id = await asked_about(sandbox, room_id, BOB)
    sandbox.homeserver.react(room_id, ALICE, event_id, "✅")
    assert (await answer).code == 200
    await until(lambda: not notice_about(sandbox, room_id, BOB))
    sandbox.homeserver.send_message(room_id, ALICE, "!call")
    await until(lambda: answers(sandbox, room_id))
    carol = await wait_at(resident, 1, room_id, CAROL)
    sandbox.homeserver.send_message(room_id, ALICE, f"!call deny {CAROL}")
    assert error_of(await carol) == NOT_ADMITTED
    await until(lambda: len(answers(sandbox, room_id)) == 2)
    assert "Lobby: on." in answers(sandbox, room_id)[0]
    assert sum("asks to join" in text for text in notices(sandbox, room_id)) <= 1


@pytest_twisted.ensureDeferred
async def test_what_one_guard_hears_in_a_room_holds_at_the_other_at_once(resident: Two) -> None:
    room_id = await resident_lobby(resident)
    sandbox = resident.sandbox
    sandbox.homeserver.set_state(room_id, "io.lotus.lobby", {"enabled": False})
    await until(lambda: resident.guards[0].policies.last_known(room_id).lobby is None)
    for number in (0, 1):
        assert (await resident.ask(number, CAROL, room_id)).code == 200
    sandbox.homeserver.ban(room_id, CAROL, sender=ALICE)
    for number in (0, 1):
        await until(lambda: not resident.guards[0].residence.is_joined(room_id, CAROL))
        assert (await resident.ask(number, CAROL, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_guard_that_stops_hands_the_account_over_and_the_old_notice_decides(resident: Two) -> None:
    room_id = await resident_lobby(resident)
    sandbox = resident.sandbox
    answer = await wait_at(resident, 1, room_id)
    event_id = await asked_about(sandbox, room_id, BOB)
    await resident.guards[0].stopService()
    await until(lambda: resident.guards[1].residence.alive)
    sandbox.homeserver.react(room_id, ALICE, event_id, "✅")
    assert (await answer).code == 200
    await until(lambda: not notice_about(sandbox, room_id, BOB))


@pytest_twisted.ensureDeferred
async def test_a_guard_that_hangs_is_replaced_and_what_it_still_hears_is_not_answered_twice(resident: Two) -> None:
    room_id = await resident_lobby(resident)
    sandbox = resident.sandbox
    answer = await wait_at(resident, 1, room_id)
    event_id = await asked_about(sandbox, room_id, BOB)
    hanging = resident.guards[0].sharing
    assert hanging is not None
    hanging.turns.listener = None  # it listens on, and renews its lease no more
    await until(lambda: resident.guards[1].residence.alive)
    sandbox.homeserver.send_message(room_id, ALICE, "!call")
    await until(lambda: answers(sandbox, room_id))
    assert notice_about(sandbox, room_id, BOB) == event_id
    sandbox.homeserver.react(room_id, ALICE, event_id, "❌")
    assert error_of(await answer) == NOT_ADMITTED
    sandbox.homeserver.send_message(room_id, DAVE, "!call")
    await until(lambda: len(answers(sandbox, room_id)) >= 2)
    assert [f"Waiting: {BOB}" in text for text in answers(sandbox, room_id)] == [True, False]


@pytest_twisted.ensureDeferred
async def test_without_redis_each_guard_listens_for_those_who_wait_at_it(resident: Two, own_server: OwnServer) -> None:
    room_id = await resident_lobby(resident)
    sandbox = resident.sandbox
    own_server.stop()
    await until(lambda: all(guard.residence.alive for guard in resident.guards))
    resident.use(1)
    answer = asking(sandbox, BOB, room_id)
    sandbox.homeserver.react(room_id, ALICE, await asked_about(sandbox, room_id, BOB), "✅")
    assert (await answer).code == 200
    own_server.start_again()
    await until(lambda: sorted(guard.residence.alive for guard in resident.guards) == [False, True])


@pytest_twisted.ensureDeferred
async def test_nobody_waits_where_the_guard_that_listens_hears_nothing(
    resident: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_id = await resident_lobby(resident)
    sandbox = resident.sandbox
    answer = await wait_at(resident, 1, room_id)
    monkeypatch.setattr("lotusguard.guard.rooms.residence.residence.SILENCE", 1.0)
    sandbox.homeserver.faults["sync"] = Fault.status(503)
    sandbox.homeserver.send_message(room_id, ALICE, "The next sync fails.")
    assert (await answer).code == 200
