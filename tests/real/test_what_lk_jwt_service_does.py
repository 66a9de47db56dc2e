# SPDX-License-Identifier: Apache-2.0
"""Facts about lk-jwt-service that the guard relies on; and that the guard answers alike."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.http import ConnectionPool, FixedAgent
from lotusguard.clients.lk_jwt_service import LkJwtService
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import ROOM_SLOT, room_alias
from tests.real.processes import HttpAnswer, http
from tests.real.stack import Stack, claims_of

CORS = {
    "Content-Type": "application/json",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST",
    "Access-Control-Allow-Headers": "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token",
}
TOKEN_ROUTES = ("/sfu/get", "/get_token")
JSON_ROUTES = (*TOKEN_ROUTES, "/delegate_delayed_leave")


def known_headers(answer: HttpAnswer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in ("Date", "Connection")}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("OPTIONS", path, 200) for path in JSON_ROUTES),
        *((method, path, 405) for path in JSON_ROUTES for method in ("GET", "PUT", "DELETE")),
        ("GET", "/healthz", 200),
        ("HEAD", "/healthz", 200),
        ("POST", "/healthz", 405),
        ("POST", "/sfu_webhook", 200),
        ("GET", "/", 404),
        ("GET", "/nothing?at=all", 404),
    ],
)
def test_answers_without_a_token_are_the_same_through_the_guard(
    stack: Stack, method: str, path: str, status: int
) -> None:
    straight = http(method, stack.upstream_url + path, b"")
    through = http(method, stack.guard_url + path, b"")
    assert (through.status, through.body) == (straight.status, straight.body)
    assert known_headers(through) == known_headers(straight)
    if not stack.delegates and path in ("/delegate_delayed_leave", "/sfu_webhook"):
        status = 404
    assert straight.status == status
    if path in JSON_ROUTES and status != 404:
        assert CORS.items() <= straight.headers.items()
    elif status == 404:
        assert straight.body == b"404 page not found\n"
        assert "Access-Control-Allow-Origin" not in straight.headers


@pytest.mark.parametrize(
    ("path", "change", "status", "errcode"),
    [
        *(
            (path, *case)
            for path in TOKEN_ROUTES
            for case in (
                ({"something": "else"}, 400, "M_NOT_JSON"),
                ({"openid_token": None}, 400, "M_BAD_JSON"),
                ({"room": None, "room_id": None}, 400, "M_BAD_JSON"),
                ({"delay_id": "only this"}, 400, "M_BAD_JSON"),
                ({"openid_token": "bad"}, 401, "M_UNAUTHORIZED"),
            )
        ),
        ("/get_token", {"member": "another's"}, 401, "M_UNAUTHORIZED"),
    ],
)
def test_refusals_are_the_same_through_the_guard(
    stack: Stack, path: str, change: dict[str, Any], status: int, errcode: str
) -> None:
    alice, bob = stack.users("alice", "bob")
    content = body_for(stack, alice, stack.room(5), path)
    if change == {"member": "another's"}:
        content["member"]["claimed_user_id"] = bob
    elif change == {"openid_token": "bad"}:
        content["openid_token"]["access_token"] = "nobodys"
    else:
        content.update(change)
        content = {name: value for name, value in content.items() if value is not None}
    straight, through = (http("POST", base + path, content) for base in (stack.upstream_url, stack.guard_url))
    if stack.delegates:
        assert (straight.status, straight.content["errcode"]) == (status, errcode)
    elif straight.status == 200:
        assert through.status == 200
        return
    assert (through.status, through.body, known_headers(through)) == (
        straight.status, straight.body, known_headers(straight),
    )  # fmt: skip


@pytest_twisted.ensureDeferred
async def test_the_guards_probe_recognises_it_and_nothing_else(stack: Stack) -> None:
    pool = ConnectionPool(reactor)

    async def probed(url: str) -> str:
        try:
            await LkJwtService(FixedAgent(reactor, url, pool), reactor, Metrics(), timeout=5, grace=0).probe()
        except DependencyFailed as failed:
            return failed.reason
        return "recognised"

    try:
        assert await probed(stack.upstream_url) == "recognised"
        assert await probed(stack.guard_url) == "loop"
        for url in (stack.sfu_url, stack.homeserver_url, stack.operators_url):
            assert await probed(url) == "not_lk_jwt_service"
    finally:
        await pool.close()


def test_a_trailing_slash_is_another_path_for_both(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    content = body_for(stack, alice, stack.room(5), "/sfu/get")
    straight, through = (http("POST", base + "/sfu/get/", content) for base in (stack.upstream_url, stack.guard_url))
    assert (straight.status, straight.body) == (404, b"404 page not found\n")
    assert (through.status, through.body) == (straight.status, straight.body)


def body_for(stack: Stack, user: str, room_id: str, path: str, *, member: bool = True) -> dict[str, Any]:
    """A complete token request.

    :param member: make the user a member of the room.
    """
    if member:
        stack.join(user, room_id)
    token = stack.openid_token(user)
    if path == "/sfu/get":
        return {"room": room_id, "openid_token": token, "device_id": "PHONE"}
    device = {"id": "member", "claimed_user_id": user, "claimed_device_id": "PHONE"}
    return {"room_id": room_id, "slot_id": ROOM_SLOT, "openid_token": token, "member": device}


@pytest.mark.parametrize(
    ("how", "meant"),
    [
        ('{"room":"!open","ROOM":"!full",%s}', "!full"),
        ('{"room":"!open","room":"!full",%s}', "!full"),
        ('{"room":"!full",%s} {"room":"!open"}', "!full"),
        ('{"room":"!full\\ud800",%s}', "!full\ufffd"),
        ('{"ROOM":"!full",%s}', "!full"),
        ('{"room":"!full","device_id":"A",%s}', "!full"),
    ],
)
def test_what_it_reads_in_two_ways_the_guard_does_not_let_through(stack: Stack, how: str, meant: str) -> None:
    (alice,) = stack.users("alice")
    rest = f'"openid_token":{json.dumps(stack.openid_token(alice))},"device_id":"PHONE"'
    body = (how % rest).encode()
    straight = http("POST", f"{stack.upstream_url}/sfu/get", body)
    assert straight.status == 200
    assert claims_of(straight)["video"]["room"] == room_alias(meant)
    through = http("POST", f"{stack.guard_url}/sfu/get", body)
    assert (through.status, through.content) == (400, {"errcode": "M_NOT_JSON", "error": "Error reading request"})
    assert CORS.items() <= through.headers.items()


def test_a_kelvin_sign_in_a_key_is_a_k(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    body = {"room": "!r", "device_id": "PHONE", "openid_to\u212aen": stack.openid_token(alice)}
    assert http("POST", f"{stack.upstream_url}/sfu/get", body).status == 200
    assert http("POST", f"{stack.guard_url}/sfu/get", body).status == 400


def test_an_escaped_path_is_the_same_route_and_has_the_same_limit(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    stack.enter(alice, room_id)
    content = body_for(stack, bob, room_id, "/sfu/get")
    for path in ("/sfu/%67et", "/sfu/get?x=/get_token"):
        assert http("POST", stack.upstream_url + path, content).status == 200
        assert http("POST", stack.guard_url + path, content).status == 403


def hashed(*parts: str) -> str:
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


@pytest.mark.parametrize("room_id", ["!plain:example.org", "!a<b>&c\u2028\u2029é:example.org", "!withoutaserver"])
def test_names_are_derived_as_the_guard_derives_them(stack: Stack, room_id: str) -> None:
    (alice,) = stack.users("alice")
    legacy, new = (
        claims_of(http("POST", stack.upstream_url + path, body_for(stack, alice, room_id, path, member=False)))
        for path in TOKEN_ROUTES
    )
    assert legacy["video"]["room"] == new["video"]["room"] == room_alias(room_id) == hashed(room_id, ROOM_SLOT)
    assert legacy["sub"] == f"{alice}:PHONE"
    assert new["sub"] == hashed(alice, "PHONE", "member")
    assert alice.count(":") == 2  # a server name with a port


def test_each_slot_is_an_sfu_room_and_all_share_the_limit(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    content = {**body_for(stack, alice, room_id, "/get_token"), "slot_id": "another"}
    answer = http("POST", f"{stack.guard_url}/get_token", content)
    assert claims_of(answer)["video"]["room"] == room_alias(room_id, "another")
    stack.connect(alice, answer.content["jwt"])
    assert stack.ask_token(bob, room_id).status == 403


def test_what_its_token_contains(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    claims = claims_of(stack.ask_token(alice, stack.room(), at=stack.upstream_url))
    assert claims.keys() >= {"iss", "sub", "exp", "nbf", "video"}
    assert claims["exp"] - claims["nbf"] >= 3600
    assert claims["video"].keys() >= {"roomJoin", "room", "canPublish", "canSubscribe"}
    assert "canPublishSources" not in claims["video"]


def test_it_creates_the_sfu_room_before_it_answers_and_checks_no_membership(stack: Stack) -> None:
    (alice,) = stack.users("alice")
    room_id = stack.room()
    assert stack.ask_token(alice, room_id, at=stack.upstream_url, member=False).status == 200
    (room,) = stack.sfu_call("ListRooms", {"names": [room_alias(room_id)]}).content["rooms"]
    assert room["empty_timeout"] == 300


def test_a_refused_request_creates_no_sfu_room(stack: Stack) -> None:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room(1)
    stack.enter(alice, room_id)
    refused = http(
        "POST", f"{stack.guard_url}/get_token", {**body_for(stack, bob, room_id, "/get_token"), "slot_id": "another"}
    )
    assert refused.status == 403
    assert stack.sfu_call("ListRooms", {"names": [room_alias(room_id, "another")]}).content["rooms"] == []
