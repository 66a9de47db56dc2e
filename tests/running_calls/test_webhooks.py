# SPDX-License-Identifier: Apache-2.0
"""LiveKit's webhooks: all are forwarded to upstream; the guard acts on genuine ones only, and once."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import pytest_twisted
from livekit.protocol.models import DisconnectReason
from twisted.internet import reactor

from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.livekit.tokens import mint
from lotusguard.sandbox.livekit.webhooks import WebhookSender
from tests.calls import (
    ALICE,
    BOB,
    CAROL,
    change_policy,
    counted,
    crashes,
    event_about,
    logged,
    named,
    old_token,
    published,
    put_policy,
    room_of,
    seen_in,
    tell,
)
from tests.conftest import StartSandbox, until


@pytest_twisted.async_yield_fixture
async def deaf(start_sandbox: StartSandbox) -> Any:
    """A sandbox whose LiveKit sends no webhooks, so that the test can send its own."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    sandbox.livekit.webhooks.urls[:] = []
    yield sandbox


async def at_rest(sandbox: Sandbox) -> None:
    """Wait until everything that was reported has been enforced."""
    await sandbox.guard.enforcement.worker.idle()


# -- forwarded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{}", b' {"event" :\t"x"}\r\n\x00', b"\xff\xfe\x00 no json", b"x" * 70_000])
@pytest.mark.parametrize("authorization", ["a.b.c", "Bearer xyz", None])
@pytest_twisted.ensureDeferred
async def test_every_request_is_forwarded_to_upstream_unchanged(
    deaf: Sandbox, body: bytes, authorization: str | None
) -> None:
    headers = {"Content-Type": "application/webhook+json", "X-Other": "kept"}
    if authorization is not None:
        headers["Authorization"] = authorization
    answer = await deaf.request("POST", f"{deaf.url}/sfu_webhook", body, headers)
    assert answer.code == 200
    seen = deaf.upstream.webhooks[-1]
    assert seen.body == body
    given = {name.lower(): value for name, value in seen.headers}
    assert given.get("authorization") == authorization
    assert given["content-type"] == "application/webhook+json"
    assert given["x-other"] == "kept"


@pytest_twisted.ensureDeferred
async def test_upstream_can_verify_a_forwarded_webhook(sandbox: Sandbox) -> None:
    await sandbox.enter(ALICE, room_of(sandbox, 2))
    await sandbox.livekit.drained()
    assert [json.loads(seen.body)["event"] for seen in sandbox.upstream.webhooks][-1] == "participant_joined"
    assert all(seen.verified for seen in sandbox.upstream.webhooks)
    assert counted(sandbox, "webhooks_total", outcome="accepted") == len(sandbox.upstream.webhooks)
    assert {sent.status for sent in sandbox.livekit.webhooks.attempts} == {200}


@pytest_twisted.ensureDeferred
async def test_the_answer_comes_from_upstream(deaf: Sandbox) -> None:
    alice = await deaf.enter(ALICE, room_of(deaf, 1))
    deaf.upstream.faults["sfu_webhook"] = Fault.status(503, b"not now", times=1)
    event = event_about("participant_joined", alice)
    answer = await tell(deaf, event)
    assert (answer.code, answer.body) == (503, b"not now")
    assert (await tell(deaf, event)).code == 200  # the SFU retries
    assert counted(deaf, "webhooks_total", outcome="accepted") == 1
    assert counted(deaf, "webhooks_total", outcome="duplicate") == 1


@pytest_twisted.ensureDeferred
async def test_the_answer_does_not_wait_for_our_work(deaf: Sandbox) -> None:
    alice = await deaf.enter(ALICE, room_of(deaf, 1))
    deaf.livekit.room_faults[alice.room.name] = Fault.hang()
    listings = deaf.livekit.asked["ListParticipants"]
    answer = await tell(deaf, event_about("participant_joined", alice))
    assert answer.code == 200
    await until(lambda: deaf.livekit.asked["ListParticipants"] > listings)
    assert deaf.guard.enforcement.worker.is_busy(alice.room.name)


@pytest_twisted.ensureDeferred
async def test_without_a_key_webhooks_are_forwarded_and_not_read(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, livekit_key="", livekit_secret="")
    assert (await tell(sandbox, b"{}", authorization="a.b.c")).code == 200
    assert sandbox.upstream.webhooks[-1].body == b"{}"
    assert counted(sandbox, "webhooks_total", outcome="unverifiable") == 1


