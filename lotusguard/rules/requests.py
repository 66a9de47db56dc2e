# SPDX-License-Identifier: Apache-2.0
"""Token requests: which routes there are, and a strict reading of their bodies.

Upstream's parser is lax: it matches keys without case, takes the last duplicate and ignores trailing data. A body that
two readers could understand in two ways is therefore refused, and only our own serialisation of it is forwarded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any
from urllib.parse import unquote_to_bytes

from attrs import evolve, field, frozen

from lotusguard.rules.identity import ROOM_SLOT, server_of
from lotusguard.rules.strict_json import KnownKeys, Unreadable, folded, serialised, strict_object

NAME_LIMIT = 255
"""Bytes that a room, slot, user, device, member ID or server name may have: Matrix's own limit."""
TOKEN_LIMIT = 4096
"""Bytes that an OpenID access token or an SFU's URL may have; homeservers' tokens are far shorter."""


class WrongOrigin(Exception):
    """A homeserver asks for a user of another homeserver."""


@frozen
class OpenID:
    """The caller's proof of identity, to be verified by ``server_name``."""

    access_token: str = field(repr=False)
    server_name: str


@frozen
class TokenRequest:
    """A token request as we read it, and as it is forwarded.

    :ivar room_id: the Matrix room; ``None`` if the body names none, which upstream then refuses.
    :ivar user: the user that the caller *claims* to be, on routes that name one. It is not proven: upstream, or the
        homeserver, proves or refutes it. Equal to ``proven_user`` where that is set.
    :ivar openid: what proves the user on the public routes.
    :ivar member_id: the membership's ID, ``""`` if there is none.
    :ivar server_name: with ``url``, chooses among several SFUs in newer bodies.
    :ivar has_delay: whether upstream is asked to send the user's delayed leave event.
    :ivar proven_user: the user that a homeserver vouches for, on the app-service listener; else ``None``.
    :ivar body: our own serialisation, the only one that is forwarded.
    """

    route: TokenRoute
    room_id: str | None
    slot_id: str
    user: str | None
    device_id: str | None
    openid: OpenID | None
    body: bytes = field(repr=False)
    member_id: str = ""
    server_name: str | None = None
    url: str | None = None
    has_delay: bool = False
    proven_user: str | None = None
    _content: Mapping[str, Any] = field(factory=dict, repr=False, eq=False)
    """What was read; empty if it has no delay fields, so that a request that is held takes less memory."""

    def without_delay(self) -> bytes:
        """The body without its delay fields: upstream then issues a token and schedules nothing."""
        if not self._content:
            return self.body
        return serialised({key: value for key, value in self._content.items() if key not in _DELAY_KEYS})


class Proof(Enum):
    """The proof of who the caller is."""

    OPENID = "openid"
    """The OpenID token in the body; upstream verifies it."""
    USER_HEADER = "user_header"
    """A homeserver names its own user in ``X-Matrix-User-Identifier``."""
    ORIGIN = "origin"
    """A homeserver relays another one's request, which ``X-Matrix-Origin`` names; the user is in the body."""


Path = tuple[str, ...]
"""The keys that lead to a value in a body; ``()`` is nowhere."""


@frozen
class Shape:
    """Where a body names the room (by which shapes are told apart), slot, user, device, member and OpenID token."""

    room: str
    slot: Path = ()
    user: Path = ()
    device: Path = ()
    members: tuple[Path, ...] = ()
    has_openid: bool = False


@frozen
class TokenRoute:
    """A route that issues tokens. The key of the room tells the shapes of its bodies apart.

    :ivar path: the name of the route in logs.
    :ivar cors: whether its answers carry CORS headers.
    """

    path: str
    shapes: tuple[Shape, ...]
    proof: Proof = Proof.OPENID
    cors: bool = True


LEGACY = Shape(room="room", device=("device_id",), has_openid=True)
MSC4195 = Shape(
    room="room_id",
    slot=("slot_id",),
    user=("member", "claimed_user_id"),
    device=("member", "claimed_device_id"),
    members=(("member", "id"), ("member_id",)),  # newer bodies have a flat member_id
    has_openid=True,
)
TOKEN_ROUTES = {
    route.path: route
    for route in (
        TokenRoute("/sfu/get", (LEGACY, MSC4195)),  # some releases take the new body here too
        TokenRoute("/get_token", (MSC4195, LEGACY)),  # the old body must not get past the rules here
    )
}
"""The token routes of the public listener."""
CLIENT_ROUTE = TokenRoute(
    "/_matrix/client/rtc/livekit/get_token",
    (Shape(room="room_id", slot=("slot_id",), members=(("member_id",),)),),
    Proof.USER_HEADER,
    cors=False,
)
FEDERATION_ROUTE = TokenRoute(
    "/_matrix/federation/rtc/livekit/get_token",
    (Shape(room="room_id", slot=("slot_id",), user=("user_id",), members=(("member_id",),)),),
    Proof.ORIGIN,
    cors=False,
)
__all__ = [
    "CLIENT_ROUTE", "FEDERATION_ROUTE", "TOKEN_ROUTES", "OpenID", "Proof", "TokenRequest", "TokenRoute", "Unreadable",
    "WrongOrigin", "canonical_path", "folded", "proxied_route", "read_request",
]  # fmt: skip
_PROXIED = re.compile(r"/_matrix/(client|federation)/(?:unstable/[^/]+|[^/]+)/rtc/livekit/get_token")

