# SPDX-License-Identifier: Apache-2.0
"""Bodies in which a strict parser reads an open room and a parser as lax as upstream's a full one.

The guard would apply the policy of ``!open``, which has none, and upstream would issue a token for ``!full``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_twisted
from attrs import frozen

from lotusguard.rules.requests import TOKEN_ROUTES, TokenRoute, Unreadable, proxied_route, read_request
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.go.lax_json import NotDecodable, decode
from lotusguard.sandbox.lk_jwt_service.requests import BODY, CLIENT_BODY, FEDERATION_BODY, LEGACY_BODY
from tests.conftest import StartSandbox
from tests.raw_http import recorder

OPEN, FULL = "!open:sandbox.local", "!full:sandbox.local"
REPLACED = "\ufffd"


@frozen
class Route:
    """A token route: the key of the room, and a valid body for `OPEN` as JSON without the outer braces."""

    path: str
    room_key: str
    schema: dict[str, Any]
    rest: str
    headers: dict[str, str]

    @property
    def read_as(self) -> TokenRoute:
        """The guard's route for the path."""
        found = TOKEN_ROUTES.get(self.path) or proxied_route(self.path)
        assert found is not None
        return found

    @property
    def cors(self) -> bool:
        """Whether its answers carry CORS headers: those to homeservers do not."""
        return self.path in TOKEN_ROUTES

    def url(self, sandbox: Sandbox) -> str:
        """Where the route is served."""
        return (sandbox.url if self.cors else sandbox.appservice_url) + self.path


OPENID = '"openid_token":{"access_token":"t","token_type":"Bearer","matrix_server_name":"sandbox.local","expires_in":9}'
MEMBER = '"member":{"id":"m","claimed_user_id":"@a:sandbox.local","claimed_device_id":"D"}'
APP_SERVICE = {"Authorization": "Bearer hs", "X-Matrix-User-Identifier": "@a:sandbox.local"}
CLIENT, FEDERATION = (
    f"/_matrix/{api}/unstable/io.element.msc4195/rtc/livekit/get_token" for api in ("client", "federation")
)
ROUTES = {
    "legacy": Route("/sfu/get", "room", LEGACY_BODY, f'"device_id":"D",{OPENID}', {}),
    "new": Route("/get_token", "room_id", BODY, f'"slot_id":"m.call#ROOM",{MEMBER},{OPENID}', {}),
    "new body on the legacy route": Route(
        "/sfu/get", "room_id", BODY, f'"slot_id":"m.call#ROOM",{MEMBER},{OPENID}', {}
    ),
    "app service, client": Route(
        CLIENT, "room_id", CLIENT_BODY, '"slot_id":"m.call#ROOM","member_id":"m","url":"x"', APP_SERVICE
    ),
    "app service, federation": Route(
        FEDERATION, "room_id", FEDERATION_BODY, '"slot_id":"m.call#ROOM","member_id":"m","user_id":"@a:b","url":"x"',
        APP_SERVICE | {"X-Matrix-Origin": "b"},
    ),
}  # fmt: skip


@pytest_twisted.async_yield_fixture
async def sandbox(start_sandbox: StartSandbox) -> AsyncIterator[Sandbox]:
    """A sandbox with an app-service listener. It accepts bodies of a megabyte, so that none is refused for its size."""
    yield await start_sandbox(guard_reconcile_interval=3600, guard_appservice_port=0, guard_max_body=1 << 20)


