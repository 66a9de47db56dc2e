# SPDX-License-Identifier: Apache-2.0
"""The stand-ins that all other tests rely on, compared with the real services."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from attrs import frozen

from tests.real.conftest import RunStack
from tests.real.processes import HttpAnswer, Program, free_port, http
from tests.real.services import CHECKOUT, KEY, SECRET
from tests.real.stack import Stack, claims_of


@frozen
class StandIns:
    """Their URLs."""

    upstream_url: str
    sfu_url: str


@pytest.fixture(scope="module")
def stand_ins(dependencies: Stack) -> Iterator[StandIns]:
    ports = free_port(), free_port()
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    about = [dependencies.sfu_url, dependencies.server_name, dependencies.homeserver_url]
    program = Program(
        "the stand-ins",
        [sys.executable, "-m", "tests.real.standins", KEY, SECRET, *map(str, ports), *about],
        {"PYTHONPATH": str(CHECKOUT)},
        dependencies.place / "standins.log",
        f"{urls[0]}/healthz",
    )
    program.start()
    yield StandIns(*urls)
    program.stop()


def comparable(answer: HttpAnswer) -> tuple[int, dict[str, str], Any]:
    """An answer without what depends on the time."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("Date", "Content-Length")}
    body: Any = answer.body
    if answer.status == 200 and answer.body.startswith(b"{"):
        body = answer.content
        if "jwt" in body:
            claims = claims_of(answer)
            body["jwt"] = {**claims, "exp": claims["exp"] - claims["nbf"], "nbf": 0, "iat": 0}
    return answer.status, headers, body


OPENID = '"openid_token":{"access_token":"%s","token_type":"Bearer","matrix_server_name":"%s","expires_in":3600}'
MEMBER = '"member":{"id":"member","claimed_user_id":"%s","claimed_device_id":"PHONE"}'
LEGACY = [
    '{"room":"!r:x","device_id":"PHONE",OPENID}',
    '{"room":"!r:x","device_id":"",OPENID}',
    '{"room":"!r:x",OPENID}',
    '{"room":"!r:x","device_id":null,OPENID}',
    '{"ROOM":"!r:x","device_id":"PHONE",OPENID}',
    '{"room":"!a","room":"!b","device_id":"PHONE",OPENID}',
    '{"room":"!a","ROOM":"!b","device_id":"PHONE",OPENID}',
    '{"room":"!a","ROOM":null,"device_id":"PHONE",OPENID}',
    '{"room":"!r\\ud800","device_id":"PHONE",OPENID}',
    '{"room":"!<>&\\u2028","device_id":"PHONE",OPENID}',
    '{"room":"!r","device_id":"PHONE",OPENID} {"room":',
    '{"room":"!r","device_id":"PHONE",OPENID,"openid_token":{}}',
    '{"room":"!r","device_id":"PHONE",OPENID,"openid_token":{"access_token":"nobodys"}}',
    '{"room":"!r","device_id":"PHONE",OPENID,"openid_token":{"expires_in":"soon"}}',
    '{"room":"!r","device_id":"PHONE",OPENID,"openid_token":{"expires_in":1.5}}',
    '{"room":"!r","device_id":"PHONE",OPENID,"openid_token":null}',
    '{"room":"!r","device_id":"PHONE",OPENID,"more":1}',
    '{"room":7,"device_id":"PHONE",OPENID}',
    '{"room":"","device_id":"PHONE",OPENID}',
    '{"device_id":"PHONE",OPENID}',
    '{"room":"!r","device_id":"PHONE"}',
    '{"room":"!r","device_id":"PHONE",OPENID,"delay_id":"d"}',
    '{"room":"!r","device_id":"PHONE",OPENID,"delay_id":"d","delay_timeout":"1","delay_cs_api_url":"http://h"}',
    "{}", "[]", "null", "", "{", '"x"', "\ufeff{}", "NaN",
]  # fmt: skip
NEW = [
    '{"room_id":"!r:x","slot_id":"m.call#ROOM",OPENID,MEMBER}',
    '{"room_id":"!r:x","slot_id":"another<&>",OPENID,MEMBER}',
    '{"room_id":"!r:x","slot_id":"",OPENID,MEMBER}',
    '{"room_id":"!r:x",OPENID,MEMBER}',
    '{"slot_id":"m.call#ROOM",OPENID,MEMBER}',
    '{"room_id":"!r:x","slot_id":"m.call#ROOM",OPENID}',
    '{"room_id":"!r:x","slot_id":"m.call#ROOM",OPENID,"member":{}}',
    '{"room_id":"!r:x","\u017flot_id":"m.call#ROOM",OPENID,MEMBER}',
    '{"room_id":"!r:x","slot_id":"m.call#ROOM",OPENID,MEMBER,"member":{"claimed_user_id":"@another:x"}}',
    '{"room_id":"!r:x","slot_id":"m.call#ROOM",OPENID,MEMBER,"member":{"claimed_device_id":""}}',
    '{"room":"!r:x","device_id":"PHONE",OPENID}',
    "{}", "[1]", "null", "",
]  # fmt: skip
PATHS = [
    "/", "/sfu/get", "/sfu/%67et", "/sfu/get/", "//sfu/get", "/sfu//get", "/sfu/./get", "/x/../sfu/get", "/SFU/get",
    "/sfu/get?room=x", "/sfu%2fget", "/get_token", "/healthz", "/healthz/", "/sfu_webhook", "/delegate_delayed_leave",
    "/nothing", "/%zz",
]  # fmt: skip


