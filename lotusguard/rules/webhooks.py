# SPDX-License-Identifier: Apache-2.0
"""LiveKit's webhooks: proving that LiveKit sent one, and reading it.

An event has the same form as a listing, protobuf, so that there is one model of what LiveKit says.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from google.protobuf import json_format
from livekit.protocol.webhook import WebhookEvent

from lotusguard.rules.jwt import SFU_LEEWAY, NotOurs, SfuKey


def verify_webhook(authorization: str, body: bytes, key: SfuKey, now: float) -> None:
    """Prove that LiveKit sent a body.

    :param authorization: the bare header: a token without ``Bearer``.
    :param body: the raw bytes, before anything parsed them.
    :param now: seconds since the epoch.
    :raises NotOurs: the signature, the expiry or the body's hash is wrong.
    """
    claims = key.read(authorization)
    expiry, not_before = claims.get("exp"), claims.get("nbf")
    if not isinstance(expiry, int | float) or not expiry + SFU_LEEWAY >= now:  # so that NaN is expired
        raise NotOurs("expired")
    if isinstance(not_before, int | float) and not_before - SFU_LEEWAY > now:
        raise NotOurs("not valid yet")
    digest = base64.b64encode(hashlib.sha256(body).digest())
    if not hmac.compare_digest(str(claims.get("sha256", "")).encode("utf-8", "replace"), digest):
        raise NotOurs("signed for another body")


def read_webhook(authorization: str, body: bytes, key: SfuKey, now: float) -> WebhookEvent:
    """Verify a webhook and read it, which takes a third of a millisecond.

    Fields and enum names of a later release are ignored. Absent fields have protobuf's zero values: a track without
    ``type`` is audio, a participant without ``kind`` is an ordinary one.

    :raises NotOurs: as `verify_webhook` does, or the body is not an event.
    """
    verify_webhook(authorization, body, key, now)
    if body.lstrip()[:1] != b"{":  # protobuf's parser reads "[]" as an empty message
        raise NotOurs("the body is not an event")
    try:
        return json_format.Parse(body, WebhookEvent(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise NotOurs(f"the body is not an event ({type(error).__name__})") from None