PATTERNS: dict[str, tuple[str, str]] = {
    # name: the text where KEY is the room's key and REST all the other keys, and the room that a lax reader sees
    "a duplicate": (f'{{"KEY":"{OPEN}","KEY":"{FULL}",REST}}', FULL),
    "a duplicate behind the rest": (f'{{"KEY":"{OPEN}",REST,"KEY":"{FULL}"}}', FULL),
    "a duplicate that an escape hides": (f'{{"KEY":"{OPEN}","\\u0072KEY1":"{FULL}",REST}}', FULL),
    "a duplicate of null": (f'{{"KEY":"{FULL}","KEY":null,REST}}', FULL),
    "capitals": (f'{{"KEY":"{OPEN}","UPPER":"{FULL}",REST}}', FULL),
    "capitals alone": (f'{{"UPPER":"{FULL}",REST}}', FULL),
    "one capital": (f'{{"KEY":"{OPEN}","CAPITAL":"{FULL}",REST}}', FULL),
    "capitals that an escape hides": (f'{{"KEY":"{OPEN}","\\u0052KEY1":"{FULL}",REST}}', FULL),
    "something behind it": (f'{{"KEY":"{FULL}",REST}} x', FULL),
    "another object behind it": (f'{{"KEY":"{FULL}",REST}}{{"KEY":"{OPEN}",REST}}', FULL),
    "another object on the next line": (f'{{"KEY":"{FULL}",REST}}\n{{"KEY":"{OPEN}",REST}}\n', FULL),
    "NUL behind it": (f'{{"KEY":"{FULL}",REST}}\0', FULL),
    "a lone surrogate": ('{"KEY":"!\\ud800:sandbox.local",REST}', f"!{REPLACED}:sandbox.local"),
    "a pair of surrogates the wrong way round": ('{"KEY":"!\\udc00\\ud800",REST}', f"!{REPLACED}{REPLACED}"),
    "bytes that are no UTF-8": ('{"KEY":"!\udcff:sandbox.local",REST}', f"!{REPLACED}:sandbox.local"),
    "an overlong slash": ('{"KEY":"!\udcc0\udcaf",REST}', f"!{REPLACED}{REPLACED}"),
    "UTF-8's surrogates": ('{"KEY":"!\udced\udca0\udc80",REST}', f"!{REPLACED}{REPLACED}{REPLACED}"),
}
"""Bodies that a lax parser accepts."""
REFUSED_BY_ALL: dict[str, str] = {
    "nothing": "",
    "space": " ",
    "a list": f'[{{"KEY":"{OPEN}",REST}}]',
    "a string": f'"{OPEN}"',
    "a number": "7",
    "no JSON": "room=!open",
    "cut off": f'{{"KEY":"{OPEN}"',
    "single quotes": f"{{'KEY':'{OPEN}',REST}}",
    "a comment": f'{{"KEY":"{OPEN}",/**/REST}}',
    "a trailing comma": f'{{"KEY":"{OPEN}",REST,}}',
    "a byte order mark": f'\ufeff{{"KEY":"{OPEN}",REST}}',
    "UTF-16": f'\udcff\udcfe{{\0"\0K\0"\0:\0"\0{OPEN}',
    "NaN": f'{{"KEY":"{OPEN}","x":NaN,REST}}',
    "minus Infinity": f'{{"KEY":"{OPEN}","x":-Infinity,REST}}',
    "a room that is a number": '{"KEY":7,REST}',
    "a room that is a list": f'{{"KEY":["{OPEN}"],REST}}',
    "a room that is an object": f'{{"KEY":{{"a":"{OPEN}"}},REST}}',
    "a room that is true": '{"KEY":true,REST}',
    "a room that is false": '{"KEY":false,REST}',
    "a line end in a string": f'{{"KEY":"{OPEN}\n",REST}}',
    "lists a hundred thousand deep": '{"KEY":"!x","x":' + "[" * 100_000,
    "objects a hundred thousand deep": '{"x":' * 100_000 + "1" + "}" * 100_000,
    "a number of a million digits": '{"KEY":"!x","expires_in":' + "9" * 500_000 + ",REST}",
}


def written(pattern: str, route: Route) -> bytes:
    """The bytes of a pattern for a route; a lone ``\\udcXX`` is the raw byte XX."""
    key = route.room_key
    for name, text in (
        ("KEY1", key[1:]),
        ("KEY", key),
        ("UPPER", key.upper()),
        ("CAPITAL", key[:-1] + key[-1].upper()),
        ("REST", route.rest),
    ):
        pattern = pattern.replace(name, text)
    return pattern.encode("utf-8", "surrogateescape")


OTHER_KEYS = (
    # name, what follows a proper body, the key under which a lax parser finds it, and the value
    ("a long s", '"\u017flot_id":"other"', "slot_id", "other"),
    ("a second slot", '"slot_id":"other"', "slot_id", "other"),
    ("a slot in capitals", '"SLOT_ID":"other"', "slot_id", "other"),
    ("a Kelvin sign", '"openid_to\u212aen":{"acce\u017f\u017f_to\u212aen":"z"}', "openid_token.access_token", "z"),
    ("a second token that merges", '"openid_token":{"access_token":"z"}', "openid_token.access_token", "z"),
    ("a second member that merges", '"member":{"claimed_user_id":"@b:x"}', "member.claimed_user_id", "@b:x"),
    ("a member in capitals", '"Member":{"Claimed_User_Id":"@b:x"}', "member.claimed_user_id", "@b:x"),
    ("a second user", '"USER_ID":"@b:b"', "user_id", "@b:b"),
    ("a second device", '"DEVICE_ID":"E"', "device_id", "E"),
    ("a second member id", '"member_ID":"n"', "member_id", "n"),
)  # fmt: skip


def hidden_elsewhere(route: Route) -> dict[str, tuple[bytes, list[str], str]]:
    """Bodies that are ambiguous in another key than the room's, if the route has that key."""
    proper = f'{{"{route.room_key}":"{OPEN}",{route.rest},'
    return {
        name: ((proper + added + "}").encode(), path.split("."), found)
        for name, added, path, found in OTHER_KEYS
        if path.split(".")[0] in route.schema
    }


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_ambiguous_bodies_are_unreadable(route: Route) -> None:
    for name, (pattern, room) in PATTERNS.items():
        body = written(pattern, route)
        assert (name, decode(body, route.schema)[route.room_key]) == (name, room)
        unreadable(name, route, body)
    for name, (body, path, found) in hidden_elsewhere(route).items():
        read: Any = decode(body, route.schema)
        for key in path:
            read = read[key]
        assert (name, read) == (name, found)
        unreadable(name, route, body)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_bodies_that_are_not_requests_are_unreadable_for_guard_and_upstream(route: Route) -> None:
    for name, pattern in REFUSED_BY_ALL.items():
        body = written(pattern, route)
        with pytest.raises(NotDecodable):
            decode(body, route.schema)
        unreadable(name, route, body)


