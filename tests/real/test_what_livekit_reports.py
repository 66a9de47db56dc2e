# SPDX-License-Identifier: Apache-2.0
"""Facts about LiveKit's webhooks, listings and refreshed tokens that the guard relies on."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

import pytest

from lotusguard.rules.jwt import SfuKey
from lotusguard.rules.participants import ended_by_choice
from lotusguard.rules.webhooks import read_webhook
from tests.real.callers import Call, MediaClients
from tests.real.processes import eventually, http
from tests.real.services import KEY, SECRET
from tests.real.signalling import signalling
from tests.real.stack import Stack, claims_in

REFRESHED_LIFE = 600
"""Seconds for which a refreshed token is valid, at least."""
CONNECTION_LOSS = 60.0
"""Seconds to wait until LiveKit notices that a connection is lost."""


@pytest.fixture
def room(stack: Stack) -> str:
    """An SFU room that was created."""
    name = f"room-{uuid4().hex}"
    assert stack.sfu_call("CreateRoom", {"name": name}).status == 200
    return name


@pytest.fixture
def own_clients(stack: Stack) -> Iterator[MediaClients]:
    """A process of media clients that a test may kill."""
    clients = MediaClients(stack.place / "own-clients.log")
    yield clients
    clients.kill()


def publishing(stack: Stack, room: str, clients: MediaClients | None = None) -> Call:
    """A participant of an SFU room who publishes sound."""
    identity = f"somebody-{uuid4().hex[:8]}"
    token = stack.sfu_token({"sub": identity}, roomJoin=True, room=room)
    call = stack.connect(identity, token, clients=clients)
    call.publish("MICROPHONE")
    return call


def departure(stack: Stack, identity: str, name: str = "participant_left") -> dict[str, Any]:
    """The participant in the webhook about their departure."""
    (event,) = eventually(lambda: stack.recorder.events(identity, name), CONNECTION_LOSS, f"{name} of {identity}")
    participant: dict[str, Any] = event["participant"]
    return participant


def test_a_client_that_leaves_is_client_initiated(stack: Stack, room: str) -> None:
    call = publishing(stack, room)
    identity = call.identity
    call.leave()
    assert departure(stack, identity)["disconnectReason"] == "CLIENT_INITIATED"


def test_a_removal_is_participant_removed(stack: Stack, room: str) -> None:
    identity = publishing(stack, room).identity
    assert stack.sfu_call("RemoveParticipant", {"room": room, "identity": identity}).status == 200
    assert departure(stack, identity)["disconnectReason"] == "PARTICIPANT_REMOVED"


def test_a_deleted_room_is_room_deleted(stack: Stack, room: str) -> None:
    identity = publishing(stack, room).identity
    assert stack.sfu_call("DeleteRoom", {"room": room}).status == 200
    assert departure(stack, identity)["disconnectReason"] == "ROOM_DELETED"


def test_a_session_that_is_replaced_is_a_duplicate_identity(stack: Stack, room: str) -> None:
    call = publishing(stack, room)
    identity = call.identity
    stack.connect(identity, stack.sfu_token({"sub": identity}, roomJoin=True, room=room))
    assert departure(stack, identity)["disconnectReason"] == "DUPLICATE_IDENTITY"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_connection_is_a_connection_timeout(
    stack: Stack, room: str, own_clients: MediaClients, how: signal.Signals
) -> None:
    identity = publishing(stack, room, own_clients).identity
    own_clients.signal(how)
    assert departure(stack, identity)["disconnectReason"] == "CONNECTION_TIMEOUT"


def test_after_a_forced_shutdown_no_webhook_blames_the_participant(stack: Stack, room: str) -> None:
    """LiveKit usually ends before it has sent any: the guard sees participants vanish from the listing."""
    call = publishing(stack, room)
    identity = call.identity
    stack.sfu.interrupt(times=2)
    stack.sfu.restart()
    assert eventually(lambda: call.ended, 10.0, "the end of the session") == "SERVER_SHUTDOWN"
    left = stack.recorder.events(identity, "participant_left")
    assert [event["participant"].get("disconnectReason") for event in left] in ([], ["SERVER_SHUTDOWN"])
    assert stack.sfu_call("ListParticipants", {"room": room}).content["participants"] == []


def test_a_shutdown_waits_until_all_participants_have_left(stack: Stack, room: str) -> None:
    call = publishing(stack, room)
    identity = call.identity
    stack.sfu.interrupt()
    process = stack.sfu.process
    assert process is not None
    time.sleep(1.0)
    assert process.poll() is None
    assert call.ended is None
    call.leave()
    process.wait(30.0)
    stack.sfu.restart()
    assert departure(stack, identity)["disconnectReason"] == "CLIENT_INITIATED"


def test_every_departure_that_was_seen_is_read_by_the_guard(stack: Stack, room: str) -> None:
    call = publishing(stack, room)
    identity = call.identity
    call.leave()
    departure(stack, identity)
    for webhook in stack.recorder.webhooks:
        event = read_webhook(webhook.headers["Authorization"], webhook.body, SfuKey(KEY, SECRET), webhook.came_at)
        if event.event == "participant_left":
            reason = webhook.event["participant"].get("disconnectReason")
            assert ended_by_choice(event.participant.disconnect_reason) is (
                reason in ("CLIENT_INITIATED", "PARTICIPANT_REMOVED", "ROOM_DELETED")
            )


def test_the_time_of_a_join_has_milliseconds_in_listings_and_webhooks(stack: Stack, room: str) -> None:
    began = time.time()
    call = publishing(stack, room)
    (listed,) = stack.sfu_call("ListParticipants", {"room": room}).content["participants"]
    (joined,) = eventually(lambda: stack.recorder.events(call.identity, "participant_joined"))
    for milliseconds in (listed["joined_at_ms"], joined["participant"]["joinedAtMs"]):
        assert began - 1 <= int(milliseconds) / 1000 <= call.connected_at + 1
    assert int(listed["joined_at"]) == int(listed["joined_at_ms"]) // 1000


def test_the_services_answer_with_their_time(stack: Stack) -> None:
    answers = {
        "LiveKit": stack.sfu_call("ListRooms", {}),
        "Synapse": http("GET", f"{stack.homeserver_url}/_matrix/client/versions"),
        "lk-jwt-service": http("OPTIONS", f"{stack.upstream_url}/sfu/get"),
    }
    for name, answer in answers.items():
        assert abs(parsedate_to_datetime(answer.headers["Date"]).timestamp() - time.time()) < 5, name


def test_a_refreshed_token_carries_the_rights_after_an_update(stack: Stack, room: str) -> None:
    token = stack.sfu_token(roomJoin=True, room=room)
    with signalling(stack.sfu_url, token) as connection:
        assert "canPublishSources" not in claims_in(connection.refreshed_token())["video"]
        wanted = {"can_publish": True, "can_subscribe": True, "can_publish_sources": ["MICROPHONE"]}
        change = {"room": room, "identity": "somebody", "permission": wanted}
        assert stack.sfu_call("UpdateParticipant", change).status == 200
        refreshed = connection.refreshed_token()
    assert claims_in(refreshed)["video"]["canPublishSources"] == ["microphone"]
    call = stack.connect("somebody", refreshed)
    assert call.look()["may_publish"] == ["MICROPHONE"]


@pytest.mark.parametrize("life", [60, 1800])
def test_a_refreshed_token_lives_ten_minutes_or_as_long_as_the_first_one(stack: Stack, room: str, life: int) -> None:
    token = stack.sfu_token({"exp": int(time.time()) + life}, roomJoin=True, room=room)
    with signalling(stack.sfu_url, token) as connection:
        claims = claims_in(connection.refreshed_token())
    assert abs(claims["exp"] - time.time() - max(life, REFRESHED_LIFE)) < 10


def test_listings_of_an_unchanged_call_have_the_same_entries_in_any_order(stack: Stack, room: str) -> None:
    """The guard looks at nobody while the entries stay the same."""
    calls = [publishing(stack, room) for _ in range(3)]
    identities = {call.identity for call in calls}

    def entries() -> list[str]:
        listed = json.loads(stack.sfu_call("ListParticipants", {"room": room}).body)["participants"]
        return sorted(json.dumps(entry, sort_keys=True) for entry in listed)

    def published() -> bool:
        return all('"tracks": [{' in entry for entry in entries()) and len(entries()) == len(identities)

    eventually(published, 10.0, "everybody's track")
    time.sleep(1.0)
    first = entries()
    for _ in range(10):
        time.sleep(0.3)
        assert entries() == first