_KEYS = {
    "": KnownKeys.of((
        "room", "room_id", "slot_id", "openid_token", "member", "device_id", "member_id", "user_id", "server_name",
        "url", "delay_id", "delay_timeout", "delay_cs_api_url",
    )),
    "openid_token": KnownKeys.of(("access_token", "token_type", "matrix_server_name", "expires_in")),
    "member": KnownKeys.of(("id", "claimed_user_id", "claimed_device_id")),
}  # fmt: skip
_DELAY_KEYS = ("delay_id", "delay_timeout", "delay_cs_api_url")


def proxied_route(path: str) -> TokenRoute | None:
    """The token route that a homeserver proxies to this path, stable or unstable.

    :param path: as `canonical_path` gives it.
    """
    found = _PROXIED.fullmatch(path)
    return None if found is None else CLIENT_ROUTE if found[1] == "client" else FEDERATION_ROUTE


def canonical_path(path: bytes) -> str:
    """The one spelling of a request path.

    Upstream's router decodes the path, and proxies between us merge slashes and resolve dots, so all of that is undone
    before a route is looked up.

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

    :param header: gives the values of a request header, for routes on which a homeserver names the user or itself.
    :raises Unreadable: the body is not a JSON object, could be read in two ways, or holds a name that is too long.
    :raises WrongOrigin: the homeserver that asks is not the user's.
    """
    content = strict_object(body, _KEYS)
    shapes = [shape for shape in route.shapes if content.get(shape.room) is not None]
    if len(shapes) > 1:
        raise Unreadable("it names its room twice")
    shape = shapes[0] if shapes else route.shapes[0]
    members = [member for path in shape.members if (member := _text(content, path))]
    if len(members) > 1:
        raise Unreadable("it names its member twice")
    delay = [content[key] for key in _DELAY_KEYS if key in content]
    request = TokenRequest(
        route=route,
        room_id=_text(content, (shape.room,)) or None,
        slot_id=_text(content, shape.slot) or ROOM_SLOT,
        user=_text(content, shape.user) or None,
        device_id=_text(content, shape.device),
        openid=_openid(content) if shape.has_openid else None,
        body=serialised(content),
        member_id=members[0] if members else "",
        server_name=_text(content, ("server_name",)) or None,
        url=_text(content, ("url",), TOKEN_LIMIT) or None,
        has_delay=any(delay),
        content=content if delay else {},
    )
    proven = _proven_user(route.proof, request.user, header)
    return request if proven is None else evolve(request, user=proven, proven_user=proven)


def _openid(content: Mapping[str, Any]) -> OpenID | None:
    access_token = _text(content, ("openid_token", "access_token"), TOKEN_LIMIT)
    server_name = _text(content, ("openid_token", "matrix_server_name"))
    return OpenID(access_token, server_name) if access_token and server_name else None


def _proven_user(proof: Proof, user: str | None, header: Callable[[bytes], list[bytes]]) -> str | None:
    """The user that the homeserver in front of the app-service listener vouches for."""
    if proof is Proof.USER_HEADER:
        return _header(header(b"X-Matrix-User-Identifier"))
    if proof is Proof.ORIGIN and user is not None:
        origin = _header(header(b"X-Matrix-Origin"))
        if not origin or server_of(user) != origin:
            raise WrongOrigin
        return user
    return None


def _header(values: list[bytes]) -> str | None:
    """The name in a header; ``None`` if there is none."""
    if len(values) > 1:
        raise Unreadable("a header that names the caller is there twice")
    if not values or not values[0]:
        return None
    if len(values[0]) > NAME_LIMIT:
        raise Unreadable("a name is too long")
    try:
        return values[0].decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable("a header is not UTF-8") from None


def _text(content: Mapping[str, Any], path: Path, limit: int = NAME_LIMIT) -> str | None:
    """The string at a path; ``None`` for nothing and for ``null``, as upstream takes it."""
    if not path:
        return None
    value: Any = content
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise Unreadable("something else is where a string is expected")
    if 4 * len(value) > limit and len(value.encode("utf-8", "surrogatepass")) > limit:  # four bytes at most for each
        raise Unreadable("a name or a token is too long")
    return value
