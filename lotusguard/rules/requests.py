# SPDX-License-Identifier: Apache-2.0
"""Token requests: which routes there are, and a strict reading of their bodies. Floor: rules.

Upstream's parser is lax: keys match without case, the last duplicate wins, what trails is ignored. So a body that
two readers could understand in two ways is refused, and only our own serialisation of what we read travels on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

from attrs import field, frozen

from lotusguard.rules.identity import ROOM_SLOT


class Unreadable(Exception):
    """A body that cannot be read in exactly one way. The text says why, without quoting the body."""


def folded(key: str) -> str:
    """A key as Go's ``encoding/json`` compares it: without case, with ``ſ`` as s and the Kelvin sign as k."""
    return key.replace("\u017f", "s").replace("\u212a", "k").lower()


@frozen
class OpenID:
    """The caller's proof of who they are, to be asked of ``server_name``."""

    access_token: str = field(repr=False)
    server_name: str


@frozen
class TokenRequest:
    """A token request as we read it, and as it will be forwarded.

    :ivar room_id: the Matrix room; ``None`` where the body names none, which upstream then refuses.
    :ivar user: who the caller claims to be, where the route says so. Upstream proves or refuses it.
    :ivar body: our own serialisation, the only one that goes on.
    """

    route: TokenRoute
    room_id: str | None
    slot_id: str
    user: str | None
    device_id: str | None
    openid: OpenID | None
    body: bytes = field(repr=False)


@frozen
class Shape:
    """Where a body says which room, slot, user and device it is about: dotted key paths; ``""`` is nowhere."""

    room: str
    slot: str = ""
    user: str = ""
    device: str = ""
    openid: str = ""
    user_header: bytes = b""


@frozen
class TokenRoute:
    """A route that issues tokens; the shapes are told apart by their room key.

    :ivar cors: whether its answers carry CORS headers (a federation route's do not).
    """

    path: str
    shapes: tuple[Shape, ...]
    cors: bool = True


LEGACY = Shape(room="room", device="device_id", openid="openid_token")
MSC4195 = Shape(
    room="room_id",
    slot="slot_id",
    user="member.claimed_user_id",
    device="member.claimed_device_id",
    openid="openid_token",
)
_RTC = "io.element.msc4195/rtc/livekit/get_token"
TOKEN_ROUTES = {
    route.path: route
    for route in (
        TokenRoute("/sfu/get", (LEGACY, MSC4195)),  # some releases take the new body here too
        TokenRoute("/get_token", (MSC4195,)),
        TokenRoute(
            f"/_matrix/client/unstable/{_RTC}",
            (Shape(room="room_id", slot="slot_id", user_header=b"X-Matrix-User-Identifier"),),
        ),
        TokenRoute(
            f"/_matrix/federation/unstable/{_RTC}",
            (Shape(room="room_id", slot="slot_id", user="user_id"),),
            cors=False,
        ),
    )
}

_KEYS = {
    "": (
        "room", "room_id", "slot_id", "openid_token", "member", "device_id", "member_id", "user_id", "server_name",
        "url", "delay_id", "delay_timeout", "delay_cs_api_url",
    ),
    "openid_token": ("access_token", "token_type", "matrix_server_name", "expires_in"),
    "member": ("id", "claimed_user_id", "claimed_device_id"),
}  # fmt: skip
_KNOWN = {place: (frozenset(keys), frozenset(map(folded, keys))) for place, keys in _KEYS.items()}


def canonical_path(path: bytes) -> str:
    """What a request path comes to, however it is written.

    Upstream's router decodes the path, and proxies between merge slashes and resolve dots, so all of that is
    undone before routes are recognised.

    :param path: the target without its query.
    """
    segments: list[str] = []
    for segment in unquote_to_bytes(path).decode("utf-8", "replace").split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    return "/" + "/".join(segments)


def read_request(
    route: TokenRoute, body: bytes, header: Callable[[bytes], list[bytes]] = lambda name: []
) -> TokenRequest:
    """Read a token request strictly.

    :param header: gives the values of a request header, for routes whose user stands in one.
    :raises Unreadable: the body is no JSON object, or could be read in two ways.
    """
    content = _strict_object(body)
    shapes = [shape for shape in route.shapes if content.get(shape.room) is not None]
    if len(shapes) > 1:
        raise Unreadable("it names its room twice")
    shape = shapes[0] if shapes else route.shapes[0]
    user = _text(content, shape.user)
    if shape.user_header:
        values = header(shape.user_header)
        if len(values) > 1:
            raise Unreadable("the user's header stands there twice")
        user = values[0].decode("utf-8", "replace") if values else None
    access_token, server_name = (
        _text(content, shape.openid and f"{shape.openid}.{key}") for key in ("access_token", "matrix_server_name")
    )
    return TokenRequest(
        route=route,
        room_id=_text(content, shape.room) or None,
        slot_id=_text(content, shape.slot) or ROOM_SLOT,
        user=user or None,
        device_id=_text(content, shape.device),
        openid=OpenID(access_token, server_name) if access_token and server_name else None,
        body=_serialised(content),
    )


def _strict_object(body: bytes) -> dict[str, Any]:
    try:
        content = _decoder.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8") from None
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except ValueError:
        raise Unreadable("it is not one JSON value") from None
    if not isinstance(content, dict):
        raise Unreadable("it is no JSON object")
    for place, (names, folds) in _KNOWN.items():
        part = content.get(place) if place else content
        if isinstance(part, dict):
            for key in part:
                if key not in names and folded(key) in folds:
                    raise Unreadable("a key differs from a known one by its case alone")
        elif part is not None:
            raise Unreadable("an object is expected where something else stands")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise Unreadable("a key stands there twice")
    return content


def _constant(name: str) -> NoReturn:
    raise Unreadable("NaN and Infinity are no JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _serialised(content: dict[str, Any]) -> bytes:
    try:
        return _encoder.encode(content).encode()
    except UnicodeEncodeError:
        raise Unreadable("a lone surrogate stands in it") from None
    except (ValueError, RecursionError):
        raise Unreadable("it holds what JSON cannot say") from None


def _text(content: Mapping[str, Any], path: str) -> str | None:
    """The string at a dotted path; ``None`` where nothing or ``null`` stands, as upstream takes it."""
    value: Any = content
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, dict) else None
    if not path or value is None:
        return None
    if not isinstance(value, str):
        raise Unreadable("a string is expected where something else stands")
    return value
