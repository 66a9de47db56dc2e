# SPDX-License-Identifier: Apache-2.0
"""LiveKit tokens: reading those upstream issues, narrowing them, making those we call the SFU with. Floor: rules.

HS256 only, as LiveKit. Its server matches claim keys without case and takes an absent or empty
``canPublishSources`` for *all sources*, so the grant is rebuilt from the keys we know instead of patched.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from attrs import field, frozen
from jwt.algorithms import HMACAlgorithm
from jwt.utils import base64url_decode, base64url_encode

from lotusguard.rules.policy import Policy
from lotusguard.rules.requests import folded
from lotusguard.rules.sources import ALL_SOURCES, Source, source_of_claim

SFU_LEEWAY = 60
"""Seconds by which LiveKit forgives ``exp`` and ``nbf``."""


class NotOurs(Exception):
    """A token that our key and secret did not sign, or that is no token at all. The text names no secret."""


_hs256 = HMACAlgorithm(HMACAlgorithm.SHA256)
_HEAD = base64url_encode(b'{"alg":"HS256","typ":"JWT"}')
"""What LiveKit's own tokens begin with, too."""
compact = json.JSONEncoder(separators=(",", ":")).encode
"""JSON without a space, in ASCII."""


@frozen
class SfuKey:
    """The API key and secret that lk-jwt-service, the SFU and we share."""

    key: str
    secret: str = field(repr=False)

    def sign(self, claims: Mapping[str, object]) -> str:
        """Sign claims. The payload is ASCII without ``> ? ~``: Element Call reads it with ``atob``, which
        does not know base64url's ``-`` and ``_``, and only those characters lead to them."""
        payload = compact(claims).translate(_ATOB_SAFE).encode("ascii")
        signed = _HEAD + b"." + base64url_encode(payload)
        return (signed + b"." + self._signature(signed)).decode("ascii")

    def read(self, token: str) -> dict[str, Any]:
        """The claims of a token that this key signed.

        ``alg``, ``crit`` and the signature are looked at, the claims only for whose they are. Expiry, ``iat`` and
        ``aud`` are for LiveKit to judge, which has other rules than PyJWT. PyJWT's own reading goes through a token
        character by character, a twentieth of a join's cost, before it looks at the signature.

        :raises NotOurs: another key or secret signed it, or it cannot be read.
        """
        try:
            signed, _, signature = token.encode("ascii").rpartition(b".")
            head, payload = signed.split(b".")
            if head != _HEAD and not _is_plain_hs256(json.loads(base64url_decode(head))):
                raise NotOurs("not signed with HS256")
            if not hmac.compare_digest(signature, self._signature(signed)):
                raise NotOurs("signed with another secret")
            claims = json.loads(base64url_decode(payload))
        except (ValueError, RecursionError) as error:
            raise NotOurs(f"no token ({type(error).__name__})") from None
        if not isinstance(claims, dict):
            raise NotOurs("claims are no object")
        if claims.get("iss") != self.key:
            raise NotOurs("issued for another API key")
        return claims

    def _signature(self, signed: bytes) -> bytes:
        return base64url_encode(_hs256.sign(signed, self.secret.encode()))

    def room_service_token(self, now: float, *, room: str | None = None) -> str:
        """A token for RoomService: ``roomAdmin`` of one room, or ``roomList`` without a room.

        :param now: seconds since the epoch.
        """
        grant: dict[str, object] = {"roomList": True} if room is None else {"roomAdmin": True, "room": room}
        return self.sign({"iss": self.key, "nbf": int(now) - 30, "exp": int(now) + 600, "video": grant})


def _is_plain_hs256(header: object) -> bool:
    return isinstance(header, dict) and header.get("alg") == "HS256" and "crit" not in header


_ATOB_SAFE = {ord(character): f"\\u{ord(character):04x}" for character in ">?~\x7f"}


