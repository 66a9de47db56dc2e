# SPDX-License-Identifier: Apache-2.0
"""The stand-in SFU: each trap that PROTOCOL.md names is one here too."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
import treq
from google.protobuf.message import Message
from livekit.protocol import room as pb
from livekit.protocol.models import DisconnectReason, ParticipantInfo, ParticipantPermission, Room, TrackSource
from twisted.internet import reactor
from twisted.internet.task import Clock

from lotusguard.sandbox.livekit.participant import JoinRefused
from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.livekit.tokens import BadToken, sign, verify
from lotusguard.sandbox.livekit.webhooks import body_of

KEY, SECRET = "sandbox", "a secret of some thirty-two bytes"
CAMERA, MICROPHONE, SCREEN = TrackSource.CAMERA, TrackSource.MICROPHONE, TrackSource.SCREEN_SHARE


@asynccontextmanager
async def sfu(**options: Any) -> AsyncIterator[FakeLiveKit]:
    standin = FakeLiveKit(reactor, key=KEY, secret=SECRET, **options)
    await standin.start()
    try:
        yield standin
    finally:
        await standin.stop()


def token(identity: str = "alice", room: str = "room", *, claims: Any = None, **video: Any) -> str:
    now = int(time.time())
    grant = {"roomJoin": True, "room": room} | video
    registered = {"iss": KEY, "sub": identity, "nbf": now, "exp": now + 600, "video": grant}
    return sign(SECRET, registered | (claims or {}))


ADMIN: dict[str, Any] = {"roomAdmin": True, "roomList": True, "roomCreate": True}


async def call(standin: FakeLiveKit, method: str, request: Message, answer: type[Message], room: str = "room") -> Any:
    """The answer; or the error's status and code."""
    code, body = await call_raw(
        standin, method, request.SerializeToString(), "application/protobuf", token("", room, **ADMIN)
    )
    if code != 200:
        return code, json.loads(body)["code"]
    message = answer()
    message.ParseFromString(body)
    return message


async def call_raw(
    standin: FakeLiveKit, method: str, body: bytes, content_type: str, bearer: str | None
) -> tuple[int, bytes]:
    headers: Any = {"Content-Type": content_type}
    if bearer is not None:
        headers["Authorization"] = f"Bearer {bearer}"
    url = f"{standin.url}/twirp/livekit.RoomService/{method}"
    response = await treq.post(url, data=body, headers=headers)
    return response.code, await treq.content(response)


def names(standin: FakeLiveKit) -> list[str]:
    return [event.event for event in standin.events]


def json_of(event: Any) -> Any:
    """A webhook event as it is sent."""
    return json.loads(body_of(event))


# Who may call what.


@pytest_twisted.ensureDeferred
async def test_wrong_grants_are_twirp_s_401_and_bad_keys_plain_text() -> None:
    async with sfu() as standin:
        standin.open_room("room")
        denied = (401, b'{"code":"unauthenticated","msg":"permissions denied"}')
        for method, bearer in (
            ("ListRooms", token(roomAdmin=True)),
            ("ListParticipants", token(roomAdmin=True, room="other")),
            ("ListParticipants", token(roomList=True)),
            ("CreateRoom", token(roomAdmin=True, roomList=True)),
            ("ListRooms", None),
        ):
            body = pb.ListParticipantsRequest(room="room").SerializeToString()
            assert await call_raw(standin, method, body, "application/protobuf", bearer) == denied
        stranger = sign(SECRET, {"iss": "stranger", "video": ADMIN})
        forged = sign("another secret", {"iss": KEY, "video": ADMIN})
        for bearer, text in ((stranger, b"invalid API key"), (forged, b"invalid authorization token: token sig")):
            code, body = await call_raw(standin, "ListRooms", b"", "application/protobuf", bearer)
            assert code == 401
            assert body.startswith(text)


@pytest.mark.parametrize(
    ("claims", "lets_in"),
    [
        ({}, True),
        ({"exp": -59}, True),
        ({"exp": -61}, False),
        ({"nbf": 59}, True),
        ({"nbf": 90}, False),
        ({"iat": 4000}, True),
        ({"aud": ["someone else"]}, True),
        ({"aud": 3}, False),
        ({"exp": None}, True),
        ({"sub": "", "jti": "alice"}, True),
        ({"sub": ""}, False),
        ({"iss": "stranger"}, False),
        ({"video": None}, False),
        ({"video": {"ROOMJOIN": True, "Room": "room"}}, True),
        ({"video": {"room": "room"}}, False),
        ({"video": {"roomJoin": "yes", "room": "room"}}, False),
        ({"video": {"roomJoin": True}}, False),
    ],
)
@pytest_twisted.ensureDeferred
async def test_which_tokens_let_in(claims: dict[str, Any], lets_in: bool) -> None:
    async with sfu() as standin:
        now = time.time()
        shifted = {
            name: value + now if isinstance(value, int) and name in ("exp", "nbf", "iat") else value
            for name, value in claims.items()
        }
        if lets_in:
            assert standin.connect(token(claims=shifted)).identity == "alice"
        else:
            with pytest.raises(JoinRefused):
                standin.connect(token(claims=shifted))