def unreadable(name: str, route: Route, body: bytes) -> None:
    with pytest.raises(Unreadable) as refusal:
        read_request(route.read_as, body)
    assert not any(room in str(refusal.value) for room in (OPEN, FULL)), f"{name} is quoted"


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest_twisted.ensureDeferred
async def test_unreadable_body_gets_the_400_of_upstream_and_is_not_forwarded(sandbox: Sandbox, route: Route) -> None:
    bodies = {name: written(pattern, route) for name, (pattern, _) in PATTERNS.items()}
    bodies |= {name: written(pattern, route) for name, pattern in REFUSED_BY_ALL.items()}
    bodies |= {name: body for name, (body, _, _) in hidden_elsewhere(route).items()}
    for name, body in bodies.items():
        answer = await sandbox.request("POST", route.url(sandbox), body, route.headers)
        content = {"errcode": "M_NOT_JSON", "error": "Error reading request"}
        assert (name, answer.code, json.loads(answer.body)) == (name, 400, content)
        allowed = answer.headers.getRawHeaders("access-control-allow-origin")
        assert (name, allowed) == (name, ["*"] if route.cors else None)
        assert answer.headers.getRawHeaders("content-type") == ["application/json"]
    assert [asked for asked in sandbox.upstream.seen if asked.method == "POST"] == []
    assert [asked for asked in sandbox.homeserver.seen if b"open" in asked.target or b"full" in asked.target] == []


@pytest_twisted.ensureDeferred
async def test_body_with_keys_of_both_routes_is_refused(sandbox: Sandbox) -> None:
    """``/sfu/get`` accepts either body; which of the two rooms counts depends on upstream's release."""
    body = f'{{"room":"{OPEN}","device_id":"D","room_id":"{FULL}","slot_id":"s",{MEMBER},{OPENID}}}'.encode()
    answer = await sandbox.request("POST", sandbox.url + "/sfu/get", body)
    assert (answer.code, json.loads(answer.body)["errcode"]) == (400, "M_NOT_JSON")
    assert list(sandbox.upstream.seen) == []


@pytest_twisted.ensureDeferred
async def test_duplicate_user_header_is_refused(sandbox: Sandbox) -> None:
    from tests.raw_http import exchange

    body = b'{"room_id":"!r:x","slot_id":"s","member_id":"m"}'
    head = f"POST {CLIENT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    twice = "X-Matrix-User-Identifier: @a:x\r\nX-Matrix-User-Identifier: @b:x\r\n\r\n"
    (answer,) = await exchange(sandbox.appservice_url, (head + twice).encode() + body)
    assert (answer.code, answer.json()["errcode"]) == (400, "M_NOT_JSON")
    assert list(sandbox.upstream.seen) == []


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest_twisted.ensureDeferred
async def test_forwarded_body_is_serialised_anew_and_read_alike_by_a_lax_parser(
    start_sandbox: StartSandbox, route: Route
) -> None:
    """Odd but unambiguous bodies: upstream reads from our serialisation what we read."""
    rooms = ("!a:b", "!\U0001f600:b", "!\u2028<>&:b", '!"\\/:b', "!\x7f\u0000:b", "!ſK:b", "!" + "x" * 254)
    async with recorder() as upstream:
        sandbox = await start_sandbox(
            guard_upstream=upstream.url,
            guard_reconcile_interval=3600,
            guard_appservice_port=0,
            guard_members_only="off",
        )
        for room in rooms:
            for ascii_only in (True, False):
                value = json.dumps(room, ensure_ascii=ascii_only)
                text = f' \r\n\t{{ "{route.room_key}" :{value} , {route.rest}}} \n'
                await sandbox.request("POST", route.url(sandbox), text.encode(), route.headers)
                forwarded = upstream.requests[-1].partition(b"\r\n\r\n")[2]
                assert forwarded != text.encode()
                assert decode(forwarded, route.schema) == decode(text.encode(), route.schema)
                assert decode(forwarded, route.schema)[route.room_key] == room
        assert len(upstream.requests) == 2 * len(rooms)


@pytest_twisted.ensureDeferred
async def test_unknown_keys_are_forwarded(sandbox: Sandbox) -> None:
    body = f'{{"room":"{OPEN}","device_id":"D",{OPENID},"what":{{"nested":[1.5,null,true]}}}}'.encode()
    answer = await sandbox.request("POST", sandbox.url + "/sfu/get", body)
    assert answer.code == 400
    (asked,) = sandbox.upstream.seen
    assert json.loads(asked.body) == json.loads(body)