# -- verified ----------------------------------------------------------------------------------------


def forgeries(sandbox: Sandbox, body: bytes) -> dict[str, str]:
    now = time.time()

    def sender(key: str = KEY, secret: str = SECRET, at: float = now) -> str:
        return WebhookSender(
            reactor, reactor, sandbox.livekit.pool, key=key, secret=secret, now=lambda: at
        ).authorization(body)

    true = sender()
    head, claims, signature = true.split(".")
    return {
        "nothing": "",
        "no token": "hello",
        "Bearer": f"Bearer {true}",
        "another secret": sender(secret="x" * 32),
        "another key": sender(key="otherkey"),
        "expired": sender(at=now - 600),
        "not yet valid": sender(at=now + 600),
        "another body": sandbox.livekit.webhooks.authorization(body + b" "),
        "no hash": mint(KEY, SECRET, {}, now=now, valid_for=300),
        "no expiry": mint(KEY, SECRET, {"exp": None, "sha256": "x"}, now=now, valid_for=300),
        "unsigned": f"eyJhbGciOiJub25lIn0.{claims}.",
        "cut short": f"{head}.{claims}.{signature[:-4]}",
    }


@pytest_twisted.ensureDeferred
async def test_a_forged_webhook_changes_nothing_and_is_forwarded(deaf: Sandbox) -> None:
    room_id = room_of(deaf, 1)
    alice = await deaf.enter(ALICE, room_id)
    await tell(deaf, event_about("participant_joined", alice))
    await at_rest(deaf)
    assert await seen_in(deaf, room_id) == [(ALICE, True)]
    before = dict(deaf.livekit.asked)
    body = json.dumps(event_about("participant_left", alice)).encode()
    for number, (name, authorization) in enumerate(forgeries(deaf, body).items(), 1):
        with logged() as events:
            assert (await tell(deaf, body, authorization=authorization)).code == 200, name
        assert deaf.upstream.webhooks[-1].body == body, name
        assert await seen_in(deaf, room_id) == [(ALICE, True)], name
        assert counted(deaf, "webhooks_total", outcome="forged") == number, name
        assert len(named(events, "webhook_forged")) == 1, name
    assert dict(deaf.livekit.asked) == before
    await tell(deaf, body)  # the genuine one does
    assert await seen_in(deaf, room_id) == []


@pytest_twisted.ensureDeferred
async def test_a_webhook_that_is_delivered_twice_is_acted_on_once(deaf: Sandbox) -> None:
    alice = await deaf.enter(ALICE, room_of(deaf, 1))
    event = event_about("track_published", alice)
    await tell(deaf, event)
    await at_rest(deaf)
    listings = deaf.livekit.asked["ListParticipants"]
    for _ in range(3):
        await tell(deaf, event)
    await at_rest(deaf)
    assert deaf.livekit.asked["ListParticipants"] == listings
    assert counted(deaf, "webhooks_total", outcome="duplicate") == 3


@pytest_twisted.ensureDeferred
async def test_events_without_an_id_are_no_duplicates_of_each_other(deaf: Sandbox) -> None:
    room_id = room_of(deaf, 2)
    for user in (ALICE, BOB):
        event = event_about("participant_joined", await deaf.enter(user, room_id))
        del event["id"]
        await tell(deaf, event)
    assert counted(deaf, "webhooks_total", outcome="accepted") == 2


@pytest_twisted.ensureDeferred
async def test_a_replayed_arrival_adds_no_participant(deaf: Sandbox) -> None:
    room_id = room_of(deaf, 2)
    alice = await deaf.enter(ALICE, room_id)
    joined = event_about("participant_joined", alice)
    await tell(deaf, joined)
    await at_rest(deaf)
    deaf.livekit.disconnect(alice.room.name, alice.identity)
    await tell(deaf, event_about("participant_left", alice))
    for event in (joined, {**joined, "id": "EV_another"}):
        await tell(deaf, event)
        await at_rest(deaf)
        assert await seen_in(deaf, room_id) == []


