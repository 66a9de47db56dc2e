# SPDX-License-Identifier: Apache-2.0
"""Tokens: read, never widened, kept readable for Element Call; webhooks verified."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.rules.policy import Policy
from lotusguard.rules.sources import CAMERA, SCREEN_SHARE, SCREEN_SHARE_AUDIO, Source
from lotusguard.rules.tokens import NotOurs, SfuKey, granted_sources, issued_to, narrowed, verified_webhook

KEY = SfuKey("key", "a-secret-of-at-least-thirty-two-chars")
NOW = 1_800_000_000.0
NO_SCREEN = Policy(forbidden=frozenset({SCREEN_SHARE, SCREEN_SHARE_AUDIO}))
NOTHING_BUT_MICROPHONE = Policy(forbidden=frozenset({SCREEN_SHARE, SCREEN_SHARE_AUDIO, CAMERA}))


def join_claims(**video: Any) -> dict[str, Any]:
    grant = {"roomJoin": True, "room": "alias", "canPublish": True, "canSubscribe": True, **video}
    return {"iss": "key", "sub": "@alice:a:DEV", "exp": int(NOW) + 3600, "nbf": int(NOW), "video": grant}


def test_jwt_resign_is_verified_by_the_same_secret_and_by_no_other() -> None:
    token = KEY.sign(join_claims())
    assert jwt.decode(token, KEY.secret, algorithms=["HS256"], options={"verify_exp": False, "verify_nbf": False})
    assert KEY.read(token) == join_claims()
    with pytest.raises(NotOurs):
        SfuKey("key", "another-secret-of-thirty-two-chars").read(token)


def test_jwt_tampering_is_noticed() -> None:
    head, body, signature = KEY.sign(join_claims()).split(".")
    for tampered in (f"{head}.{body}x.{signature}", f"{head}.{body}.{signature[:-2]}AA", f"{head}.{body}", "", "a.b.c"):
        with pytest.raises(NotOurs):
            KEY.read(tampered)


def test_an_unsigned_token_is_not_ours() -> None:
    with pytest.raises(NotOurs):
        KEY.read(jwt.encode(join_claims(), "", algorithm="none"))


def signed(header: bytes, payload: bytes) -> str:
    """A token that our secret truly signed with HS256, whatever it says it is."""
    parts = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, payload))
    signature = hmac.digest(KEY.secret.encode(), parts, "sha256")
    return (parts + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


CLAIMS = json.dumps(join_claims()).encode()


@pytest.mark.parametrize(
    "header",
    [
        b'{"alg":"none"}', b'{"alg":"HS512"}', b'{"alg":"hs256"}', b'{"alg":["HS256"]}', b'{"typ":"JWT"}', b"{}", b"[]",
        b'"HS256"', b"", b"{", b"\xff", b'{"alg":"HS256","crit":["exp"]}',
        b'{"alg":"HS256","b64":false,"crit":["b64"]}',
    ],
)  # fmt: skip
def test_what_is_not_plainly_signed_with_hs256_is_not_ours(header: bytes) -> None:
    with pytest.raises(NotOurs):
        KEY.read(signed(header, CLAIMS))


def test_a_head_that_is_written_otherwise_is_read() -> None:
    for header in (b'{"typ":"JWT","alg":"HS256"}', b'{ "alg": "HS256" }', b'{"alg":"HS256","kid":"key","typ":"JWT"}'):
        assert KEY.read(signed(header, CLAIMS)) == join_claims()


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"{", b'"text"', b"\xff", b"[" * 200_000])
def test_a_signed_payload_that_holds_no_claims_is_not_ours(payload: bytes) -> None:
    with pytest.raises(NotOurs):
        KEY.read(signed(b'{"alg":"HS256"}', payload))


@pytest.mark.parametrize("token", ["..", "a..", "é.b.c", "a.b.c.d", "\0.\0.\0", "=.=.=", " . . ", "a" * 50_000])
def test_what_is_no_token_is_not_ours(token: str) -> None:
    with pytest.raises(NotOurs):
        KEY.read(token)


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=60), st.integers(0, 300), st.integers(0, 3))
def test_nothing_that_was_changed_is_ours(inserted: str, at: int, removed: int) -> None:
    token = KEY.sign(join_claims())
    changed = token[:at] + inserted + token[at + removed :]
    if changed != token:
        with pytest.raises(NotOurs):
            KEY.read(changed)


def test_a_token_of_another_api_key_is_not_ours() -> None:
    with pytest.raises(NotOurs):
        KEY.read(SfuKey("other", KEY.secret).sign(join_claims() | {"iss": "other"}))


def test_what_pyjwt_would_refuse_and_livekit_takes_is_read() -> None:
    claims = join_claims() | {"iat": NOW + 5000, "aud": "somebody", "jti": 5, "exp": 1, "nbf": NOW + 9999}
    assert KEY.read(KEY.sign(claims)) == claims


def test_a_short_secret_is_taken_as_livekit_takes_it() -> None:
    assert SfuKey("devkey", "secret").read(SfuKey("devkey", "secret").sign(join_claims() | {"iss": "devkey"}))


@pytest.mark.parametrize(
    ("video", "sources"),
    [
        ({}, ["microphone", "camera"]),
        ({"canPublishSources": None}, ["microphone", "camera"]),
        ({"canPublishSources": []}, ["microphone", "camera"]),
        ({"canPublishSources": ["camera", "screen_share", "microphone"]}, ["camera", "microphone"]),
        ({"canPublishSources": ["microphone"]}, ["microphone"]),
        ({"canPublishSources": ["microphone", "SCREEN_SHARE", "nonsense"]}, ["microphone"]),
        ({"CANPUBLISHSOURCES": ["camera", "screen_share"]}, ["camera"]),
        ({"canPublishſources": ["camera", "screen_share"]}, ["camera"]),
    ],
)
def test_source_narrowing_takes_the_screen_share_and_leaves_the_rest(video: dict[str, Any], sources: list[str]) -> None:
    kept = narrowed(join_claims(**video), NO_SCREEN, NOW, 120)
    assert kept["video"] == {
        "roomJoin": True, "room": "alias", "canPublish": True, "canSubscribe": True, "canPublishSources": sources,
    }  # fmt: skip


@pytest.mark.parametrize("data", [None, True, False])
def test_source_narrowing_when_nothing_is_left_keeps_data_as_it_was(data: bool | None) -> None:
    video = {"canPublishSources": ["camera"]} | ({} if data is None else {"canPublishData": data})
    kept = narrowed(join_claims(**video), NOTHING_BUT_MICROPHONE, NOW, 120)["video"]
    assert kept["canPublish"] is False
    assert "canPublishSources" not in kept
    assert kept["canPublishData"] is (data is not False)


def test_who_may_not_publish_may_not_publish_afterwards() -> None:
    kept = narrowed(join_claims(canPublish=False), NO_SCREEN, NOW, 120)["video"]
    assert kept["canPublish"] is False
    assert kept["canPublishData"] is False


def test_the_life_of_a_token_is_cut_and_never_lengthened() -> None:
    assert narrowed(join_claims(), Policy(2), NOW, 120)["exp"] == NOW + 120
    assert narrowed(join_claims() | {"exp": NOW + 5}, Policy(2), NOW, 120)["exp"] == NOW + 5
    forever = join_claims()
    del forever["exp"]
    assert narrowed(forever, Policy(2), NOW, 120)["exp"] == NOW + 120
    assert narrowed(join_claims() | {"EXP": NOW + 9999}, Policy(2), NOW, 120)["exp"] == NOW + 120


def test_all_other_claims_travel_on() -> None:
    claims = join_claims(hidden=True, canUpdateOwnMetadata=True) | {"name": "A", "metadata": "m", "x-other": [1]}
    kept = narrowed(claims, NO_SCREEN, NOW, 120)
    assert {name: kept[name] for name in ("name", "metadata", "x-other", "sub", "iss", "nbf")} == {
        name: claims[name] for name in ("name", "metadata", "x-other", "sub", "iss", "nbf")
    }
    assert kept["video"]["hidden"] is True
    assert kept["video"]["canUpdateOwnMetadata"] is True


SOURCE_NAMES = st.sampled_from([source.claim for source in Source] + ["CAMERA", "unknown", ""])
GRANTS = st.fixed_dictionaries(
    {"roomJoin": st.booleans(), "room": st.text()},
    optional={
        "canPublish": st.sampled_from([True, False, None]),
        "canPublishData": st.sampled_from([True, False, None]),
        "canPublishSources": st.none() | st.lists(SOURCE_NAMES),
        "canSubscribe": st.booleans(),
    },
)
POLICIES = st.builds(Policy, st.none() | st.integers(1, 9), st.frozensets(st.sampled_from(list(Source))))


@given(GRANTS, POLICIES)
def test_never_wider_than_it_came(video: dict[str, Any], policy: Policy) -> None:
    kept = narrowed({"iss": "key", "sub": "x", "video": video}, policy, NOW, 120)["video"]
    before, after = set(granted_sources(video)), set(granted_sources(kept))
    assert after <= before
    assert not after & policy.forbidden
    assert before - policy.forbidden <= after
    data_before = video.get("canPublishData")
    data_before = video.get("canPublish") is not False if data_before is None else data_before
    data_after = kept.get("canPublishData")
    data_after = kept.get("canPublish") is not False if data_after is None else data_after
    assert data_after == data_before


@given(st.text(), st.text())
def test_element_call_can_decode_the_payload_with_atob(identity: str, name: str) -> None:
    payload = KEY.sign(join_claims() | {"sub": identity + "?>~", "name": name}).split(".")[1]
    assert "-" not in payload
    assert "_" not in payload
    decoded = json.loads(base64.b64decode(payload + "=" * (-len(payload) % 4)))
    assert decoded["sub"] == identity + "?>~"


def test_the_issued_token_tells_alias_and_identity() -> None:
    issued = issued_to(join_claims())
    assert issued is not None
    assert (issued.alias, issued.identity) == ("alias", "@alice:a:DEV")
    fallback = issued_to({"jti": "id", "video": {"room": "r"}})
    assert fallback is not None
    assert fallback.identity == "id"
    assert issued_to({"sub": "x"}) is None
    assert issued_to({"video": {"room": "r"}}) is None


def webhook(body: bytes, key: SfuKey = KEY, **claims: Any) -> str:
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return key.sign({"iss": key.key, "nbf": NOW - 1, "exp": NOW + 300, "sha256": digest} | claims)


def test_a_true_webhook_is_read() -> None:
    assert verified_webhook(webhook(b'{"event":"room_started"}'), b'{"event":"room_started"}', KEY, NOW) == {
        "event": "room_started"
    }


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
    ],
)
def test_a_forged_webhook_is_not(authorization: str, body: bytes) -> None:
    with pytest.raises(NotOurs):
        verified_webhook(authorization, body, KEY, NOW)
