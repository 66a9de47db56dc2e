# SPDX-License-Identifier: Apache-2.0
"""Calls while the guard, lk-jwt-service, LiveKit or Synapse is down."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

from tests.real.conftest import RunStack
from tests.real.processes import HttpAnswer, eventually
from tests.real.stack import Stack

HOMESERVER_DOWN = 5.0
"""Seconds: several membership intervals."""


@pytest.fixture
def stack(run_stack: RunStack) -> Stack:
    """A guard that reconciles, as in production."""
    return run_stack(guard_reconcile_interval=0.5, guard_policy_ttl=0.2)


@pytest.fixture
def crowd() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as people:
        yield people


def burst(crowd: ThreadPoolExecutor, stack: Stack, users: list[str], room_id: str) -> list[Future[HttpAnswer]]:
    """All users ask at once, half of them on each route."""
    return [crowd.submit(stack.ask_token, user, room_id, new=n % 2 == 0) for n, user in enumerate(users)]


def test_a_call_goes_on_while_the_guard_is_killed_and_restarted(stack: Stack) -> None:
    alice, bob, carol = stack.users("alice", "bob", "carol")
    room_id = stack.room(2)
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    for source in ("MICROPHONE", "SCREEN_SHARE"):
        speaker.publish(source)
        listener.hears(speaker, source)
    stack.kill_guard()
    for source in ("MICROPHONE", "SCREEN_SHARE"):
        listener.hears(speaker, source)
    assert stack.guard is not None
    stack.guard.start()
    listener.hears(speaker, "MICROPHONE")
    # It knows every identity again, hashed ones too: the room is full for others, not for its participants.
    assert stack.ask_token(carol, room_id, new=True).status == 403
    assert stack.ask_token(bob, room_id, new=True).status == 200
    assert stack.ask_token(alice, room_id, device="TABLET").status == 200
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    eventually(lambda: listener.tracks_of(speaker) == ["MICROPHONE"], 10.0, "the end of the screen share")
    listener.hears(speaker, "MICROPHONE")
    assert [(call.ended, call.look()["reconnects"]) for call in (listener, speaker)] == [(None, 0)] * 2


def test_the_limit_is_exact_after_the_guard_was_killed(stack: Stack, crowd: ThreadPoolExecutor) -> None:
    alice, bob, *others = stack.users("alice", "bob", *["somebody"] * 10)
    room_id = stack.room(3)
    calls = [stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)]
    calls[1].publish("MICROPHONE")
    calls[0].hears(calls[1], "MICROPHONE")
    assert stack.guard is not None
    stack.guard.restart(signal.SIGKILL)
    asked = burst(crowd, stack, others, room_id)
    assert sorted(one.result().status for one in asked) == [200] + [403] * 9
    calls[0].hears(calls[1], "MICROPHONE")
    assert [(call.ended, call.look()["reconnects"]) for call in calls] == [(None, 0)] * 2


def refused(stack: Stack, user: str, room_id: str) -> bool:
    """Whether the guard refuses a user who must not get a token. (LiveKit may still be starting.)"""
    answer = stack.ask_token(user, room_id)
    assert answer.status != 200
    return answer.status == 403


def test_clients_reconnect_to_their_seats_after_livekit_was_killed(stack: Stack) -> None:
    alice, bob, carol = stack.users("alice", "bob", "carol")
    room_id = stack.room(2)
    calls = [stack.enter(user, room_id, new=True) for user in (alice, bob)]
    identities = {call.identity for call in calls}
    stack.sfu.restart(signal.SIGKILL)
    eventually(lambda: refused(stack, carol, room_id), 5.0, "the refusal of another user")
    assert stack.ask_token(alice, room_id).status == 200  # it creates the SFU room, without which nobody can reconnect

    def present() -> bool:
        return {one["identity"] for one in stack.participants(room_id) if one["state"] == "ACTIVE"} >= identities

    eventually(present, 20.0, "the reconnection of both clients")
    assert refused(stack, carol, room_id)
    assert [call.ended for call in calls] == [None, None]
    calls[1].leave()
    # A client that hangs up while it reconnects may leave a session behind, which LiveKit ends later.
    eventually(lambda: stack.ask_token(carol, room_id).status == 200, 60.0, "the free seat")


def test_clients_reconnect_after_the_guard_and_livekit_were_killed_together(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(2)
    calls = [stack.enter(user, room_id, new=True) for user in (alice, bob)]
    identities = {call.identity for call in calls}
    time.sleep(1.5)  # what the guard saw is on disk
    stack.kill_guard()
    stack.sfu.stop(signal.SIGKILL)
    assert stack.guard is not None
    stack.guard.start()
    stack.sfu.start()

    def present() -> bool:
        return {one["identity"] for one in stack.participants(room_id) if one["state"] == "ACTIVE"} >= identities

    eventually(present, 30.0, "the reconnection of both clients")
    assert [call.ended for call in calls] == [None, None]


def test_users_keep_their_seats_while_livekit_is_shut_down_by_force(stack: Stack) -> None:
    alice, bob, carol = stack.users("alice", "bob", "carol")
    room_id = stack.room(2)
    calls = [stack.enter(user, room_id, new=True) for user in (alice, bob)]
    stack.sfu.interrupt(times=2)
    stack.sfu.restart()
    eventually(lambda: [call.ended for call in calls] == ["SERVER_SHUTDOWN"] * 2, 5.0, "the end of both sessions")
    eventually(lambda: refused(stack, carol, room_id), 5.0, "the refusal of another user")
    again = [stack.enter(user, room_id, new=True) for user in (alice, bob)]
    assert refused(stack, carol, room_id)
    assert [call.ended for call in again] == [None, None]


def test_nobody_is_removed_while_the_homeserver_is_down_and_a_ban_is_enforced_afterwards(run_stack: RunStack) -> None:
    stack = run_stack(guard_reconcile_interval=0.5, guard_policy_ttl=0.2, guard_membership_interval=1)
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id)
    speaker.publish("MICROPHONE")
    listener.hears(speaker, "MICROPHONE")
    assert stack.guard is not None
    with stack.guard.suspended():  # it must not see the ban before the homeserver is down
        stack.moderate("ban", bob, room_id)
        stack.synapse.stop(signal.SIGKILL)
    try:
        time.sleep(HOMESERVER_DOWN)
        listener.hears(speaker, "MICROPHONE")
        assert (listener.ended, speaker.ended) == (None, None)
    finally:
        stack.synapse.start()
    speaker.removed(30.0)
    assert listener.ended is None


def test_a_policy_that_changed_while_the_guard_was_down_is_enforced_afterwards(stack: Stack) -> None:
    alice, bob, carol = stack.users("alice", "bob", "carol")
    room_id = stack.room(2)
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id)
    for source in ("MICROPHONE", "SCREEN_SHARE"):
        speaker.publish(source)
        listener.hears(speaker, source)
    wide = stack.ask_token(carol, room_id, at=stack.upstream_url).content["jwt"]
    stack.kill_guard()
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    unseen = stack.connect(carol, wide)
    assert stack.guard is not None
    stack.guard.start()
    eventually(lambda: listener.tracks_of(speaker) == ["MICROPHONE"], 10.0, "the end of the screen share")
    listener.hears(speaker, "MICROPHONE")
    assert (listener.ended, speaker.ended) == (None, None)
    eventually(lambda: unseen.look()["may_publish"] == ["CAMERA", "MICROPHONE"] or unseen.ended, 10.0, "the revocation")


def test_a_burst_survives_a_restart_of_lk_jwt_service(stack: Stack, crowd: ThreadPoolExecutor) -> None:
    users = stack.users(*["somebody"] * 20)
    room_id = stack.room(10)
    stack.upstream.stop(signal.SIGKILL)
    asked = burst(crowd, stack, users, room_id)
    stack.upstream.start()
    assert sorted(one.result().status for one in asked) == [200] * 10 + [403] * 10


def test_a_killed_lk_jwt_service_loses_no_seats(stack: Stack, crowd: ThreadPoolExecutor) -> None:
    users = stack.users(*["somebody"] * 20)
    room_id = stack.room(10)
    asked = burst(crowd, stack, users, room_id)
    eventually(lambda: any(one.done() for one in asked), 10.0, "the first answer")
    stack.upstream.restart(signal.SIGKILL)
    first = [one.result() for one in asked]
    admitted = {user for user, answer in zip(users, first, strict=True) if answer.status == 200}
    assert len(admitted) <= 10
    again = [one.result() for one in burst(crowd, stack, users, room_id)]
    assert sum(answer.status == 200 for answer in again) == 10
    assert all(answer.status == 200 for user, answer in zip(users, again, strict=True) if user in admitted)


def test_the_limit_holds_again_after_livekit_was_killed_in_a_burst(stack: Stack, crowd: ThreadPoolExecutor) -> None:
    users = stack.users(*["somebody"] * 20)
    room_id = stack.room(5)
    asked = burst(crowd, stack, users, room_id)
    eventually(lambda: any(one.done() for one in asked), 10.0, "the first answer")
    stack.sfu.restart(signal.SIGKILL)
    assert {one.result().status for one in asked} <= {200, 403, 500, 502, 503, 504}

    def decided(user: str) -> HttpAnswer | None:
        answer = stack.ask_token(user, room_id)
        return answer if answer.status in (200, 403) else None

    calls = []
    for user in users:
        answer: HttpAnswer = eventually(partial(decided, user), 15.0, "a decision")
        if answer.status == 200:
            calls.append(stack.connect(user, answer.content["jwt"]))
    eventually(lambda: sum(call.ended is None for call in calls) == 5, 10.0, "as many participants as seats")
    (late,) = stack.users("late")
    assert stack.ask_token(late, room_id).status == 403


def test_a_guard_killed_in_a_burst_keeps_its_holds_and_grants_no_more(stack: Stack, crowd: ThreadPoolExecutor) -> None:
    users = stack.users(*["somebody"] * 20)
    room_id = stack.room(10)
    asked = burst(crowd, stack, users, room_id)
    eventually(lambda: sum(one.done() for one in asked) >= 3, 10.0, "the first answers")
    stack.kill_guard()
    admitted = {
        user for user, one in zip(users, asked, strict=True) if one.exception() is None and one.result().status == 200
    }
    assert stack.guard is not None
    stack.guard.start()
    again = [one.result() for one in burst(crowd, stack, users, room_id)]
    let_in = {user for user, answer in zip(users, again, strict=True) if answer.status == 200}
    assert len(let_in) == 10
    assert admitted <= let_in