# -- read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strange",
    [
        {"event": "participant_left", "room": None, "participant": None},
        {"event": "participant_left", "room": {"name": 7}, "participant": "Alice"},
        {"event": "participant_joined", "participant": {"sid": ["x"], "identity": {}}},
        {"event": "participant_joined", "participant": {}},
        {"event": "egress_started", "egressInfo": {"egressId": "EG_1"}},
        {"event": ["participant_left"], "id": {}},
        {"event": "a_later_release_s", "surprise": [1, {"x": None}]},
        {"id": 7, "room": {}, "participant": [], "event": None},
    ],
)
@pytest_twisted.ensureDeferred
async def test_strange_events_are_answered_and_break_nothing(deaf: Sandbox, strange: dict[str, Any]) -> None:
    room_id = room_of(deaf, 1)
    alice = await deaf.enter(ALICE, room_id)
    await tell(deaf, event_about("participant_joined", alice))
    await at_rest(deaf)
    with logged() as events:
        assert (await tell(deaf, event_about("", alice) | strange)).code == 200
        await at_rest(deaf)
    assert crashes(events) == []
    assert await seen_in(deaf, room_id) == [(ALICE, True)]


@pytest.mark.parametrize("body", [b"[]", b"7", b"not json", b"\xff", b"[" * 100_000])
@pytest_twisted.ensureDeferred
async def test_a_signed_body_that_is_not_an_event_is_forwarded(deaf: Sandbox, body: bytes) -> None:
    with logged() as events:
        assert (await tell(deaf, body)).code == 200
    assert crashes(events) == []
    assert deaf.upstream.webhooks[-1].body == body
    assert counted(deaf, "webhooks_total", outcome="forged") == 1


@pytest_twisted.ensureDeferred
async def test_unknown_fields_and_absent_zero_values_are_accepted(deaf: Sandbox) -> None:
    room_id = room_of(deaf)
    alice = await deaf.enter(ALICE, room_id)
    share = alice.publish("SCREEN_SHARE")
    assert share is not None
    put_policy(deaf, room_id, allow_screenshare=False)
    deaf.guard.policies.forget_freshness(room_id)
    event = event_about("track_published", alice, track={"sid": share.sid}, later={"unknown": [1]})
    event["participant"] = {"sid": alice.sid, "identity": alice.identity, "newField": {}}
    await tell(deaf, event)
    await until(lambda: published(alice) == [])


# -- participants -----------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_leaving_frees_a_seat_at_once(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    await at_rest(sandbox)
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await sandbox.livekit.drained()
    assert await seen_in(sandbox, room_id) == []
    await sandbox.enter(BOB, room_id)