def read_unverified(token: str) -> dict[str, Any] | None:
    """The claims of a token, whoever signed it; ``None`` when there are none to read."""
    try:
        claims = json.loads(base64url_decode(token.split(".")[1].encode("ascii")))
    except (IndexError, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


@frozen
class Issued:
    """What an issued token says of whom it lets in where."""

    alias: str
    identity: str


def issued_to(claims: Mapping[str, Any]) -> Issued | None:
    """Alias and identity of a join token, or ``None`` when it names none.

    These two claims are the truth, whatever naming the upstream's release uses. ``sub`` falls back
    to ``jti``, as in the SFU.
    """
    video = claims.get("video")
    alias = video.get("room") if isinstance(video, Mapping) else None
    identity = claims.get("sub") or claims.get("jti") or claims.get("identity")
    if not (isinstance(alias, str) and alias and isinstance(identity, str) and identity):
        return None
    return Issued(alias, identity)


_TOP_CLAIMS = (
    "identity", "name", "kind", "kindDetails", "video", "sip", "agent", "inference", "observability",
    "roomConfig", "roomPreset", "sha256", "metadata", "attributes",
    "iss", "sub", "aud", "exp", "nbf", "iat", "jti",
)  # fmt: skip
_VIDEO_GRANTS = (
    "roomCreate", "roomList", "roomRecord", "roomAdmin", "roomJoin", "room", "canPublish", "canSubscribe",
    "canPublishData", "canPublishSources", "canUpdateOwnMetadata", "ingressAdmin", "hidden", "recorder",
    "agent", "canSubscribeMetrics", "canManageAgentSession", "destinationRoom",
)  # fmt: skip


_TOP_EXACT, _VIDEO_EXACT = (
    {written: name for name in names for written in (name, folded(name))} for names in (_TOP_CLAIMS, _VIDEO_GRANTS)
)


def _known(claims: Mapping[str, Any], exact: Mapping[str, str], *, others: bool) -> dict[str, Any]:
    """The claims under their exact names, read as Go does: without case, the last one wins."""
    known: dict[str, Any] = {}
    for key, value in claims.items():
        name = exact.get(key) or exact.get(folded(key))
        if name is not None:
            known[name] = value
        elif others:
            known[key] = value
    return known


def granted_sources(video: Mapping[str, Any]) -> tuple[Source, ...]:
    """What a video grant lets publish, in the order it stands there."""
    if video.get("canPublish") is False:
        return ()
    listed = video.get("canPublishSources")
    if not listed:
        return ALL_SOURCES
    if not isinstance(listed, list):
        return ()
    return tuple(source for source in map(source_of_claim, listed) if source is not None)


def narrowed(claims: Mapping[str, Any], policy: Policy, now: float, longest_life: float) -> dict[str, Any]:
    """The claims without what the policy forbids and with a short life; never wider than they came.

    :param now: seconds since the epoch.
    :param longest_life: seconds; ``exp`` is at most that far away afterwards.
    """
    kept = _known(claims, _TOP_EXACT, others=True)
    video = _known(kept["video"], _VIDEO_EXACT, others=False) if isinstance(kept.get("video"), Mapping) else {}
    if policy.forbidden:
        before = granted_sources(video)
        left = [source for source in before if source not in policy.forbidden]
        if left:
            video["canPublishSources"] = [source.claim for source in left]
        else:
            # An empty list would be all sources. canPublishData follows canPublish when it is absent.
            if video.get("canPublishData") is None:
                video["canPublishData"] = video.get("canPublish") is not False
            video.pop("canPublishSources", None)
            video["canPublish"] = False
    kept["video"] = video
    latest = int(now + longest_life)
    expiry = kept.get("exp")
    is_time = isinstance(expiry, int | float) and not isinstance(expiry, bool)
    kept["exp"] = min(int(expiry), latest) if is_time else latest  # type: ignore[arg-type]
    return kept


def verified_webhook(authorization: str, body: bytes, key: SfuKey, now: float) -> dict[str, Any]:
    """The event in a webhook that the SFU truly sent.

    :param authorization: the bare header: a JWT without ``Bearer``.
    :param body: the raw bytes, before anything parsed them.
    :param now: seconds since the epoch.
    :raises NotOurs: signature, expiry or body hash do not hold, or the body is no event.
    """
    claims = key.read(authorization)
    expiry, not_before = claims.get("exp"), claims.get("nbf")
    if not isinstance(expiry, int | float) or expiry + SFU_LEEWAY < now:
        raise NotOurs("expired")
    if isinstance(not_before, int | float) and not_before - SFU_LEEWAY > now:
        raise NotOurs("not valid yet")
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    if not hmac.compare_digest(str(claims.get("sha256", "")).encode(), digest.encode()):
        raise NotOurs("the body is not the signed one")
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        raise NotOurs("the body is no JSON") from None
    if not isinstance(event, dict):
        raise NotOurs("the body is no event")
    return event