@pytest_twisted.ensureDeferred
async def test_later_releases_require_an_expiry_and_only_hs256_is_known() -> None:
    async with sfu(exp_required=True) as standin:
        with pytest.raises(JoinRefused):
            standin.connect(token(claims={"exp": None}))
        with pytest.raises(JoinRefused):
            standin.connect(sign(SECRET, {"iss": KEY, "sub": "a", "exp": 9e9}, {"alg": "none"}))


# What may be published.


@pytest.mark.parametrize(
    ("video", "allowed"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"canPublishSources": None}, {0, 1, 2, 3, 4}),
        ({"canPublishSources": []}, {0, 1, 2, 3, 4}),
        ({"canPublishSources": ["microphone"]}, {2}),
        ({"canPublishSources": ["CAMERA"]}, set()),
        ({"canPublishSources": ["unknown", "screen_share_audio"]}, {0, 4}),
        ({"CANPUBLISHSOURCES": ["camera"]}, {1}),
        ({"canPublishſources": ["camera"]}, {1}),
        ({"canPublish": False}, set()),
        ({"canPublish": False, "canPublishSources": ["camera"]}, set()),
        ({"canPublish": True, "CanPublish": False}, set()),
    ],
)
@pytest_twisted.ensureDeferred
async def test_which_sources_a_token_lets_publish(video: dict[str, Any], allowed: set[int]) -> None:
    async with sfu() as standin:
        standin.connect(token(**video))
        assert {source for source in range(5) if standin.publish_track("room", "alice", source)} == allowed


@pytest_twisted.ensureDeferred
async def test_data_follows_publish_and_a_label_is_the_client_s_word() -> None:
    async with sfu() as standin:
        alice = standin.connect(token(canPublish=False))
        assert not alice.info().permission.can_publish_data
        bob = standin.connect(token("bob", canPublishSources=["microphone"]))
        track = standin.publish_track("room", "bob", "MICROPHONE", "VIDEO")
        assert track is not None
        assert (track.source, track.mime_type) == (MICROPHONE, "video/VP8")
        assert bob.info().is_publisher


@pytest_twisted.ensureDeferred
async def test_update_replaces_the_whole_permission_and_unpublishes() -> None:
    async with sfu() as standin:
        alice = standin.connect(token(canUpdateOwnMetadata=True))
        for source in (CAMERA, MICROPHONE, SCREEN):
            assert alice.publish(source)
        wanted = ParticipantPermission(can_publish=True, can_publish_sources=[MICROPHONE, CAMERA])
        request = pb.UpdateParticipantRequest(room="room", identity="alice", permission=wanted)
        answer = await call(standin, "UpdateParticipant", request, ParticipantInfo)
        assert answer.permission == wanted
        assert not answer.permission.can_subscribe
        assert sorted(track.source for track in answer.tracks) == [CAMERA, MICROPHONE]
        assert names(standin)[-1] == "track_unpublished"
        assert not alice.publish(SCREEN)
        assert not alice.publish(TrackSource.UNKNOWN)
        change = standin.update_log[-1]
        assert change.before is not None
        assert change.before.can_subscribe
        assert change.after == wanted
        assert standin.granted_by_token["room", alice.sid].may_publish(SCREEN)


@pytest_twisted.ensureDeferred
async def test_without_a_permission_an_update_takes_nothing() -> None:
    async with sfu() as standin:
        alice = standin.connect(token())
        request = pb.UpdateParticipantRequest(room="room", identity="alice", metadata="m")
        answer = await call(standin, "UpdateParticipant", request, ParticipantInfo)
        assert answer.metadata == "m"
        assert answer.permission.can_publish
        no_more = pb.UpdateParticipantRequest(room="room", identity="alice", permission=ParticipantPermission())
        alice.publish(CAMERA)
        answer = await call(standin, "UpdateParticipant", no_more, ParticipantInfo)
        assert not answer.tracks
        assert not answer.is_publisher


