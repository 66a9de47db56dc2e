# SPDX-License-Identifier: Apache-2.0
"""Webhooks: only LiveKit's own are read, and what they say is read as LiveKit means it."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livekit.protocol.models import DisconnectReason, ParticipantInfo, TrackSource, TrackType
from livekit.protocol.webhook import WebhookEvent

from lotusguard.rules.jwt import NotOurs, SfuKey
from lotusguard.rules.participants import ended_by_choice
from lotusguard.rules.webhooks import read_webhook

KEY = SfuKey("key", "a-secret-of-at-least-thirty-two-chars")
NOW = 1_800_000_000.0


def webhook(body: bytes, key: SfuKey = KEY, **claims: Any) -> str:
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return key.sign({"iss": key.key, "nbf": NOW - 1, "exp": NOW + 300, "sha256": digest} | claims)


def read(event: dict[str, Any]) -> WebhookEvent:
    body = json.dumps(event).encode()
    return read_webhook(webhook(body), body, KEY, NOW)


def test_event_of_livekit_is_read() -> None:
    event = read(
        {
            "event": "participant_left",
            "id": "EV_1",
            "createdAt": "1800000000",
            "room": {"name": "alias", "sid": "RM_1"},
            "participant": {
                "sid": "PA_1",
                "identity": "@alice:a:DEV",
                "state": "ACTIVE",
                "joinedAt": "1800000001",
                "joinedAtMs": "1800000001500",
                "kind": "AGENT",
                "disconnectReason": "DUPLICATE_IDENTITY",
            },
        }
    )
    assert (event.event, event.id, event.room.name, event.created_at) == (
        "participant_left", "EV_1", "alias", 1_800_000_000,
    )  # fmt: skip
    assert event.participant.identity == "@alice:a:DEV"
    assert event.participant.state == ParticipantInfo.State.ACTIVE
    assert event.participant.joined_at_ms == 1_800_000_001_500
    assert event.participant.kind == ParticipantInfo.Kind.AGENT
    assert event.participant.disconnect_reason == DisconnectReason.DUPLICATE_IDENTITY


def test_absent_values_are_zero() -> None:
    event = read({"event": "track_published", "track": {"sid": "TR_1"}, "participant": {"sid": "PA_1"}})
    assert (event.track.type, event.track.source) == (TrackType.AUDIO, TrackSource.UNKNOWN)
    assert (event.participant.kind, event.participant.joined_at) == (ParticipantInfo.Kind.STANDARD, 0)
    assert not event.HasField("room")


def test_fields_and_names_of_a_later_release_are_ignored() -> None:
    participant = {"sid": "PA_1", "kind": "NEW", "state": "NEW", "disconnectReason": "NEW", "newField": {"a": [1]}}
    event = read({"event": "new_event", "newField": 5, "participant": participant})
    assert (event.event, event.participant.sid) == ("new_event", "PA_1")
    assert not ended_by_choice(event.participant.disconnect_reason)


@pytest.mark.parametrize(
    ("authorization", "body"),
    [
        (webhook(b"{}"), b"{} "),
        (webhook(b"{}", exp=NOW - 61), b"{}"),
        (webhook(b"{}", exp=None), b"{}"),
        (webhook(b"{}", nbf=NOW + 61), b"{}"),
        (webhook(b"{}", sha256=""), b"{}"),
        (webhook(b"{}", SfuKey("key", "x" * 40)), b"{}"),
        (webhook(b"{}", SfuKey("other", KEY.secret)), b"{}"),
        ("Bearer " + webhook(b"{}"), b"{}"),
        ("", b"{}"),
        (webhook(b"[]"), b"[]"),
        (webhook(b"{"), b"{"),
        (webhook(b""), b""),
        (webhook(b"null"), b"null"),
        (webhook(b'"event"'), b'"event"'),
        (webhook(b'{"event":5}'), b'{"event":5}'),
        (webhook(b"\xff"), b"\xff"),
        (webhook(b'{"a":' + b"[" * 100_000), b'{"a":' + b"[" * 100_000),
        (webhook(b"{}", exp=float("nan")), b"{}"),
        (webhook(b"{}", exp="soon"), b"{}"),
    ],
)
def test_forged_webhook_is_not_read(authorization: str, body: bytes) -> None:
    with pytest.raises(NotOurs):
        read_webhook(authorization, body, KEY, NOW)


@given(st.binary(max_size=200))
def test_any_signed_body_is_an_event_or_not_ours(body: bytes) -> None:
    try:
        event = read_webhook(webhook(body), body, KEY, NOW)
    except NotOurs:
        return
    assert isinstance(event, WebhookEvent)