@pytest_twisted.ensureDeferred
async def test_a_session_that_never_became_active_frees_the_seat_too(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    answer = await sandbox.ask_token(ALICE, room_id)
    alice = sandbox.livekit.connect(json.loads(answer.body)["jwt"], activate=False)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403  # that listing contains Alice
    assert await seen_in(sandbox, room_id) == [(ALICE, True)]
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    await sandbox.livekit.drained()
    assert sandbox.livekit.events[-1].event == "participant_connection_aborted"
    assert await seen_in(sandbox, room_id) == []
    await sandbox.enter(BOB, room_id)


@pytest_twisted.ensureDeferred
async def test_the_end_of_a_room_frees_all_its_seats(deaf: Sandbox) -> None:
    room_id = room_of(deaf, 2)
    alice, bob = await deaf.enter(ALICE, room_id), await deaf.enter(BOB, room_id)
    for who in (alice, bob):
        await tell(deaf, event_about("participant_joined", who))
    await at_rest(deaf)
    alice.room.close()
    finished = event_about("room_finished", alice)
    del finished["participant"]
    await tell(deaf, finished)
    await at_rest(deaf)
    assert await seen_in(deaf, room_id) == []


def reconnected(sandbox: Sandbox, room_id: str) -> Participant:
    return sandbox.livekit.connect(old_token(ALICE, room_id))


LATE = {"sent after the new one's joined": True, "sent before it": False}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("reason", [{}, {"disconnectReason": "DUPLICATE_IDENTITY"}])
@pytest_twisted.ensureDeferred
async def test_the_departure_of_an_old_session_does_not_end_the_new_one(
    deaf: Sandbox, late: bool, reason: dict[str, str]
) -> None:
    room_id = room_of(deaf, 1)
    old = await deaf.enter(ALICE, room_id)
    await tell(deaf, event_about("participant_joined", old))
    await at_rest(deaf)
    new = reconnected(deaf, room_id)
    assert (new.identity, new.sid != old.sid) == (old.identity, True)
    left = event_about("participant_left", old)
    left["participant"] |= reason
    for event in (event_about("participant_joined", new), left) if late else (left, event_about("track", new)):
        await tell(deaf, event)
        await at_rest(deaf)
    assert (await deaf.ask_token(BOB, room_id)).code == 403
    assert await seen_in(deaf, room_id) == [(ALICE, True)]
    assert new.connected


@pytest_twisted.ensureDeferred
async def test_a_reconnect_keeps_the_seat_in_a_room_whose_limit_was_lowered(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 3)
    for user in (ALICE, BOB, CAROL):
        await sandbox.enter(user, room_id)
    await sandbox.livekit.drained()
    await change_policy(sandbox, room_id, 1)
    await at_rest(sandbox)
    new = reconnected(sandbox, room_id)
    await sandbox.livekit.drained()
    await at_rest(sandbox)
    assert [
        event.participant.disconnect_reason for event in sandbox.livekit.events if event.event == "participant_left"
    ] == [DisconnectReason.DUPLICATE_IDENTITY]
    assert await seen_in(sandbox, room_id) == [(ALICE, True), (BOB, True), (CAROL, True)]
    assert new.connected


@pytest_twisted.ensureDeferred
async def test_a_listing_between_two_sessions_ends_no_seat(deaf: Sandbox) -> None:
    """The SFU ends the old session first, and lists no participant for a moment."""
    room_id = room_of(deaf, 2)
    alice, bob = await deaf.enter(ALICE, room_id), await deaf.enter(BOB, room_id)
    for who in (alice, bob):
        await tell(deaf, event_about("participant_joined", who))
    await change_policy(deaf, room_id, 1)
    await at_rest(deaf)
    deaf.livekit.disconnect(alice.room.name, alice.identity, DisconnectReason.DUPLICATE_IDENTITY)
    left = event_about("participant_left", alice)
    left["participant"]["disconnectReason"] = "DUPLICATE_IDENTITY"
    await tell(deaf, left)
    deaf.guard.enforcement.enforce(alice.room.name)
    await at_rest(deaf)
    assert await seen_in(deaf, room_id) == [(BOB, True)]
    new = reconnected(deaf, room_id)
    await tell(deaf, event_about("participant_joined", new))
    await at_rest(deaf)
    assert await seen_in(deaf, room_id) == [(ALICE, True), (BOB, True)]
    assert new.connected


async def with_a_slow_listing(deaf: Sandbox) -> tuple[str, Participant, int]:
    """Alice is in a call with two seats, and LiveKit has begun to list it.

    :return: the room, Alice, and how many listings there were before.
    """
    room_id = room_of(deaf, 2)
    alice = await deaf.enter(ALICE, room_id)
    await tell(deaf, event_about("participant_joined", alice))
    await at_rest(deaf)
    listings = deaf.livekit.asked["ListParticipants"]
    # a slow answer, with the state at the time of the request
    deaf.livekit.room_faults[alice.room.name] = Fault.drip(0.003, times=1)
    await tell(deaf, event_about("track_published", alice))
    await until(lambda: deaf.livekit.asked["ListParticipants"] > listings)
    return room_id, alice, listings


@pytest_twisted.ensureDeferred
async def test_a_listing_that_began_before_a_departure_adds_no_participant(deaf: Sandbox) -> None:
    room_id, alice, _ = await with_a_slow_listing(deaf)
    deaf.livekit.disconnect(alice.room.name, alice.identity)
    await tell(deaf, event_about("participant_left", alice))
    assert deaf.guard.enforcement.worker.is_busy(alice.room.name)
    await at_rest(deaf)
    assert await seen_in(deaf, room_id) == []


@pytest_twisted.ensureDeferred
async def test_a_listing_that_began_before_an_arrival_ends_no_seat(deaf: Sandbox) -> None:
    room_id, alice, listings = await with_a_slow_listing(deaf)
    deaf.livekit.room_faults[alice.room.name] = Fault.hang()  # the next listing gets no answer
    bob = deaf.livekit.connect(old_token(BOB, room_id))
    await tell(deaf, event_about("participant_joined", bob))
    await until(lambda: deaf.livekit.asked["ListParticipants"] == listings + 2)  # the first listing has ended
    assert await seen_in(deaf, room_id) == [(ALICE, True), (BOB, True)]