@pytest_twisted.ensureDeferred
async def test_json_requests_fail_open() -> None:
    async with sfu() as standin:
        alice = standin.connect(token(canPublishSources=["microphone"]))
        permission = {"canPublish": True, "can_publish_sources": ["camera"]}
        body = json.dumps({"room": "room", "identity": "alice", "permission": permission, "what": 1})
        code, answer = await call_raw(
            standin, "UpdateParticipant", body.encode(), "application/json; charset=x", token(**ADMIN)
        )
        assert code == 200
        assert json.loads(answer)["permission"]["can_publish_sources"] == []
        assert alice.publish(SCREEN)


@pytest_twisted.ensureDeferred
async def test_json_answers_have_every_field() -> None:
    async with sfu() as standin:
        standin.connect(token())
        body = b'{"room":"room","identity":"alice"}'
        _, answer = await call_raw(standin, "GetParticipant", body, "application/json", token(**ADMIN))
        info = json.loads(answer)
        assert info["state"] == "ACTIVE"
        assert info["kind"] == "STANDARD"
        assert isinstance(info["joined_at"], str)
        assert info["tracks"] == []
        standin.add_stale("room", "ghost")
        standin.stale["room", "ghost"][0].ClearField("permission")
        body = b'{"room":"room","identity":"ghost"}'
        _, answer = await call_raw(standin, "GetParticipant", body, "application/json", token(**ADMIN))
        assert json.loads(answer)["permission"] is None


@pytest_twisted.ensureDeferred
async def test_what_is_no_request_is_twirp_s_error() -> None:
    async with sfu() as standin:
        for method, body, content_type, code, status in (
            ("ListRooms", b"\xff", "application/protobuf", "malformed", 400),
            ("ListRooms", b"{", "application/json", "malformed", 400),
            ("ListRooms", b"[]", "application/json", "malformed", 400),
            ("ListRooms", b"{}", "text/plain", "bad_route", 404),
            ("Nothing", b"{}", "application/json", "bad_route", 404),
        ):
            answer = await call_raw(standin, method, body, content_type, token(**ADMIN))
            assert (answer[0], json.loads(answer[1])["code"]) == (status, code)


# Who is there.


@pytest_twisted.ensureDeferred
async def test_missing_rooms_and_participants() -> None:
    async with sfu() as standin:
        who = pb.RoomParticipantIdentity(room="room", identity="nobody")
        update = pb.UpdateParticipantRequest(room="room", identity="nobody")
        mute = pb.MuteRoomTrackRequest(room="room", identity="nobody", track_sid="TR_x", muted=True)
        rooms = pb.ListParticipantsRequest(room="room")
        answer = await call(standin, "ListParticipants", rooms, pb.ListParticipantsResponse)
        assert not answer.participants
        assert await call(standin, "GetParticipant", who, ParticipantInfo) == (404, "not_found")
        assert await call(standin, "RemoveParticipant", who, ParticipantInfo) == (404, "not_found")
        assert await call(standin, "UpdateParticipant", update, ParticipantInfo) == (404, "not_found")
        assert await call(standin, "MutePublishedTrack", mute, ParticipantInfo) == (503, "unavailable")
        assert await call(standin, "DeleteRoom", pb.DeleteRoomRequest(room="room"), Room) == (404, "not_found")


@pytest_twisted.ensureDeferred
async def test_stale_entries_are_listed_and_not_served() -> None:
    async with sfu() as standin:
        standin.add_stale("room", "gone", 404)
        standin.add_stale("room", "lost", 503)
        request = pb.ListParticipantsRequest(room="room")
        listed = await call(standin, "ListParticipants", request, pb.ListParticipantsResponse)
        assert [info.identity for info in listed.participants] == ["gone", "lost"]
        for identity, error in (("gone", (404, "not_found")), ("lost", (503, "unavailable"))):
            who = pb.RoomParticipantIdentity(room="room", identity=identity)
            assert await call(standin, "RemoveParticipant", who, ParticipantInfo) == error


@pytest_twisted.ensureDeferred
async def test_removing_revokes_no_token() -> None:
    async with sfu() as standin:
        presented = token()
        alice = standin.connect(presented)
        who = pb.RoomParticipantIdentity(room="room", identity="alice")
        await call(standin, "RemoveParticipant", who, pb.RemoveParticipantResponse)
        assert alice.disconnect_reason == DisconnectReason.PARTICIPANT_REMOVED
        assert not alice.publish(CAMERA)
        assert standin.connect(presented).connected


