# SPDX-License-Identifier: Apache-2.0
"""Tokens: signed, verified, read, and readable for Element Call."""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.rules.jwt import NotOurs, SfuKey, read_unverified

KEY = SfuKey("key", "a-secret-of-at-least-thirty-two-chars")
NOW = 1_800_000_000.0


def join_claims(**video: Any) -> dict[str, Any]:
    grant = {"roomJoin": True, "room": "alias", "canPublish": True, "canSubscribe": True, **video}
    return {"iss": "key", "sub": "@alice:a:DEV", "exp": int(NOW) + 3600, "nbf": int(NOW), "video": grant}


def test_signed_token_is_verified_by_the_same_secret_only() -> None:
    token = KEY.sign(join_claims())
    assert jwt.decode(token, KEY.secret, algorithms=["HS256"], options={"verify_exp": False, "verify_nbf": False})
    assert KEY.read(token) == join_claims()
    with pytest.raises(NotOurs):
        SfuKey("key", "another-secret-of-thirty-two-chars").read(token)


def test_tampered_token_is_not_ours() -> None:
    head, body, signature = KEY.sign(join_claims()).split(".")
    for tampered in (f"{head}.{body}x.{signature}", f"{head}.{body}.{signature[:-2]}AA", f"{head}.{body}", "", "a.b.c"):
        with pytest.raises(NotOurs):
            KEY.read(tampered)


def test_unsigned_token_is_not_ours() -> None:
    with pytest.raises(NotOurs):
        KEY.read(jwt.encode(join_claims(), "", algorithm="none"))


def signed(header: bytes, payload: bytes) -> str:
    """A token that our secret signed with HS256, whatever its header says."""
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
def test_token_of_another_algorithm_is_not_ours(header: bytes) -> None:
    with pytest.raises(NotOurs):
        KEY.read(signed(header, CLAIMS))


def test_head_may_be_written_in_other_ways() -> None:
    for header in (b'{"typ":"JWT","alg":"HS256"}', b'{ "alg": "HS256" }', b'{"alg":"HS256","kid":"key","typ":"JWT"}'):
        assert KEY.read(signed(header, CLAIMS)) == join_claims()


@pytest.mark.parametrize("payload", [b"", b"[]", b"null", b"{", b'"text"', b"\xff", b"[" * 200_000])
def test_signed_payload_without_claims_is_not_ours(payload: bytes) -> None:
    with pytest.raises(NotOurs):
        KEY.read(signed(b'{"alg":"HS256"}', payload))


@pytest.mark.parametrize("token", ["..", "a..", "é.b.c", "a.b.c.d", "\0.\0.\0", "=.=.=", " . . ", "a" * 50_000])
def test_text_that_is_not_a_token_is_not_ours(token: str) -> None:
    with pytest.raises(NotOurs):
        KEY.read(token)


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=60), st.integers(0, 300), st.integers(0, 3))
def test_changed_token_is_not_ours(inserted: str, at: int, removed: int) -> None:
    token = KEY.sign(join_claims())
    changed = token[:at] + inserted + token[at + removed :]
    if changed != token:
        with pytest.raises(NotOurs):
            KEY.read(changed)


def test_token_of_another_api_key_is_not_ours() -> None:
    with pytest.raises(NotOurs):
        KEY.read(SfuKey("other", KEY.secret).sign(join_claims() | {"iss": "other"}))


def test_token_that_pyjwt_refuses_and_livekit_accepts_is_read() -> None:
    claims = join_claims() | {"iat": NOW + 5000, "aud": "somebody", "jti": 5, "exp": 1, "nbf": NOW + 9999}
    assert KEY.read(KEY.sign(claims)) == claims


def test_short_secret_is_accepted_as_livekit_accepts_it() -> None:
    assert SfuKey("devkey", "secret").read(SfuKey("devkey", "secret").sign(join_claims() | {"iss": "devkey"}))


@given(st.text(), st.text())
def test_payload_can_be_decoded_with_atob(identity: str, name: str) -> None:
    payload = KEY.sign(join_claims() | {"sub": identity + "?>~", "name": name}).split(".")[1]
    assert "-" not in payload
    assert "_" not in payload
    decoded = json.loads(base64.b64decode(payload + "=" * (-len(payload) % 4)))
    assert decoded["sub"] == identity + "?>~"


def test_claims_are_read_whoever_signed_the_token() -> None:
    assert read_unverified(SfuKey("other", "x" * 40).sign(join_claims())) == join_claims()


@pytest.mark.parametrize("token", ["", "a", "a.b.c", "a.bnVsbA.c", "a.W10.c"])
def test_text_without_claims_has_none_to_read(token: str) -> None:
    assert read_unverified(token) is None


def test_secret_is_not_shown() -> None:
    assert KEY.secret not in repr(KEY)
