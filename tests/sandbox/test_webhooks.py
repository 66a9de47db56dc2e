# SPDX-License-Identifier: Apache-2.0
"""The stand-in SFU's webhooks as a receiver gets them. The receiver is the stand-in for lk-jwt-service."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest_twisted
from livekit.protocol.models import Room
from livekit.protocol.webhook import WebhookEvent
from twisted.internet import reactor as twisted_reactor
from twisted.internet.task import Clock, deferLater

from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService
from tests.sandbox.test_livekit import KEY, SECRET, token

reactor: Any = twisted_reactor


@asynccontextmanager
async def pair(clock: Any = None) -> AsyncIterator[tuple[FakeLiveKit, FakeLkJwtService]]:
    receiver = FakeLkJwtService(reactor, key=KEY, secret=SECRET, sfu_url="http://127.0.0.1:1", homeservers={})
    await receiver.start()
    sfu = FakeLiveKit(reactor, key=KEY, secret=SECRET, webhook_urls=[receiver.url + "/sfu_webhook"], clock=clock)
    await sfu.start()
    try:
        yield sfu, receiver
    finally:
        await sfu.stop()
        await receiver.stop()


def received(receiver: FakeLkJwtService) -> list[dict[str, Any]]:
    return [json.loads(webhook.body) for webhook in receiver.webhooks]


@pytest_twisted.ensureDeferred
async def test_webhooks_arrive_in_order_signed_over_the_raw_body() -> None:
    async with pair() as (sfu, receiver):
        alice = sfu.connect(token())
        alice.publish("MICROPHONE")
        sfu.disconnect("room", "alice")
        await sfu.drained()
        assert [event["event"] for event in received(receiver)] == [
            "room_started",
            "participant_joined",
            "track_published",
            "track_unpublished",
            "participant_left",
        ]
        assert all(webhook.verified for webhook in receiver.webhooks)
        assert len({event["id"] for event in received(receiver)}) == 5
        first = receiver.webhooks[0]
        headers = {name.lower(): value for name, value in first.headers}
        assert headers["content-type"] == "application/webhook+json"
        claims = jwt.decode(headers["authorization"], SECRET, ["HS256"])
        assert claims["sha256"] == base64.b64encode(hashlib.sha256(first.body).digest()).decode()


@pytest_twisted.ensureDeferred
async def test_zero_values_are_absent_and_track_events_carry_little() -> None:
    async with pair() as (sfu, receiver):
        alice = sfu.connect(token())
        alice.publish("UNKNOWN", "AUDIO")
        await sfu.drained()
        started, joined, published = received(receiver)
        assert "participant" not in started
        assert joined["participant"]["state"] == "ACTIVE"
        assert "kind" not in joined["participant"]
        assert joined["createdAt"].isdigit()
        assert set(published["participant"]) == {"sid", "identity"}
        assert set(published["room"]) == {"sid", "name"}
        assert not {"type", "source"} & set(published["track"])


async def settle(clock: Clock, seconds: float = 0) -> None:
    """Advance the clock step by step, and let the sockets work in between."""
    clock.advance(seconds)
    for _ in range(4):
        await deferLater(reactor, 0.01)
        clock.advance(0)


@pytest_twisted.ensureDeferred
async def test_a_failing_receiver_is_retried_after_1_2_4_and_8_seconds() -> None:
    clock = Clock()
    async with pair(clock) as (sfu, receiver):
        receiver.faults["sfu_webhook"] = Fault.status(503)
        sfu.open_room("room")
        await settle(clock)
        for wait in (1, 2, 4, 8):
            before = receiver.asked["sfu_webhook"]
            await settle(clock, wait - 0.1)
            assert receiver.asked["sfu_webhook"] == before
            await settle(clock, 0.1)
            assert receiver.asked["sfu_webhook"] == before + 1
        await sfu.drained()
        assert [event.event for event in sfu.webhooks.dropped] == ["room_started"]
        assert [sent.status for sent in sfu.webhooks.attempts] == [503] * 5
        assert not receiver.webhooks


@pytest_twisted.ensureDeferred
async def test_rooms_do_not_delay_each_other_and_old_events_are_dropped() -> None:
    clock = Clock()
    async with pair(clock) as (sfu, receiver):
        receiver.faults["sfu_webhook"] = Fault.hang(times=1)
        sfu.open_room("slow")
        await settle(clock)
        sfu.webhooks.send(WebhookEvent(event="old", room=Room(name="slow")))
        sfu.open_room("quick")
        await settle(clock)
        assert [event["room"]["name"] for event in received(receiver)] == ["quick"]
        await settle(clock, 31)
        await receiver.drop_connections()
        await settle(clock)
        await settle(clock, 1)
        await sfu.drained()
        assert [event.event for event in sfu.webhooks.dropped] == ["old"]
        assert [event["room"]["name"] for event in received(receiver)] == ["quick", "slow"]


@pytest_twisted.ensureDeferred
async def test_client_errors_are_final_and_refused_connections_are_not() -> None:
    clock = Clock()
    async with pair(clock) as (sfu, receiver):
        receiver.faults["sfu_webhook"] = Fault.status(404)
        sfu.open_room("a")
        await settle(clock)
        await sfu.drained()
        assert receiver.asked["sfu_webhook"] == 1
        receiver.faults.clear()
        await receiver.stop_listening()
        sfu.open_room("b")
        await settle(clock)
        await receiver.listen()
        await settle(clock, 1)
        await sfu.drained()
        assert [event["room"]["name"] for event in received(receiver)] == ["b"]