@pytest_twisted.ensureDeferred
async def test_a_new_join_has_the_grants_of_the_presented_token() -> None:
    async with sfu() as standin:
        wide = token()
        first = standin.connect(wide)
        first.set_permission(ParticipantPermission(can_publish=True, can_publish_sources=[MICROPHONE]))
        narrow = standin.refreshed_token("room", "alice")
        second = standin.connect(wide)
        assert (first.connected, first.disconnect_reason) == (False, DisconnectReason.DUPLICATE_IDENTITY)
        assert second.publish(SCREEN)
        third = standin.connect(narrow)
        assert not third.publish(SCREEN)
        assert third.publish(MICROPHONE)
        lefts = [event for event in standin.events if event.event == "participant_left"]
        assert [event.participant.sid for event in lefts] == [first.sid, second.sid]


@pytest_twisted.ensureDeferred
async def test_publish_makes_a_second_participant_of_one_token() -> None:
    async with sfu() as standin:
        standin.connect(token())
        second = standin.connect(token(), publish="screen")
        assert second.identity == "alice#screen"
        assert not second.info().permission.can_subscribe
        assert len(standin.rooms["room"].participants) == 2
        with pytest.raises(JoinRefused):
            standin.connect(token(canPublish=False), publish="x")


@pytest_twisted.ensureDeferred
async def test_joining_then_active_or_aborted() -> None:
    async with sfu() as standin:
        waiting = standin.connect(token(), activate=False)
        assert waiting.info().state == ParticipantInfo.State.JOINING
        assert names(standin) == ["room_started"]
        waiting.activate()
        assert names(standin) == ["room_started", "participant_joined"]
        standin.connect(token("bob"), activate=False)
        standin.disconnect("room", "bob")
        assert names(standin)[-1] == "participant_connection_aborted"


@pytest_twisted.ensureDeferred
async def test_a_room_s_count_lags_five_seconds_and_leaves_agents_out() -> None:
    clock = Clock()
    async with sfu(clock=clock) as standin:
        standin.connect(token())
        standin.connect(token("agent", claims={"kind": "agent"}))
        standin.connect(token("hidden", hidden=True))
        for seconds, count in ((0, 0), (4.9, 0), (0.1, 2)):
            clock.advance(seconds)
            rooms = await call(standin, "ListRooms", pb.ListRoomsRequest(), pb.ListRoomsResponse)
            assert [room.num_participants for room in rooms.rooms] == [count]


@pytest_twisted.ensureDeferred
async def test_empty_rooms_close_after_a_while() -> None:
    clock = Clock()
    async with sfu(clock=clock) as standin:
        await call(standin, "CreateRoom", pb.CreateRoomRequest(name="room"), Room)
        clock.advance(299)
        standin.connect(token())
        clock.advance(3600)
        standin.disconnect("room", "alice")
        clock.advance(19)
        assert "room" in standin.rooms
        clock.advance(1)
        assert not standin.rooms
        assert names(standin)[-1] == "room_finished"


@pytest_twisted.ensureDeferred
async def test_max_participants_counts_connections_and_is_never_cleared() -> None:
    async with sfu() as standin:
        for most in (1, 0):
            request = pb.CreateRoomRequest(name="room", max_participants=most)
            room = await call(standin, "CreateRoom", request, Room)
            assert room.max_participants == 1
        standin.connect(token())
        with pytest.raises(JoinRefused):
            standin.connect(token(), publish="again")


@pytest_twisted.ensureDeferred
async def test_muting_by_an_admin_cannot_be_undone_by_one() -> None:
    async with sfu() as standin:
        alice = standin.connect(token())
        track = alice.publish(MICROPHONE, "VIDEO")
        assert track is not None
        request = pb.MuteRoomTrackRequest(room="room", identity="alice", track_sid=track.sid, muted=True)
        answer = await call(standin, "MutePublishedTrack", request, pb.MuteRoomTrackResponse)
        assert answer.track.muted
        request.muted = False
        answer = await call(standin, "MutePublishedTrack", request, pb.MuteRoomTrackResponse)
        assert answer == (412, "failed_precondition")


@pytest_twisted.ensureDeferred
async def test_deleting_a_room_puts_everybody_out() -> None:
    async with sfu() as standin:
        alice = standin.connect(token())
        alice.publish(CAMERA)
        await call(standin, "DeleteRoom", pb.DeleteRoomRequest(room="room"), pb.DeleteRoomResponse)
        assert names(standin)[-3:] == ["track_unpublished", "participant_left", "room_finished"]
        assert alice.disconnect_reason == DisconnectReason.ROOM_DELETED


