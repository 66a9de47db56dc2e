# SPDX-License-Identifier: Apache-2.0
"""Who is who: Matrix users, LiveKit identities and room aliases. Floor: rules.

Facts from lk-jwt-service (``helper.go``) and LiveKit (``pkg/service/rtcservice.go``); see MSC4195 for the hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache

ROOM_SLOT = "m.call#ROOM"
"""The slot that ``/sfu/get`` uses: the room's one call."""

_GO_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def _hashed(parts: list[str]) -> str:
    # Go's json.Marshal escapes < > & U+2028 U+2029, which canonical JSON does not; upstream is Go.
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":")).translate(_GO_ESCAPES)
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@lru_cache(maxsize=4096)
def room_alias(room_id: str, slot_id: str = ROOM_SLOT) -> str:
    """The SFU room's name for a slot of a Matrix room (lk-jwt-service 0.4.3 and later)."""
    return _hashed([room_id, slot_id])


def server_of(user_id: str) -> str:
    """The server part of a Matrix user ID: all after the *first* colon, for it may carry a port."""
    return user_id.partition(":")[2]


def is_room_id(text: str) -> bool:
    """Whether a Matrix room can have this ID: no longer than 255 bytes, no control characters. Its grammar is wide, and
    what a caller names may be anything."""
    return len(text.encode("utf-8", "replace")) <= 255 and text.isprintable()


def user_of(identity: str, device_id: str | None = None) -> str:
    """The Matrix user behind a legacy identity ``@user:server[:port]:DEVICE``.

    :param device_id: the device the token was asked for, when known: a device ID may itself contain colons.
    :return: the user; any other identity (hashed, or of another issuer) comes back as it is and so counts
        as a user of its own.
    """
    if not identity.startswith("@"):
        return identity
    if device_id is not None and identity.endswith(":" + device_id):
        return identity[: -len(device_id) - 1]
    user, colon, device = identity.rpartition(":")
    if not colon or ":" not in user or "]" in device:
        return identity
    return user


def base_identities(identity: str) -> Iterator[str]:
    """An identity, then what is left when ``#…`` suffixes are taken off.

    ``/rtc?publish=x`` makes a second participant ``identity#x`` out of one token.
    """
    yield identity
    while "#" in identity:
        identity = identity.rpartition("#")[0]
        yield identity
