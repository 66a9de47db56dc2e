# SPDX-License-Identifier: Apache-2.0
"""Two whole guards before one LiveKit and one homeserver share their limits through a real Valkey."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.rules.identity import room_alias
from tests.calls import ALICE, BOB, CAROL, change_policy, counted, old_token, put_policy, room_of
from tests.conftest import StartSandbox, until

from .conftest import OwnServer
from .guards import reactor
from .two import Two


@pytest_twisted.async_yield_fixture
async def two(start_sandbox: StartSandbox, own_server: OwnServer) -> AsyncIterator[Two]:
    """Two guards that reconcile every half second."""
    sandbox = await start_sandbox(guard_redis_url=own_server.url, guard_reconcile_interval=0.5)
    both = await Two.start(sandbox)
    yield both
    await both.stop()


@pytest_twisted.ensureDeferred
async def test_two_guards_share_the_last_seat(two: Two) -> None:
    room_id = room_of(two.sandbox, 2)
    await two.enter(0, ALICE, room_id)
    await two.enter(1, BOB, room_id)
    for number in (0, 1):
        assert (await two.ask(number, CAROL, room_id)).code == 403
        assert (await two.ask(number, ALICE, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_joins_at_two_guards_at_once_get_exactly_the_seats_there_are(two: Two) -> None:
    sandbox = two.sandbox
    users = [f"@u{number}:sandbox.local" for number in range(60)]
    for user in users:
        sandbox.homeserver.add_user(user.split(":")[0][1:])
    room_id = sandbox.homeserver.create_room(creator=ALICE, joined=users)
    put_policy(sandbox, room_id, 5)
    asked = []
    for number, user in enumerate(users):
        two.use(number % 2)
        asked.append(Deferred.fromCoroutine(sandbox.ask_token(user, room_id)))
    answers = await gatherResults(asked, consumeErrors=True)
    assert sorted(answer.code for answer in answers) == [200] * 5 + [403] * 55


@pytest_twisted.ensureDeferred
async def test_nobody_whom_one_guard_let_in_is_removed_by_the_other(two: Two) -> None:
    room_id = room_of(two.sandbox, 2)
    here = [await two.enter(0, ALICE, room_id), await two.enter(1, BOB, room_id)]
    late = two.sandbox.livekit.connect(old_token(CAROL, room_id))
    await until(lambda: not late.connected)
    assert all(participant.connected for participant in here)


@pytest_twisted.ensureDeferred
async def test_a_changed_policy_takes_effect_whichever_guard_is_told(two: Two) -> None:
    for number in (0, 1):
        room_id = room_of(two.sandbox)
        assert (await two.ask(0, ALICE, room_id)).code == (await two.ask(1, ALICE, room_id)).code == 200
        two.use(number)
        await change_policy(two.sandbox, room_id, 1)
        for other in (0, 1):
            assert (await two.ask(other, BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_without_redis_both_guards_answer_and_say_so(two: Two, own_server: OwnServer) -> None:
    room_id = room_of(two.sandbox, 1)
    await two.enter(0, ALICE, room_id)
    own_server.stop()
    for number in (0, 1):
        assert (await two.ask(number, ALICE, room_id)).code == 200
        assert (await two.ask(number, BOB, room_id)).code == 403
        assert counted(two.sandbox, "fail_open_total", check="limit", reason="redis") > 0
        report = await two.ready()
        assert not report["enforcing"]["limit"]
        assert "Redis" in str(report["reasons"])
    own_server.start_again()
    for number in (0, 1):
        two.use(number)
        shares = False
        while not shares:
            shares = bool((await two.ready())["enforcing"]["limit"])
        assert (await two.ask(number, BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_people_past_the_limit_are_removed_as_soon_as_the_seats_are_known_again(
    start_sandbox: StartSandbox, own_server: OwnServer
) -> None:
    settings = {"guard_redis_url": own_server.url, "guard_reconcile_interval": 3600}
    sandbox = await start_sandbox(**settings)
    both = await Two.start(sandbox, **settings)
    room_id = room_of(sandbox, 1)
    alice = await both.enter(0, ALICE, room_id)
    own_server.stop()
    for number in (0, 1):
        assert (await both.ask(number, ALICE, room_id)).code == 200
    late = sandbox.livekit.connect(old_token(BOB, room_id))
    await sandbox.livekit.drained()
    rounds = [guard.changes.round_at for guard in both.guards]
    own_server.start_again()
    await until(lambda: not late.connected, 30)
    await until(lambda: all(guard.changes.round_at not in rounds for guard in both.guards), 30)
    assert alice.connected
    await both.stop()


@pytest_twisted.ensureDeferred
async def test_operators_see_which_guard_answers(two: Two) -> None:
    room_id = room_of(two.sandbox)
    await two.enter(0, ALICE, room_id)
    names = set()
    for number in (0, 1):
        two.use(number)
        name = (await two.ready())["guard"]
        assert name.endswith(":" + two.sandbox.url.rpartition(":")[2])
        shown = json.loads((await two.sandbox.operator("GET", "/rooms")).body)
        assert shown["guard"] == name
        assert [room["room_id"] for room in shown["rooms"]] == [room_id], "each guard shows the rooms of all"
        names.add(name)
    assert len(names) == 2


@pytest_twisted.ensureDeferred
async def test_a_guard_that_stops_hands_its_rooms_over(two: Two) -> None:
    room_id = room_of(two.sandbox, 1)
    await two.enter(1, ALICE, room_id)
    first, second = two.guards
    await until(lambda: bool(first.enforcement.watched) != bool(second.enforcement.watched))
    leaving = first if first.enforcement.watched else second
    staying = second if leaving is first else first
    await leaving.stopService()
    await until(lambda: bool(staying.enforcement.watched))


@pytest_twisted.ensureDeferred
async def test_a_join_takes_two_scripts(start_sandbox: StartSandbox, own_server: OwnServer) -> None:
    sandbox = await start_sandbox(guard_redis_url=own_server.url, guard_reconcile_interval=3600)
    users = [f"@u{number}:sandbox.local" for number in range(40)]
    for user in users:
        sandbox.homeserver.add_user(user.split(":")[0][1:])
    room_id = sandbox.homeserver.create_room(creator=ALICE, joined=users)
    put_policy(sandbox, room_id, 100)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200

    def scripts() -> int:
        return int(own_server.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    before, began = scripts(), reactor.seconds()
    for user in users:
        assert (await sandbox.ask_token(user, room_id)).code == 200
    others = 5 * (reactor.seconds() - began) + 5  # heartbeats, the lobby, the account, and a listing every two seconds
    assert scripts() - before <= 2 * len(users) + others


@pytest_twisted.ensureDeferred
async def test_guards_that_restart_together_with_livekit_create_its_rooms_again(two: Two) -> None:
    sandbox = two.sandbox
    room_id = room_of(sandbox, 2)
    await two.enter(0, ALICE, room_id)
    await until(lambda: any(room_alias(room_id) in guard.enforcement.watched for guard in two.guards))
    for guard in two.guards:
        await guard.stopService()
    sandbox.livekit.restart()
    await sandbox.start_guard()
    third = sandbox.guard
    await sandbox.start_guard()
    two.guards = (third, sandbox.guard)
    await until(lambda: room_alias(room_id) in sandbox.livekit.rooms)
    assert sandbox.livekit.asked["CreateRoom"] <= 2  # by lk-jwt-service, and by the guard that has the room's lease
