# SPDX-License-Identifier: Apache-2.0
"""A running call when its room's policy changes, with the real services."""

from __future__ import annotations

from tests.real.callers import Call
from tests.real.conftest import RECONCILE_NEVER, RunStack
from tests.real.processes import eventually
from tests.real.stack import Stack

SCREENS = ["MICROPHONE", "SCREEN_SHARE", "SCREEN_SHARE_AUDIO"]


def sharing(stack: Stack, room_id: str) -> tuple[Call, Call]:
    """A listener, and a speaker who shares their screen with its sound."""
    alice, bob = stack.users("alice", "bob")
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    for source in SCREENS:
        speaker.publish(source)
        listener.hears(speaker, source)
    return listener, speaker


def only_the_microphone_is_left(listener: Call, speaker: Call) -> None:
    eventually(lambda: listener.tracks_of(speaker) == ["MICROPHONE"], 10.0, "the end of the screen share")
    listener.hears(speaker, "MICROPHONE")
    speaker.cannot_publish("SCREEN_SHARE")
    assert listener.tracks_of(speaker) == ["MICROPHONE"]
    listener.hears(speaker, "MICROPHONE")


def test_a_running_screen_share_ends_when_the_change_is_reported(run_stack: RunStack) -> None:
    stack = run_stack(guard_reconcile_interval=RECONCILE_NEVER, guard_policy_ttl=600)
    room_id = stack.room()
    listener, speaker = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    stack.policy_changed(room_id)
    only_the_microphone_is_left(listener, speaker)


def test_a_running_screen_share_ends_at_the_next_webhook(stack: Stack) -> None:
    room_id = stack.room()
    listener, speaker = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    listener.publish("MICROPHONE")
    only_the_microphone_is_left(listener, speaker)


def test_a_running_screen_share_ends_when_the_call_is_reconciled(run_stack: RunStack) -> None:
    stack = run_stack(guard_reconcile_interval=0.5, guard_policy_ttl=0.2)
    room_id = stack.room()
    listener, speaker = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    only_the_microphone_is_left(listener, speaker)


def test_an_older_token_with_more_rights_gives_no_more_than_the_policy(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    listener = stack.enter(alice, room_id, listen=True)
    wide = stack.ask_token(bob, room_id).content["jwt"]
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    speaker = stack.connect(bob, wide)
    eventually(lambda: speaker.look()["may_publish"] == ["CAMERA", "MICROPHONE"], 5.0, "the revocation")
    speaker.cannot_publish("SCREEN_SHARE")
    speaker.publish("MICROPHONE")
    listener.hears(speaker, "MICROPHONE")


def test_video_that_is_labelled_as_microphone_is_muted(stack: Stack) -> None:
    (bob,) = stack.users("bob")
    room_id = stack.room(allow_screenshare=False, allow_camera=False)
    speaker = stack.enter(bob, room_id)
    speaker.publish("MICROPHONE", video=True)

    def tracks() -> list[tuple[str, str, bool]]:
        (seen,) = [one for one in stack.participants(room_id) if one["identity"] == speaker.identity]
        return [(track["source"], track["type"], track["muted"]) for track in seen["tracks"]]

    eventually(lambda: tracks() == [("MICROPHONE", "VIDEO", True)], 5.0, "muting")


def test_a_lowered_limit_removes_nobody(stack: Stack) -> None:
    alice, bob, carol = stack.users("alice", "bob", "carol")
    room_id = stack.room(5)
    calls = [stack.enter(user, room_id, new=True) for user in (alice, bob)]
    stack.set_state(room_id, "io.lotus.voice_limit", {"max_users": 1})
    stack.policy_changed(room_id)
    assert eventually(lambda: stack.ask_token(carol, room_id).status == 403, 5.0, "the new limit")
    calls[0].publish("MICROPHONE")
    assert [call.ended for call in calls] == [None, None]
    assert stack.ask_token(alice, room_id).status == 200


def test_a_revoked_source_is_restored_when_it_is_allowed_again(run_stack: RunStack) -> None:
    stack = run_stack(guard_reconcile_interval=0.5, guard_policy_ttl=0.2)
    room_id = stack.room()
    listener, speaker = sharing(stack, room_id)
    stack.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    only_the_microphone_is_left(listener, speaker)
    stack.set_state(room_id, "io.lotus.room_quality", {})
    eventually(lambda: "SCREEN_SHARE" in speaker.look()["may_publish"], 10.0, "the restoration")
    speaker.publish("SCREEN_SHARE")
    listener.hears(speaker, "SCREEN_SHARE")