@pytest.fixture
def same_release(run_stack: RunStack) -> Stack:
    """The stack, if its lk-jwt-service is the release that the stand-in imitates."""
    stack = run_stack()
    if not stack.delegates:
        pytest.skip("this lk-jwt-service is older than the one that the stand-in imitates")
    return stack


@pytest.mark.parametrize(("path", "bodies"), [("/sfu/get", LEGACY), ("/get_token", NEW)])
def test_lk_jwt_service_reads_bodies_alike(
    same_release: Stack, stand_ins: StandIns, path: str, bodies: list[str]
) -> None:
    (alice,) = same_release.users("alice")
    token = same_release.openid_token(alice)["access_token"]
    for body in bodies:
        filled = (
            body.replace("OPENID", OPENID % (token, same_release.server_name))
            .replace("MEMBER", MEMBER % alice)
            .encode()
        )
        real, ours = (
            comparable(http("POST", url + path, filled)) for url in (same_release.upstream_url, stand_ins.upstream_url)
        )
        assert ours == real, body


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS"])
def test_lk_jwt_service_routes_alike(same_release: Stack, stand_ins: StandIns, method: str) -> None:
    for path in PATHS:
        real, ours = (
            comparable(http(method, url + path, b"")) for url in (same_release.upstream_url, stand_ins.upstream_url)
        )
        assert ours == real, path


ROOM_SERVICE = [
    ("ListRooms", {}, {"roomAdmin": True}),
    ("ListRooms", {"names": ["nowhere"]}, {"roomList": True}),
    ("ListParticipants", {"room": "nowhere"}, {"roomAdmin": True, "room": "nowhere"}),
    ("ListParticipants", {"room": "nowhere"}, {"roomAdmin": True, "room": "another"}),
    ("ListParticipants", {"room": "nowhere"}, {"roomList": True}),
    ("GetParticipant", {"room": "nowhere", "identity": "nobody"}, {"roomAdmin": True, "room": "nowhere"}),
    ("RemoveParticipant", {"room": "nowhere", "identity": "nobody"}, {"roomAdmin": True, "room": "nowhere"}),
    ("UpdateParticipant", {"room": "nowhere", "identity": "nobody"}, {"roomAdmin": True, "room": "nowhere"}),
    ("UpdateParticipant", {"room": "nowhere", "identity": "nobody", "permission": {}},
     {"roomAdmin": True, "room": "nowhere"}),
    ("ListParticipants", b"{", {"roomAdmin": True, "room": ""}),
]  # fmt: skip


def test_livekit_answers_room_service_alike(run_stack: RunStack, stand_ins: StandIns) -> None:
    stack = run_stack()
    for method, content, grant in ROOM_SERVICE:
        token = stack.sfu_token(**grant)  # type: ignore[arg-type]
        real, ours = (
            http("POST", f"{url}/twirp/livekit.RoomService/{method}", content, bearer=token)
            for url in (stack.sfu_url, stand_ins.sfu_url)
        )
        assert (ours.status, ours.content) == (real.status, real.content), (method, content, grant)
