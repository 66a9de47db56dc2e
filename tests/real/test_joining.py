# SPDX-License-Identifier: Apache-2.0
"""Joins between the real programs: who is let in, and what they may publish in the call."""

from __future__ import annotations

from tests.real.processes import eventually
from tests.real.stack import Stack, claims_of


def test_two_people_hear_and_see_each_other(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    here, there = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    there.publish("MICROPHONE")
    there.publish("CAMERA")
    here.hears(there, "MICROPHONE")
    here.hears(there, "CAMERA")


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


def test_who_is_in_comes_in_again_and_with_further_devices(stack: Stack) -> None:
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
    assert stack.ask_token(bob, room_id).status == 403  # the laptop, by a hashed identity, still sits there
    again = stack.enter(alice, room_id)
    again.publish("MICROPHONE")
    calls[2].leave()
    again.leave()
    assert stack.ask_token(bob, room_id).status == 200


def test_a_hashed_identity_is_known_by_who_asked_for_it(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    call = stack.enter(alice, room_id, new=True)
    assert alice not in call.identity
    assert stack.ask_token(bob, room_id, new=True).status == 403
    assert stack.ask_token(alice, room_id, new=True).status == 200


def test_a_bad_openid_token_gets_upstreams_own_answer_even_in_a_full_room(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    stack.enter(alice, room_id)
    bad = {**stack.openid_token(bob), "access_token": "nobodys"}
    for new in (False, True):
        through = stack.ask_token(bob, room_id, new=new, openid_token=bad)
        straight = stack.ask_token(bob, room_id, new=new, openid_token=bad, at=stack.authorizer_url)
        assert (through.status, through.body) == (straight.status, straight.body)
        assert through.status != 403


def test_a_forbidden_source_is_refused_at_publish_and_the_others_are_not(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(allow_screenshare=False)
    here, there = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id)
    for source in ("SCREEN_SHARE", "SCREEN_SHARE_AUDIO"):
        there.cannot_publish(source)
    there.publish("MICROPHONE")
    there.publish("CAMERA")
    here.hears(there, "MICROPHONE")
    here.hears(there, "CAMERA")
    assert here.tracks_of(there) == ["CAMERA", "MICROPHONE"]


def test_without_camera_and_screen_share_the_microphone_is_left(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(allow_screenshare=False, allow_camera=False)
    here, there = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    there.cannot_publish("CAMERA")
    there.publish("MICROPHONE")
    here.hears(there, "MICROPHONE")


def test_a_token_for_a_room_with_a_policy_lives_shortly(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    free = claims_of(stack.ask_token(alice, stack.room()))
    narrowed = claims_of(stack.ask_token(alice, stack.room(5)))
    assert free["exp"] - free["nbf"] >= 3600
    assert narrowed["exp"] - narrowed["nbf"] <= 180
    assert free["video"].keys() == narrowed["video"].keys()


def test_a_room_without_a_policy_gets_upstreams_token_as_it_is(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    room_id = stack.room()
    through = stack.ask_token(alice, room_id)
    straight = stack.ask_token(alice, room_id, at=stack.authorizer_url)
    times = ("exp", "nbf", "iat")
    assert {k: v for k, v in claims_of(through).items() if k not in times} == {
        k: v for k, v in claims_of(straight).items() if k not in times
    }
    per_answer = {"Date", "Content-Length"}
    assert {k: v for k, v in through.headers.items() if k not in per_answer} == {
        k: v for k, v in straight.headers.items() if k not in per_answer
    }


def test_a_joiner_without_a_seat_is_put_out_and_who_has_one_stays(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    seated = stack.enter(alice, room_id)
    past_us = stack.ask_token(bob, room_id, at=stack.authorizer_url)
    intruder = stack.connect(bob, past_us.content["jwt"])
    assert eventually(lambda: intruder.ended, 10.0, "being put out") == "PARTICIPANT_REMOVED"
    assert seated.ended is None
    assert stack.ask_token(alice, room_id).status == 200
