# SPDX-License-Identifier: Apache-2.0
"""Joins with the real services: who gets a token, and what it permits in the call."""

from __future__ import annotations

from tests.real.conftest import RunStack
from tests.real.stack import Stack, claims_of


def test_two_people_hear_and_see_each_other(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    speaker.publish("MICROPHONE")
    speaker.publish("CAMERA")
    listener.hears(speaker, "MICROPHONE")
    listener.hears(speaker, "CAMERA")


def test_a_full_room_is_refused_on_both_routes_until_somebody_leaves(stack: Stack) -> None:
    alice, bob, carol = stack.users("alice", "bob", "carol")
    room_id = stack.room(2)
    call = stack.enter(alice, room_id)
    stack.enter(bob, room_id, new=True)
    for new in (False, True):
        refused = stack.ask_token(carol, room_id, new=new)
        assert refused.status == 403
        assert refused.content == {"errcode": "M_FORBIDDEN", "error": "This voice channel is full."}
        assert refused.headers["Access-Control-Allow-Origin"] == "*"
    call.leave()
    assert stack.ask_token(carol, room_id, new=True).status == 200


def test_a_user_in_the_call_joins_again_and_with_further_devices(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    calls = [
        stack.enter(alice, room_id, listen=True),
        stack.enter(alice, room_id, device="TABLET"),
        stack.enter(alice, room_id, device="LAPTOP", new=True),
    ]
    assert stack.ask_token(bob, room_id).status == 403
    assert len({call.identity for call in calls}) == 3
    assert all(call.ended is None for call in calls)
    for call in calls[:2]:
        call.leave()
    assert stack.ask_token(bob, room_id).status == 403  # the laptop, with a hashed identity, is still in the call
    again = stack.enter(alice, room_id)
    again.publish("MICROPHONE")
    calls[2].leave()
    again.leave()
    assert stack.ask_token(bob, room_id).status == 200


def test_the_user_behind_a_hashed_identity_is_known(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    call = stack.enter(alice, room_id, new=True)
    assert alice not in call.identity
    assert stack.ask_token(bob, room_id, new=True).status == 403
    assert stack.ask_token(alice, room_id, new=True).status == 200


def test_a_bad_openid_token_gets_upstreams_answer_even_if_the_room_is_full(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    stack.enter(alice, room_id)
    bad = {**stack.openid_token(bob), "access_token": "nobodys"}
    for new in (False, True):
        through = stack.ask_token(bob, room_id, new=new, openid_token=bad)
        straight = stack.ask_token(bob, room_id, new=new, openid_token=bad, at=stack.upstream_url)
        assert (through.status, through.body) == (straight.status, straight.body)
        assert through.status != 403


def test_only_a_forbidden_source_cannot_be_published(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(allow_screenshare=False)
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id)
    for source in ("SCREEN_SHARE", "SCREEN_SHARE_AUDIO"):
        speaker.cannot_publish(source)
    speaker.publish("MICROPHONE")
    speaker.publish("CAMERA")
    listener.hears(speaker, "MICROPHONE")
    listener.hears(speaker, "CAMERA")
    assert listener.tracks_of(speaker) == ["CAMERA", "MICROPHONE"]


def test_the_microphone_can_be_published_without_camera_and_screen_share(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(allow_screenshare=False, allow_camera=False)
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    speaker.cannot_publish("CAMERA")
    speaker.publish("MICROPHONE")
    listener.hears(speaker, "MICROPHONE")


def test_a_token_is_short_lived_in_every_room(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    original = claims_of(stack.ask_token(alice, stack.room(), at=stack.upstream_url))
    assert original["exp"] - original["nbf"] >= 3600
    for room_id in (stack.room(), stack.room(5)):
        claims = claims_of(stack.ask_token(alice, room_id))
        assert claims["exp"] - claims["nbf"] <= 180
        assert claims["video"].keys() == original["video"].keys()


def test_a_room_without_a_policy_gets_upstreams_token_unchanged_if_the_operator_wants_that(run_stack: RunStack) -> None:
    stack = run_stack(guard_tokens="policy")
    (alice,) = stack.users("alice")
    room_id = stack.room()
    through = stack.ask_token(alice, room_id)
    straight = stack.ask_token(alice, room_id, at=stack.upstream_url)
    times = ("exp", "nbf", "iat")
    assert {k: v for k, v in claims_of(through).items() if k not in times} == {
        k: v for k, v in claims_of(straight).items() if k not in times
    }
    per_answer = {"Date", "Content-Length"}
    assert {k: v for k, v in through.headers.items() if k not in per_answer} == {
        k: v for k, v in straight.headers.items() if k not in per_answer
    }


def test_a_participant_without_a_seat_is_removed_and_the_seated_one_stays(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    seated = stack.enter(alice, room_id)
    unseen = stack.ask_token(bob, room_id, at=stack.upstream_url)
    stack.connect(bob, unseen.content["jwt"]).removed()
    assert seated.ended is None
    assert stack.ask_token(alice, room_id).status == 200
