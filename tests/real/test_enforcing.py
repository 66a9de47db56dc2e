# SPDX-License-Identifier: Apache-2.0
"""What becomes of a running call between the real programs when its room's policy changes."""

from __future__ import annotations

from tests.real.callers import Call
from tests.real.conftest import RECONCILE_SELDOM, RunStack
from tests.real.processes import eventually
from tests.real.stack import Stack

SCREENS = ["MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"]


def sharing(stack: Stack, room_id: str) -> tuple[Call, Call]:
    """Somebody who listens, and somebody who speaks and shares their screen with its sound."""
    alice, bob = stack.users("alice", "bob")
    here, there = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    for source in SCREENS:
        there.publish(source)
        here.hears(there, source)
    return here, there


def only_the_microphone_is_left(here: Call, there: Call) -> None:
    eventually(lambda: here.tracks_of(there) == ["MICROPHONE"], 10.0, "the screen share's end")
    here.hears(there, "MICROPHONE")
    there.cannot_publish("SCREEN_SHARE")
    assert here.tracks_of(there) == ["MICROPHONE"]
    here.hears(there, "MICROPHONE")


def test_a_running_screen_share_ends_when_the_homeserver_tells(run_stack: RunStack) -> None:
    stack = run_stack(guard_reconcile_interval=RECONCILE_SELDOM, guard_policy_ttl=600)
    room_id = stack.room()
    here, there = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    stack.policy_changed(room_id)
    only_the_microphone_is_left(here, there)


def test_a_running_screen_share_ends_at_the_next_webhook(stack: Stack) -> None:
    room_id = stack.room()
    here, there = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    here.publish("MICROPHONE")
    only_the_microphone_is_left(here, there)


def test_a_running_screen_share_ends_at_the_next_round(run_stack: RunStack) -> None:
    stack = run_stack(guard_reconcile_interval=0.5, guard_policy_ttl=0.2)
    room_id = stack.room()
    here, there = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    only_the_microphone_is_left(here, there)


def test_a_wide_token_from_before_is_narrowed_as_soon_as_it_is_used(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    here = stack.enter(alice, room_id, listen=True)
    wide = stack.ask_token(bob, room_id).content["jwt"]
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    there = stack.connect(bob, wide)
    eventually(lambda: there.look()["may_publish"] == ["CAMERA", "MICROPHONE"], 5.0, "narrowing")
    there.cannot_publish("SCREEN_SHARE")
    there.publish("MICROPHONE")
    here.hears(there, "MICROPHONE")


def test_a_picture_that_calls_itself_a_microphone_is_muted(stack: Stack) -> None:
    (bob,) = stack.users("bob")
    room_id = stack.room(allow_screenshare=False, allow_camera=False)
    there = stack.enter(bob, room_id)
    there.publish("MICROPHONE", video=True)

    def tracks() -> list[tuple[str, str, bool]]:
        (seen,) = [one for one in stack.participants(room_id) if one["identity"] == there.identity]
        return [(track["source"], track["type"], track["muted"]) for track in seen["tracks"]]

    eventually(lambda: tracks() == [("MICROPHONE", "VIDEO", True)], 5.0, "muting")


def test_a_lowered_cap_puts_nobody_out(stack: Stack) -> None:
    alice, bob, carol = stack.users("alice", "bob", "carol")
    room_id = stack.room(5)
    calls = [stack.enter(user, room_id, new=True) for user in (alice, bob)]
    stack.set_state(room_id, "io.lotus.voice_limit", {"max_users": 1})
    stack.policy_changed(room_id)
    assert eventually(lambda: stack.ask_token(carol, room_id).status == 403, 5.0, "the new cap")
    calls[0].publish("MICROPHONE")
    assert [call.ended for call in calls] == [None, None]
    assert stack.ask_token(alice, room_id).status == 200


def test_what_was_taken_is_given_back_where_that_is_wanted(run_stack: RunStack) -> None:
    stack = run_stack(guard_reconcile_interval=0.5, guard_policy_ttl=0.2, guard_restore="on")
    room_id = stack.room()
    here, there = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    only_the_microphone_is_left(here, there)
    stack.set_state(room_id, "io.lotus.room_quality", {})
    eventually(lambda: "SCREEN_SHARE" in there.look()["may_publish"], 10.0, "giving back")
    there.publish("SCREEN_SHARE")
    here.hears(there, "SCREEN_SHARE")
