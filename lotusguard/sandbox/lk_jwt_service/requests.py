# SPDX-License-Identifier: Apache-2.0
"""The request bodies of lk-jwt-service, how they are validated, and the names derived from them. Sandbox.

Read from lk-jwt-service's ``requests.go`` and ``helper.go`` (0.5.0) and from its tags before 0.4.3. The app-service
routes follow MSC4195.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any, Literal

from lotusguard.sandbox.go.http import encode, marshal
from lotusguard.sandbox.go.lax_json import NotDecodable, decode
from lotusguard.sandbox.wire import Refusal, Reply

ROOM_SLOT = "m.call#ROOM"
CORS_JSON = (
    ("Content-Type", "application/json"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "POST"),
    ("Access-Control-Allow-Headers", "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token"),
)
PLAIN_JSON = CORS_JSON[:1]

_OPENID_TOKEN = {"access_token": str, "token_type": str, "matrix_server_name": str, "expires_in": int}
_MEMBER = {"id": str, "claimed_user_id": str, "claimed_device_id": str}
_DELAY = {"delay_id": str, "delay_timeout": int, "delay_cs_api_url": str}
LEGACY_BODY = {"room": str, "openid_token": _OPENID_TOKEN, "device_id": str} | _DELAY
BODY = {"room_id": str, "slot_id": str, "openid_token": _OPENID_TOKEN, "member": _MEMBER} | _DELAY
MULTI_SFU_BODY = BODY | {"member_id": str, "server_name": str, "url": str}
"""The body of newer releases: ``member_id`` may replace ``member``, and another SFU may be chosen."""
CLIENT_BODY = {"server_name": str, "url": str, "room_id": str, "slot_id": str, "member_id": str}
FEDERATION_BODY = {"url": str, "room_id": str, "slot_id": str, "member_id": str, "user_id": str}

Naming = Literal["0.3.0", "0.4.2", "0.4.3"]
"""The release whose aliases and identities are used. Releases after 0.4.3 derive them as 0.4.3 does."""


def refusal(status: int, errcode: str, error: str, headers: tuple[tuple[str, str], ...] = CORS_JSON) -> Refusal:
    """A Matrix error as lk-jwt-service writes it."""
    return Refusal(Reply(status, encode({"errcode": errcode, "error": error}), headers))


def unauthorised(headers: tuple[tuple[str, str], ...] = CORS_JSON) -> Refusal:
    return refusal(401, "M_UNAUTHORIZED", "The request could not be authorised.", headers)


def bad_json(error: str) -> Refusal:
    return refusal(400, "M_BAD_JSON", error)


def read(body: bytes, schema: dict[str, Any]) -> dict[str, Any]:
    """The body, decoded as Go does. :raises Refusal: 400 M_NOT_JSON if that fails."""
    try:
        return decode(body, schema)
    except NotDecodable:
        raise refusal(400, "M_NOT_JSON", "Error reading request") from None


def check_legacy(request: dict[str, Any]) -> None:
    """``LegacySFURequest.Validate``."""
    token = request["openid_token"]
    if not request["room"]:
        raise bad_json("Missing room parameter")
    if not token["access_token"] or not token["matrix_server_name"]:
        raise bad_json("Missing OpenID token parameters")
    _check_delay(request)


def check(request: dict[str, Any], *, delegation: bool = False) -> None:
    """``SFURequest.Validate``. A delegation request is validated alike, with slightly different texts."""
    token, member = request["openid_token"], request["member"]
    a = "" if delegation else "a "
    if not request["room_id"] or not request["slot_id"]:
        raise bad_json("The request body is missing `room_id` or `slot_id`")
    if not all(member.values()) and not request.get("member_id"):
        raise bad_json(f"The request body `member` is missing {a}`id`, `claimed_user_id` or `claimed_device_id`")
    if not token["access_token"] or not token["matrix_server_name"]:
        raise bad_json(f"The request body `openid_token` is missing {a}`access_token` or `matrix_server_name`")
    _check_delay(request, required=delegation)


def _check_delay(request: dict[str, Any], *, required: bool = False) -> None:
    some = request["delay_id"] != "" or request["delay_timeout"] > 0
    both = request["delay_id"] != "" and request["delay_timeout"] > 0
    if (some or required) and not both:
        raise bad_json("The request body is missing `delay_id` or `delay_timeout`")


def room_alias(room_id: str, slot_id: str, naming: Naming = "0.4.3") -> str:
    """The SFU room's name for a slot of a Matrix room."""
    return room_id if naming == "0.3.0" else _hashed([room_id, slot_id], naming)


def hashed_identity(parts: list[str], naming: Naming = "0.4.3") -> str:
    """A pseudonymous identity, from user, device and member ID or from user and member ID."""
    return _hashed(parts, naming)


def _hashed(parts: list[str], naming: Naming) -> str:
    text = marshal(parts) if naming == "0.4.3" else "|".join(parts)
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return base64.b64encode(digest).decode().rstrip("=")
