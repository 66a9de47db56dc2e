# SPDX-License-Identifier: Apache-2.0
"""LiveKit's access tokens, signed and verified as livekit/protocol's ``auth`` package does. Sandbox.

PyJWT is not used: it is stricter than LiveKit, and the guard uses it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lotusguard.sandbox.go.http import marshal
from lotusguard.sandbox.go.lax_json import MapOf, NotDecodable, Pointer, decode
from lotusguard.sandbox.livekit.grants import VIDEO, VideoGrant

LEEWAY = 60
"""Tolerance for ``exp`` and ``nbf``, in seconds (``tokenLeeway``)."""

_REGISTERED = {
    "iss": str,
    "sub": str,
    "aud": object,
    "exp": Pointer(float),
    "nbf": Pointer(float),
    "iat": Pointer(float),
    "jti": str,
}
_CLAIMS = _REGISTERED | {
    "identity": str,
    "name": str,
    "kind": str,
    "kindDetails": [str],
    "video": Pointer(VIDEO),
    "sip": object,
    "agent": object,
    "inference": object,
    "observability": object,
    "roomConfig": object,
    "roomPreset": str,
    "sha256": str,
    "metadata": str,
    "attributes": MapOf(str),
}


class BadToken(Exception):
    """The token is not accepted. The text is that of the real service."""


@dataclass(frozen=True)
class Claims:
    """The claims of a verified token."""

    api_key: str
    identity: str
    """``sub``; ``jti`` if there is no ``sub``."""
    video: VideoGrant | None
    expires: float | None
    name: str
    kind: str
    metadata: str
    attributes: dict[str, str]
    sha256: str


def mint(key: str, secret: str, claims: Mapping[str, Any], *, now: float, valid_for: float) -> str:
    """A token as ``AccessToken.ToJWT`` makes it: ``claims`` over iss, sub, iat, nbf and exp."""
    registered = {"iss": key, "iat": int(now), "nbf": int(now), "exp": int(now + valid_for)}
    return sign(secret, registered | dict(claims))


def sign(secret: str, claims: Mapping[str, Any], header: Mapping[str, Any] | None = None) -> str:
    """A compact HS256 JWS over exactly these claims."""
    head = {"alg": "HS256", "typ": "JWT"} if header is None else header
    signed = f"{_b64(_compact(head))}.{_b64(_compact(claims))}"
    return f"{signed}.{_b64(_mac(secret, signed))}"


def api_key_of(token: str) -> str:
    """The ``iss`` of a token that is not verified yet (``ParseAPIToken``).

    :raises BadToken: if it is no HS256 token at all.
    """
    return str(_unverified(token)["iss"])


def verify(token: str, secret: str, *, now: float, exp_required: bool = False) -> Claims:
    """Verify a token as ``APIKeyTokenVerifier.Verify`` does.

    :param exp_required: as after LiveKit 1.13.5; before, a token without ``exp`` lives for ever.
    :raises BadToken: with the reason.
    """
    registered = _unverified(token)
    signed, _, signature = token.rpartition(".")
    if not hmac.compare_digest(_b64(_mac(secret, signed)), signature):
        raise BadToken("token signature is invalid: signature is invalid")
    try:
        claims = decode(_unb64(token.split(".")[1]), _CLAIMS, known_only=False, whole=True)
    except NotDecodable as error:
        raise BadToken(f"token is malformed: could not JSON decode claim: {error}") from None
    if claims["exp"] is None:
        if exp_required:
            raise BadToken("token has invalid claims: token is missing required claim: exp claim is required")
    elif now - LEEWAY >= int(claims["exp"]):
        raise BadToken("token has invalid claims: token is expired")
    if claims["nbf"] is not None and now + LEEWAY < int(claims["nbf"]):
        raise BadToken("token has invalid claims: token is not valid yet")
    video = claims["video"]
    return Claims(
        api_key=registered["iss"],
        identity=registered["sub"] or registered["jti"],
        video=None if video is None else VideoGrant.of_claim(video),
        expires=claims["exp"],
        **{name: claims[name] for name in ("name", "kind", "metadata", "attributes", "sha256")},
    )


def _unverified(token: str) -> dict[str, Any]:
    parts = token.split(".")
    if len(parts) != 3:
        raise BadToken("token is malformed: token contains an invalid number of segments")
    try:
        header = json.loads(_unb64(parts[0]))
        registered = decode(_unb64(parts[1]), _REGISTERED, known_only=False, whole=True)
    except (ValueError, NotDecodable) as error:
        raise BadToken(f"token is malformed: {error}") from None
    audience = registered["aud"] if isinstance(registered["aud"], list) else [registered["aud"] or ""]
    if not all(type(one) is str for one in audience):
        raise BadToken("token is malformed: aud is invalid")
    if not isinstance(header, dict) or header.get("alg") != "HS256":
        raise BadToken("token signature is invalid: signing method is invalid")
    return registered


def _compact(value: Mapping[str, Any]) -> bytes:
    return marshal(value).encode("utf-8", "replace")


def _mac(secret: str, signed: str) -> bytes:
    return hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest()


def _b64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _unb64(text: str) -> bytes:
    if "=" in text or "+" in text or "/" in text:
        raise BadToken("token is malformed: could not base64 decode")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except ValueError as error:
        raise BadToken(f"token is malformed: could not base64 decode: {error}") from None
