# SPDX-License-Identifier: Apache-2.0
"""Names: Matrix users, LiveKit identities and aliases of SFU rooms.

Facts from lk-jwt-service (``helper.go``) and LiveKit (``pkg/service/rtcservice.go``); see MSC4195 for the hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

ROOM_SLOT = "m.call#ROOM"
"""The slot that ``/sfu/get`` uses: the room's one call."""
LONGEST_NAME = 255
"""Bytes of a room ID, slot, user ID, device ID, member ID or server name. Matrix has this limit for its own IDs."""

_GO_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def is_short_name(name: str) -> bool:
    """Whether a name has at most 255 bytes."""
    return len(name) <= LONGEST_NAME and len(name.encode("utf-8", "replace")) <= LONGEST_NAME


def _json(parts: Sequence[str]) -> str:
    """Canonical JSON, as far as a list of strings goes."""
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"))


def _as_go(text: str) -> str:
    """JSON as Go's ``json.Marshal`` writes it, which escapes ``< > &`` U+2028 and U+2029. Canonical JSON does not."""
    return text.translate(_GO_ESCAPES)


def _hashed(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@lru_cache(maxsize=4096)
def _cached_alias(room_id: str, slot_id: str) -> str:
    return _hashed(_as_go(_json([room_id, slot_id])))


def room_alias(room_id: str, slot_id: str = ROOM_SLOT) -> str:
    """The alias of a slot of a Matrix room: the name of its SFU room (lk-jwt-service 0.4.3 and later).

    The last 4096 are cached, which is about 3 MB at most; longer names than Matrix allows are not.
    """
    if is_short_name(room_id) and is_short_name(slot_id):
        return _cached_alias(room_id, slot_id)
    return _cached_alias.__wrapped__(room_id, slot_id)


alias_cache_info = _cached_alias.cache_info
"""Size and limit of `room_alias`'s cache, for metrics."""


def legacy_identity(user: str, device_id: str) -> str:
    """The identity that ``/sfu/get`` gives: user and device in clear."""
    return f"{user}:{device_id}"


def hashed_identities(user: str, device_id: str, member_id: str) -> frozenset[str]:
    """The identities that ``/get_token`` may give a member: as upstream in Go hashes, and as canonical JSON hashes."""
    return _identities([user, device_id, member_id])


def proxied_identities(user: str, member_id: str) -> frozenset[str]:
    """The identities that a route proxied by a homeserver may give a member; see `hashed_identities`."""
    return _identities([user, member_id])


def _identities(parts: Sequence[str]) -> frozenset[str]:
    text = _json(parts)
    return frozenset({_hashed(text), _hashed(_as_go(text))})


def server_of(user_id: str) -> str:
    """The server part of a Matrix user ID: everything after the *first* colon, because it may contain a port."""
    return user_id.partition(":")[2]


_USER = re.compile(r"@[^:]*:(\[[^\[\]]+\]|[^:\[\]]+)(:[0-9]{1,5})?")


def is_matrix_user(name: str) -> bool:
    """Whether this can be a Matrix user. What is left of an identity whose device ID holds a colon cannot: it would
    name a server with a port that is not a number."""
    return _USER.fullmatch(name) is not None


def is_room_id(text: str) -> bool:
    """Whether a Matrix room can have this ID: at most 255 bytes, no control characters. The grammar is wide, and
    a caller may name anything."""
    return is_short_name(text) and text.isprintable()


def user_of(identity: str, device_id: str | None = None) -> str:
    """The Matrix user behind a legacy identity ``@user:server[:port]:DEVICE``.

    :param device_id: the device the token was asked for, if known. A device ID may itself contain colons.
    :return: the user. Any other identity (hashed, or of another issuer) is returned as it is, and so counts
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
    """An identity, then the same without its ``#…`` suffixes, one after the other.

    ``/rtc?publish=x`` makes a second participant ``identity#x`` out of one token.
    """
    yield identity
    while "#" in identity:
        identity = identity.rpartition("#")[0]
        yield identity


def possible_identities(user: str, device_id: str, member_id: str) -> frozenset[str]:
    """Every identity that upstream may derive for a user's request, whichever route and release it is."""
    identities = {legacy_identity(user, device_id)} if device_id else set[str]()
    if member_id:
        identities |= hashed_identities(user, device_id, member_id) | proxied_identities(user, member_id)
    return frozenset(identities)