@pytest_twisted.ensureDeferred
async def test_a_human_can_curl_a_participant_in_and_out() -> None:
    async with sfu() as standin:

        async def control(verb: str, **wish: Any) -> tuple[int, Any]:
            response = await treq.post(f"{standin.url}/sandbox/{verb}", data=json.dumps(wish).encode())
            return response.code, await treq.json_content(response)

        code, joined = await control("join", token=token(canPublishSources=["camera"]))
        assert (code, joined["room"]) == (200, "room")
        code, track = await control("publish", room="room", identity="alice", source="camera")
        assert (code, track["type"]) == (200, "VIDEO")
        assert (await control("publish", room="room", identity="alice", source="screen_share"))[0] == 403
        assert (await control("join", token="nonsense"))[0] == 401
        assert (await control("join"))[0] == 400
        assert (await control("leave", room="room", identity="alice"))[0] == 200
        response = await treq.get(f"{standin.url}/sandbox/rooms")
        assert await treq.json_content(response) == {"room": []}


# Sessions that end, and tokens that are refreshed.


@pytest_twisted.ensureDeferred
async def test_crash_ends_every_session_without_a_webhook() -> None:
    async with sfu() as standin:
        alice = standin.connect(token())
        before = names(standin)
        standin.restart()
        assert not alice.connected
        assert (dict(standin.rooms), names(standin)) == ({}, before)
        listed = await call(standin, "ListRooms", pb.ListRoomsRequest(), pb.ListRoomsResponse)
        assert not listed.rooms
        assert standin.connect(token()).connected


@pytest_twisted.ensureDeferred
async def test_graceful_restart_tells_that_the_server_shut_down() -> None:
    async with sfu() as standin:
        standin.connect(token())
        standin.restart(graceful=True)
        left, finished = list(standin.events)[-2:]
        assert (left.event, left.participant.disconnect_reason) == (
            "participant_left",
            DisconnectReason.SERVER_SHUTDOWN,
        )
        assert finished.event == "room_finished"
        assert standin.rooms == {}


@pytest.mark.parametrize("reason", [name for name in DisconnectReason.keys() if name != "UNKNOWN_REASON"])  # noqa: SIM118
@pytest_twisted.ensureDeferred
async def test_a_session_may_end_for_any_reason(reason: str) -> None:
    async with sfu() as standin:
        standin.connect(token())
        standin.disconnect("room", "alice", reason)
        assert json_of(standin.events[-1])["participant"]["disconnectReason"] == reason


@pytest_twisted.ensureDeferred
async def test_a_lost_session_is_missing_from_the_next_listing_and_no_webhook_says_so() -> None:
    async with sfu() as standin:
        standin.connect(token())
        standin.connect(token("bob"))
        before = names(standin)
        standin.lose("room", "alice")
        request = pb.ListParticipantsRequest(room="room")
        listed = await call(standin, "ListParticipants", request, pb.ListParticipantsResponse)
        assert [participant.identity for participant in listed.participants] == ["bob"]
        assert names(standin) == before


@pytest_twisted.ensureDeferred
async def test_webhooks_and_listings_say_when_a_participant_joined() -> None:
    async with sfu(now=lambda: 1_800_000_000.5) as standin:
        now = 1_800_000_000
        standin.connect(token(claims={"nbf": now, "exp": now + 600}))
        joined = json_of(standin.events[-1])["participant"]
        assert (joined["joinedAt"], joined["joinedAtMs"]) == (str(now), str(now * 1000 + 500))
        assert standin.participant("room", "alice").info().joined_at == now  # type: ignore[union-attr]


@pytest_twisted.ensureDeferred
async def test_a_refreshed_token_carries_the_current_grants_for_ten_minutes() -> None:
    async with sfu() as standin:
        alice = standin.connect(token(claims={"name": "Alice", "attributes": {"a": "b"}}))
        permission = ParticipantPermission(can_publish=True, can_publish_sources=[MICROPHONE], can_subscribe=True)
        alice.set_permission(permission)
        claims = verify(alice.refreshed_token(), SECRET, now=time.time() + 599 + 60)
        assert (claims.identity, claims.name, claims.attributes) == ("alice", "Alice", {"a": "b"})
        assert claims.video is not None
        assert claims.video.can_publish_sources == ["microphone"]
        with pytest.raises(BadToken, match="expired"):
            verify(alice.refreshed_token(), SECRET, now=time.time() + 601 + 60)
        assert standin.connect(alice.refreshed_token()).publish("CAMERA") is None
