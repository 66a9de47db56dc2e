# SPDX-License-Identifier: Apache-2.0
"""What is read from a token request: names within their limits, the caller's proof, the delay fields."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lotusguard.rules.requests import (
    CLIENT_ROUTE,
    FEDERATION_ROUTE,
    TOKEN_ROUTES,
    TokenRequest,
    TokenRoute,
    Unreadable,
    WrongOrigin,
    proxied_route,
    read_request,
)

LEGACY, NEW = TOKEN_ROUTES["/sfu/get"], TOKEN_ROUTES["/get_token"]
DELAY = {"delay_id": "d", "delay_timeout": 8000, "delay_cs_api_url": "https://example.org"}


def legacy_body(**changes: Any) -> dict[str, Any]:
    openid = {"access_token": "t", "token_type": "Bearer", "matrix_server_name": "example.org", "expires_in": 9}
    return {"room": "!r:example.org", "device_id": "D", "openid_token": openid} | changes


def new_body(**changes: Any) -> dict[str, Any]:
    member = {"id": "m", "claimed_user_id": "@a:example.org", "claimed_device_id": "D"}
    openid = legacy_body()["openid_token"]
    return {"room_id": "!r:example.org", "slot_id": "s", "member": member, "openid_token": openid} | changes


def read(route: TokenRoute, body: dict[str, Any], **headers: str) -> TokenRequest:
    given = {name.replace("_", "-").encode().lower(): [value.encode()] for name, value in headers.items()}
    return read_request(route, json.dumps(body).encode(), lambda name: given.get(name.lower(), []))


def nested(place: str, value: str) -> dict[str, Any]:
    """A `new_body` with a value at a dotted place."""
    body = new_body()
    *path, last = place.split(".")
    at: Any = body
    for key in path:
        at = at[key]
    at[last] = value
    return body


NAMES = (
    "room_id", "slot_id", "member.id", "member.claimed_user_id", "member.claimed_device_id",
    "openid_token.matrix_server_name", "server_name",
)  # fmt: skip


@pytest.mark.parametrize("place", NAMES)
def test_name_of_more_than_255_bytes_is_unreadable(place: str) -> None:
    read(NEW, nested(place, "x" * 255))
    for name in ("x" * 256, "é" * 128):
        with pytest.raises(Unreadable, match="too long"):
            read(NEW, nested(place, name))


@pytest.mark.parametrize("key", ["room", "device_id"])
def test_names_of_the_legacy_body_have_the_same_limit(key: str) -> None:
    read(LEGACY, legacy_body(**{key: "x" * 255}))
    with pytest.raises(Unreadable, match="too long"):
        read(LEGACY, legacy_body(**{key: "x" * 256}))


@pytest.mark.parametrize("place", ["openid_token.access_token", "url"])
def test_tokens_and_addresses_may_be_longer_than_names(place: str) -> None:
    read(NEW, nested(place, "x" * 4096))
    with pytest.raises(Unreadable, match="too long"):
        read(NEW, nested(place, "x" * 4097))


def test_user_in_a_header_has_the_same_limit() -> None:
    body = {"room_id": "!r", "slot_id": "s", "member_id": "m"}
    read(CLIENT_ROUTE, body, x_matrix_user_identifier="@" + "x" * 254)
    with pytest.raises(Unreadable, match="too long"):
        read(CLIENT_ROUTE, body, x_matrix_user_identifier="@" + "x" * 255)


def test_member_id_is_read_from_either_place() -> None:
    flat = new_body(member_id="flat")
    del flat["member"]
    assert read(NEW, new_body()).member_id == "m"
    assert read(NEW, flat).member_id == "flat"
    assert read(NEW, flat).user is None
    assert read(LEGACY, legacy_body()).member_id == ""
    with pytest.raises(Unreadable, match="its member twice"):
        read(NEW, new_body(member_id="flat"))


def test_choice_of_an_sfu_is_read() -> None:
    asked = read(NEW, new_body(server_name="other.example", url="wss://sfu.example"))
    assert (asked.server_name, asked.url) == ("other.example", "wss://sfu.example")
    assert (read(NEW, new_body()).server_name, read(NEW, new_body()).url) == (None, None)


@pytest.mark.parametrize(("route", "body"), [(LEGACY, legacy_body()), (NEW, new_body())])
def test_delay_fields_can_be_left_out_of_what_is_forwarded(route: TokenRoute, body: dict[str, Any]) -> None:
    asked = read(route, body | DELAY | {"other": 1})
    assert asked.has_delay
    assert json.loads(asked.body) == body | DELAY | {"other": 1}
    assert json.loads(asked.without_delay()) == body | {"other": 1}
    plain = read(route, body)
    assert not plain.has_delay
    assert plain.without_delay() == plain.body


@pytest.mark.parametrize("delay", [{"delay_id": "", "delay_timeout": 0}, {"delay_id": None}])
def test_empty_delay_fields_are_no_delay(delay: dict[str, Any]) -> None:
    asked = read(LEGACY, legacy_body(**delay))
    assert not asked.has_delay
    assert json.loads(asked.without_delay()) == legacy_body()


def test_public_routes_prove_no_user() -> None:
    headers = {"x_matrix_user_identifier": "@evil:example.org", "x_matrix_origin": "example.org"}
    asked = read(NEW, new_body(user_id="@evil:example.org"), **headers)
    assert (asked.user, asked.proven_user) == ("@a:example.org", None)
    assert (read(LEGACY, legacy_body(), **headers).user, read(LEGACY, legacy_body()).proven_user) == (None, None)


def test_homeserver_proves_its_own_user_in_a_header() -> None:
    body = {"room_id": "!r", "slot_id": "s", "member_id": "m", "user_id": "@other:example.org"}
    asked = read(CLIENT_ROUTE, body, x_matrix_user_identifier="@a:example.org")
    assert (asked.user, asked.proven_user, asked.member_id) == ("@a:example.org", "@a:example.org", "m")
    assert read(CLIENT_ROUTE, body).proven_user is None


@pytest.mark.parametrize("origin", ["example.org", "example", "example.org:8448", ""])
def test_federated_user_must_belong_to_the_origin(origin: str) -> None:
    body = {"room_id": "!r", "slot_id": "s", "member_id": "m", "user_id": "@a:matrix.example.org:8448"}
    with pytest.raises(WrongOrigin):
        read(FEDERATION_ROUTE, body, x_matrix_origin=origin)
    with pytest.raises(WrongOrigin):
        read(FEDERATION_ROUTE, body)
    assert read(FEDERATION_ROUTE, body, x_matrix_origin="matrix.example.org:8448").proven_user == body["user_id"]


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token", CLIENT_ROUTE),
        ("/_matrix/client/v1/rtc/livekit/get_token", CLIENT_ROUTE),
        ("/_matrix/federation/v12/rtc/livekit/get_token", FEDERATION_ROUTE),
        ("/_matrix/federation/unstable/x/rtc/livekit/get_token", FEDERATION_ROUTE),
        ("/_matrix/media/v1/rtc/livekit/get_token", None),
        ("/_matrix/client/v1/rtc/livekit/get_token/x", None),
        ("/x/_matrix/client/v1/rtc/livekit/get_token", None),
        ("/sfu/get", None),
    ],
)
def test_proxied_routes_are_known_by_their_unstable_and_stable_paths(path: str, route: TokenRoute | None) -> None:
    assert proxied_route(path) is route
