# SPDX-License-Identifier: Apache-2.0
"""Facts about tokens and the room service of LiveKit that the guard relies on."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any
from uuid import uuid4

import pytest

from lotusguard.rules.jwt import SfuKey
from lotusguard.rules.webhooks import read_webhook
from tests.real.processes import eventually, http
from tests.real.services import KEY, SECRET
from tests.real.signalling import signalling
from tests.real.stack import Stack


@pytest.fixture
def room(stack: Stack) -> str:
    """An SFU room that was created."""
    name = f"room-{uuid4().hex}"
    assert stack.sfu_call("CreateRoom", {"name": name}).status == 200
    return name


def participant(stack: Stack, room: str, identity: str = "somebody") -> dict[str, Any]:
    """A participant as LiveKit describes them; waits until they are speaker."""

    def known() -> dict[str, Any] | None:
        answer = stack.sfu_call("GetParticipant", {"room": room, "identity": identity})
        return answer.content if answer.status == 200 else None

    seen: dict[str, Any] = eventually(known, 5.0, identity)
    return seen


@pytest.mark.parametrize(
    ("claims", "accepted"),
    [
        ({}, True),
        ({"exp": -50}, True),
        ({"exp": -70}, False),
        ({"nbf": 50}, True),
        ({"nbf": 90}, False),
        ({"iat": 4000}, True),
        ({"aud": ["someone else"]}, True),
        ({"exp": None}, True),
        ({"sub": None, "jti": "alice"}, True),
        ({"sub": None}, False),
        ({"iss": "stranger"}, False),
        ({"video": None}, False),
    ],
)
def test_which_tokens_are_accepted(stack: Stack, room: str, claims: dict[str, Any], accepted: bool) -> None:
    now = int(time.time())
    said = {k: v + now if k in ("exp", "nbf", "iat") and v is not None else v for k, v in claims.items()}
    token = stack.sfu_token(said, roomJoin=True, room=room)
    answer = http("GET", f"{stack.sfu_url}/rtc/validate?access_token={token}")
    assert (answer.status == 200) is accepted, answer.body


@pytest.mark.parametrize(
    ("video", "publish", "data", "sources"),
    [
        ({}, True, True, []),
        ({"canPublishSources": None}, True, True, []),
        ({"canPublishSources": []}, True, True, []),
        ({"canPublishSources": ["microphone", "camera"]}, True, True, ["MICROPHONE", "CAMERA"]),
        ({"canPublishSources": ["CAMERA"]}, True, True, ["CAMERA"]),  # listed, but not permitted: see below
        ({"CANPUBLISHSOURCES": ["camera"]}, True, True, ["CAMERA"]),
        ({"canPubli\u017fhSources": ["camera"]}, True, True, ["CAMERA"]),
        ({"canPublishSources": ["microphone"], "CanPublishSources": []}, True, True, []),
        ({"canPublish": False}, False, False, []),
        ({"canPublish": False, "canPublishSources": ["camera"]}, False, False, ["CAMERA"]),
        ({"canPublish": False, "canPublishData": True}, False, True, []),
    ],
)
def test_what_a_token_permits(
    stack: Stack, room: str, video: dict[str, Any], publish: bool, data: bool, sources: list[str]
) -> None:
    token = stack.sfu_token(roomJoin=True, room=room, **video)
    with signalling(stack.sfu_url, token) as connection:
        assert connection.status == 101
        permission = participant(stack, room)["permission"]
    assert (permission["can_publish"], permission["can_publish_data"]) == (publish, data)
    assert permission["can_publish_sources"] == sources


def test_a_source_in_capitals_is_listed_and_cannot_be_published(stack: Stack, room: str) -> None:
    call = stack.connect("somebody", stack.sfu_token(roomJoin=True, room=room, canPublishSources=["CAMERA"]))
    assert call.look()["may_publish"] == ["CAMERA"]
    call.cannot_publish("CAMERA")
    exact = stack.connect(
        "another", stack.sfu_token({"sub": "b"}, roomJoin=True, room=room, canPublishSources=["camera"])
    )
    exact.publish("CAMERA")


def test_the_publish_parameter_makes_a_second_participant_with_one_token(stack: Stack, room: str) -> None:
    token = stack.sfu_token(roomJoin=True, room=room)
    with signalling(stack.sfu_url, token, publish="xyz") as connection:
        assert connection.status == 101
        permission = participant(stack, room, "somebody#xyz")["permission"]
    assert permission["can_publish"]
    assert permission["can_publish_sources"] == []
    assert not permission["can_subscribe"]


def test_an_update_replaces_the_whole_permission(stack: Stack, room: str) -> None:
    with signalling(stack.sfu_url, stack.sfu_token(roomJoin=True, room=room)):
        before = participant(stack, room)["permission"]
        change = {"room": room, "identity": "somebody", "permission": {"can_publish_sources": ["MICROPHONE"]}}
        after = stack.sfu_call("UpdateParticipant", change).content["permission"]
    assert before["can_publish"]
    assert before["can_subscribe"]
    assert not after["can_publish"]
    assert not after["can_subscribe"]
    assert after["can_publish_sources"] == ["MICROPHONE"]


def test_an_update_with_a_wrong_source_name_permits_all_sources(stack: Stack, room: str) -> None:
    token = stack.sfu_token(roomJoin=True, room=room, canPublishSources=["microphone"])
    with signalling(stack.sfu_url, token):
        assert participant(stack, room)["permission"]["can_publish_sources"] == ["MICROPHONE"]
        wanted = {"can_publish": True, "can_publish_sources": ["camera"]}
        change = {"room": room, "identity": "somebody", "permission": wanted}
        assert stack.sfu_call("UpdateParticipant", change).content["permission"]["can_publish_sources"] == []


def test_a_removed_participant_can_join_again_with_the_same_token(stack: Stack, room: str) -> None:
    token = stack.sfu_token(roomJoin=True, room=room)
    with signalling(stack.sfu_url, token):
        first = participant(stack, room)["sid"]
        assert stack.sfu_call("RemoveParticipant", {"room": room, "identity": "somebody"}).status == 200
        assert stack.sfu_call("ListParticipants", {"room": room}).content["participants"] == []
    with signalling(stack.sfu_url, token) as connection:
        assert connection.status == 101
        assert participant(stack, room)["sid"] != first


def test_which_grants_the_room_service_requires(stack: Stack, room: str) -> None:
    denied = 401, {"code": "unauthenticated", "msg": "permissions denied"}
    for method, grant in (
        ("ListRooms", {"roomAdmin": True}),
        ("ListParticipants", {"roomAdmin": True, "room": "another"}),
        ("ListParticipants", {"roomList": True}),
    ):
        url = f"{stack.sfu_url}/twirp/livekit.RoomService/{method}"
        answer = http("POST", url, {"room": room}, bearer=stack.sfu_token(**grant))
        assert (answer.status, answer.content) == denied
    forged = SfuKey(KEY, "another secret").sign(
        {"iss": KEY, "exp": int(time.time()) + 600, "video": {"roomList": True}}
    )
    answer = http("POST", f"{stack.sfu_url}/twirp/livekit.RoomService/ListRooms", {}, bearer=forged)
    assert answer.status == 401
    assert not answer.body.startswith(b"{")


def test_answers_about_missing_rooms_and_participants(stack: Stack, room: str) -> None:
    nobody = {"room": room, "identity": "nobody"}
    calls: dict[str, dict[str, Any]] = {
        "GetParticipant": {},
        "RemoveParticipant": {},
        "UpdateParticipant": {"permission": {}},
    }
    for method, more in calls.items():
        answer = stack.sfu_call(method, {**nobody, **more})
        assert (answer.status, answer.content["code"]) == (404, "not_found"), method
    answer = stack.sfu_call("ListParticipants", {"room": "no such room"})
    assert (answer.status, answer.content) == (200, {"participants": []})


def test_every_webhook_is_signed_as_we_verify_it(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    room_id = stack.room(5)
    call = stack.enter(alice, room_id)
    identity = call.identity

    def heard() -> list[dict[str, Any]]:
        events = [json.loads(webhook.body) for webhook in stack.recorder.webhooks]
        return [event for event in events if event.get("participant", {}).get("identity") == identity]

    def published(times: int) -> bool:
        return kinds().count("track_published") == times

    def kinds() -> list[str]:
        return [event["event"] for event in heard()]

    for source, so_many in (("MICROPHONE", 1), ("CAMERA", 2)):
        call.publish(source)
        eventually(partial(published, so_many), 10.0, source)
    call.leave()
    eventually(lambda: "participant_left" in kinds(), 10.0, "leaving")
    assert kinds()[:3] == ["participant_joined", "track_published", "track_published"]
    joined, microphone, camera = heard()[:3]
    assert joined["participant"]["state"] == "ACTIVE"
    assert "kind" not in joined["participant"]
    assert microphone["track"]["source"] == "MICROPHONE"
    assert "type" not in microphone["track"]
    assert (camera["track"]["source"], camera["track"]["type"]) == ("CAMERA", "VIDEO")
    assert microphone["participant"].keys() == {"sid", "identity"}
    for webhook in stack.recorder.webhooks:
        assert webhook.headers["Content-Type"] == "application/webhook+json"
        event = read_webhook(webhook.headers["Authorization"], webhook.body, SfuKey(KEY, SECRET), time.time())
        assert event.id
    assert not [
        name for name, value in stack.metrics().items() if "webhooks_total" in name and "forged" in name and value
    ]
