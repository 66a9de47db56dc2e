# SPDX-License-Identifier: Apache-2.0
"""LiveKit's JSON web tokens: signing, verifying and reading them. HS256 only, as in LiveKit."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from typing import Any

from attrs import field, frozen
from jwt.algorithms import HMACAlgorithm
from jwt.utils import base64url_decode, base64url_encode

SFU_LEEWAY = 60
"""Seconds by which LiveKit forgives ``exp`` and ``nbf``."""


class NotOurs(Exception):
    """A token that our key and secret did not sign, or that is not a token. The text names no secret."""


_hs256 = HMACAlgorithm(HMACAlgorithm.SHA256)
_HEAD = base64url_encode(b'{"alg":"HS256","typ":"JWT"}')
"""The head of LiveKit's own tokens, too."""
compact = json.JSONEncoder(separators=(",", ":")).encode
"""JSON without spaces, in ASCII."""


@frozen
class SfuKey:
    """The API key and secret that lk-jwt-service, LiveKit and the guard share."""

    key: str
    secret: str = field(repr=False)

    def sign(self, claims: Mapping[str, object]) -> str:
        """Sign claims.

        The payload is ASCII without ``> ? ~``. Element Call decodes it with ``atob``, which does not know
        base64url's ``-`` and ``_``; only those characters lead to them.
        """
        payload = compact(claims)
        for character, escape in _ATOB_SAFE.items():
            payload = payload.replace(character, escape)
        signed = _HEAD + b"." + base64url_encode(payload.encode("ascii"))
        return (signed + b"." + self._signature(signed)).decode("ascii")

    def read(self, token: str) -> dict[str, Any]:
        """The claims of a token that this key signed.

        Checks ``alg``, ``crit``, the signature and ``iss``. Expiry, ``iat`` and ``aud`` are for LiveKit to judge,
        whose rules differ from PyJWT's. PyJWT's own ``decode`` goes through a token character by character before it
        checks the signature, which was a twentieth of a join's cost.

        :raises NotOurs: another key or secret signed it, or it cannot be read.
        """
        try:
            signed, _, signature = token.encode("ascii").rpartition(b".")
            head, payload = signed.split(b".")
            if head != _HEAD and not _is_plain_hs256(json.loads(base64url_decode(head))):
                raise NotOurs("not signed with HS256")
            if not hmac.compare_digest(signature, self._signature(signed)):
                raise NotOurs("signed with another secret")
            claims = json.loads(base64url_decode(payload).decode())
        except (ValueError, RecursionError) as error:
            raise NotOurs(f"not a token ({type(error).__name__})") from None
        if not isinstance(claims, dict):
            raise NotOurs("the claims are not an object")
        if claims.get("iss") != self.key:
            raise NotOurs("issued for another API key")
        return claims

    def _signature(self, signed: bytes) -> bytes:
        return base64url_encode(_hs256.sign(signed, self.secret.encode()))

    def room_service_token(self, now: float, *, room: str | None = None, create: bool = False) -> str:
        """A token for RoomService: ``roomAdmin`` of one SFU room, or ``roomList`` without a room.

        :param now: seconds since the epoch.
        :param create: ``roomCreate`` instead.
        """
        grant: dict[str, object] = {"roomList": True} if room is None else {"roomAdmin": True, "room": room}
        if create:
            grant = {"roomCreate": True}
        return self.sign({"iss": self.key, "nbf": int(now) - 30, "exp": int(now) + 600, "video": grant})


def _is_plain_hs256(header: object) -> bool:
    return isinstance(header, dict) and header.get("alg") == "HS256" and "crit" not in header


_ATOB_SAFE = {character: f"\\u{ord(character):04x}" for character in ">?~\x7f"}


def read_unverified(token: str) -> dict[str, Any] | None:
    """The claims of a token, without checking its signature; ``None`` if they cannot be read."""
    try:
        claims = json.loads(base64url_decode(token.split(".")[1].encode("ascii")))
    except (IndexError, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None
