# SPDX-License-Identifier: Apache-2.0
"""The stand-in authorizer before the other stand-ins. Routing and refusals were compared with the Go program."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
import pytest_twisted
import treq
from twisted.internet import reactor as twisted_reactor
from twisted.internet.threads import deferToThread
from twisted.web.client import Agent

from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.lk_jwt_service.records import OtherSfu
from lotusguard.sandbox.lk_jwt_service.requests import hashed_identity, room_alias
from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService
from lotusguard.sandbox.synapse.homeserver import FakeSynapse

reactor: Any = twisted_reactor
KEY, SECRET = "sandbox", "a secret of some thirty-two bytes"
ALICE = "@alice:sandbox.local"
ALIAS = "TK4o8wNCXi5t5936bOvIzE/X3XFc7cgp3jGRDqK0j5E"
ROOM = "!room:example.org"


@asynccontextmanager
async def world(**options: Any) -> AsyncIterator[SimpleNamespace]:
    synapse = FakeSynapse(reactor)
    sfu = FakeLiveKit(reactor, key=KEY, secret=SECRET)
    await synapse.start()
    await sfu.start()
    options = {"homeservers": {"sandbox.local": synapse.url}, "sfu_url": sfu.url} | options
    authorizer = FakeLkJwtService(reactor, key=KEY, secret=SECRET, **options)
    await authorizer.start()
    try:
        yield SimpleNamespace(synapse=synapse, sfu=sfu, authorizer=authorizer)
    finally:
        for standin in (authorizer, sfu, synapse):
            await standin.stop()


async def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await treq.post(url, data=raw, headers=headers or {}, allow_redirects=False)  # type: ignore[arg-type]
    text = await treq.content(response)
    return response.code, json.loads(text) if text else None


def legacy_body(here: SimpleNamespace, **more: Any) -> dict[str, Any]:
    token = here.synapse.openid_token(ALICE)
    return {"room": ROOM, "openid_token": token, "device_id": "DEVICE"} | more


def new_body(here: SimpleNamespace, **more: Any) -> dict[str, Any]:
    member = {"id": "xyz", "claimed_user_id": ALICE, "claimed_device_id": "DEVICE"}
    token = here.synapse.openid_token(ALICE)
    return {"room_id": ROOM, "slot_id": "m.call#ROOM", "openid_token": token, "member": member} | more


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ((ROOM, "m.call#ROOM"), ALIAS),
        (("!roomid:example.com", "slot1234"), "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"),
    ],
)
def test_aliases(parts: tuple[str, str], name: str) -> None:
    assert room_alias(*parts) == name


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (["@alice:example.org", "DEVICE", "xyz"], "YrxuWaR+gvn98aOWeDBbgKTPaUDOGxY5XI3xcFmNN/A"),
        (["@alice:example.org", "xyz"], "cWKchGjQ+6aHLd6XrrpvvOEAigkd9+u/DaNp2oY8jNg"),
    ],
)
def test_hashed_identities(parts: list[str], name: str) -> None:
    assert hashed_identity(parts) == name


def test_older_releases_joined_with_pipes_or_took_the_room_id() -> None:
    assert room_alias(ROOM, "s", "0.3.0") == ROOM
    assert room_alias("a", "b|c", "0.4.2") == room_alias("a|b", "c", "0.4.2")
    assert room_alias("a", "b|c") != room_alias("a|b", "c")


@pytest_twisted.ensureDeferred
async def test_a_legacy_token_has_go_s_claims_and_its_room_is_open() -> None:
    async with world() as here:
        code, answer = await post(here.authorizer.url + "/sfu/get", legacy_body(here))
        assert code == 200
        assert answer["url"].startswith("ws://127.0.0.1:")
        claims = jwt.decode(answer["jwt"], SECRET, ["HS256"])
        assert claims["exp"] - claims["nbf"] == 3600
        assert claims | {"exp": 0, "nbf": 0, "iat": 0} == {
            "iss": KEY,
            "sub": f"{ALICE}:DEVICE",
            "identity": f"{ALICE}:DEVICE",
            "video": {
                "roomJoin": True,
                "room": ALIAS,
                "canPublish": True,
                "canSubscribe": True,
                "canUpdateOwnMetadata": True,
            },
            "exp": 0,
            "nbf": 0,
            "iat": 0,
        }
        assert here.sfu.rooms[ALIAS].settings.departure_timeout == 20
        issued = here.authorizer.issued[-1]
        assert (issued.route, issued.room, issued.alias, issued.user) == ("sfu_get", ROOM, ALIAS, ALICE)


@pytest_twisted.ensureDeferred
async def test_a_new_token_names_nobody() -> None:
    async with world() as here:
        code, answer = await post(here.authorizer.url + "/get_token", new_body(here))
        assert code == 200
        identity = here.sfu.connect(answer["jwt"]).identity
        assert identity == hashed_identity([ALICE, "DEVICE", "xyz"])


@pytest_twisted.ensureDeferred
async def test_the_last_of_two_rooms_is_the_one_that_counts() -> None:
    async with world() as here:
        body = json.dumps(legacy_body(here, room="!open"))[:-1] + ',"ROOM":"!full"} trailing'
        code, _ = await post(here.authorizer.url + "/sfu/get", body.encode())
        assert (code, here.authorizer.issued[-1].room) == (200, "!full")


UNAUTHORISED = (401, {"errcode": "M_UNAUTHORIZED", "error": "The request could not be authorised."})


@pytest_twisted.ensureDeferred
async def test_openid_tokens_are_verified_at_the_homeserver_they_name() -> None:
    async with world() as here:
        url = here.authorizer.url + "/sfu/get"
        token = here.synapse.openid_token(ALICE)
        for wrong in (
            {"access_token": "nonsense"},
            {"matrix_server_name": "elsewhere.example"},
        ):
            assert await post(url, legacy_body(here, openid_token=token | wrong)) == UNAUTHORISED
        member = {"id": "x", "claimed_user_id": "@bob:sandbox.local", "claimed_device_id": "D"}
        url = here.authorizer.url + "/get_token"
        assert await post(url, new_body(here, member=member)) == UNAUTHORISED
        # A server that vouches for users of another one.
        here.authorizer.homeservers["evil.example"] = here.synapse.url
        lying = here.synapse.openid_token(ALICE) | {"matrix_server_name": "evil.example"}
        assert await post(here.authorizer.url + "/sfu/get", legacy_body(here, openid_token=lying)) == UNAUTHORISED
        for fault in (Fault.status(500), Fault.invalid_response(), Fault.wrong_types(), Fault.close()):
            here.synapse.fault = fault
            assert await post(here.authorizer.url + "/sfu/get", legacy_body(here)) == UNAUTHORISED


@pytest_twisted.ensureDeferred
async def test_a_new_delayed_leave_job_replaces_the_older_one() -> None:
    async with world() as here:
        for delay_id in ("first", "second"):
            body = legacy_body(here, delay_id=delay_id, delay_timeout=8000)
            assert (await post(here.authorizer.url + "/sfu/get", body))[0] == 200
        assert here.authorizer.jobs[ALIAS, f"{ALICE}:DEVICE"].delay_id == "second"
        assert [job.delay_id for job in here.authorizer.replaced] == ["first"]


@pytest_twisted.ensureDeferred
async def test_delegation_answers_an_empty_object() -> None:
    async with world() as here:
        url = here.authorizer.url + "/delegate_delayed_leave"
        body = new_body(here)
        assert (await post(url, body))[1]["error"] == "The request body is missing `delay_id` or `delay_timeout`"
        assert await post(url, new_body(here, delay_id="d", delay_timeout=5)) == (200, {})
        assert len(here.authorizer.jobs) == 1
        assert not here.authorizer.issued


@pytest_twisted.ensureDeferred
async def test_users_of_other_homeservers_open_no_room_and_delegate_nothing() -> None:
    async with world(full_access=["other.example"]) as here:
        assert (await post(here.authorizer.url + "/sfu/get", legacy_body(here)))[0] == 200
        assert not here.sfu.rooms
        body = legacy_body(here, delay_id="d", delay_timeout=5)
        assert (await post(here.authorizer.url + "/sfu/get", body))[0] == 400
        body = new_body(here, delay_id="d", delay_timeout=5)
        assert (await post(here.authorizer.url + "/delegate_delayed_leave", body))[0] == 403


@pytest_twisted.ensureDeferred
async def test_without_the_sfu_there_is_no_token() -> None:
    async with world() as here:
        here.sfu.faults["CreateRoom"] = Fault.status(500)
        answer = await post(here.authorizer.url + "/sfu/get", legacy_body(here))
        assert answer == (500, {"errcode": "M_UNKNOWN", "error": "Unable to create room on SFU"})
        assert not here.authorizer.issued


def raw_request(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


@pytest.mark.parametrize(
    ("target", "status", "location"),
    [
        ("/sfu/get", 400, None),
        ("/sfu/%67et", 400, None),
        ("/sfu/get?x=%zz", 400, None),
        ("http://elsewhere/sfu/get", 400, None),
        ("/sfu%2Fget", 404, None),
        ("/SFU/get", 404, None),
        ("/sfu/get/", 404, None),
        ("/sfu/get%20", 404, None),
        ("/sfu/get;a", 404, None),
        ("//sfu/get?x=1", 307, "/sfu/get?x=1"),
        ("/x/../sfu/./get", 307, "/sfu/get"),
        ("//sfu/%67et", 307, "/sfu/%2567et"),
        ("/sfu/get%", 400, None),
    ],
)
@pytest_twisted.ensureDeferred
async def test_routing_is_that_of_go(target: str, status: int, location: str | None) -> None:
    async with world() as here:
        request = f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
        answer = await deferToThread(raw_request, here.authorizer.port, request.encode())
        head, _, body = answer.decode().partition("\r\n\r\n")
        assert head.split()[1] == str(status)
        assert (f"\r\nLocation: {location}\r\n" in head + "\r\n") == (location is not None)
        assert (body == '{"errcode":"M_BAD_JSON","error":"Missing room parameter"}\n') == (
            here.authorizer.asked["sfu_get"] == 1
        )


@pytest_twisted.ensureDeferred
async def test_every_method_has_the_four_headers_on_json_routes_and_no_other() -> None:
    async with world() as here:
        for path, method, status in (
            ("/sfu/get", b"OPTIONS", 200),
            ("/get_token", b"GET", 405),
            ("/delegate_delayed_leave", b"POST", 400),
            ("/healthz", b"GET", 200),
            ("/healthz", b"POST", 405),
            ("/sfu_webhook", b"PUT", 200),
            ("/nowhere", b"OPTIONS", 404),
        ):
            response = await Agent(reactor).request(method, (here.authorizer.url + path).encode())
            await treq.content(response)
            assert response.code == status
            cors = [name for name in response.headers.getAllRawHeaders() if b"Access-Control" in name[0]]
            assert len(cors) == (3 if path in ("/sfu/get", "/get_token", "/delegate_delayed_leave") else 0)


CLIENT = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token"


@pytest.mark.parametrize("version", ["unstable/io.element.msc4195", "v1"])
@pytest_twisted.ensureDeferred
async def test_app_service_routes_answer_with_a_token_alone(version: str) -> None:
    client, federation = (f"/_matrix/{api}/{version}/rtc/livekit/get_token" for api in ("client", "federation"))
    async with world(hs_token="hs") as here:
        body = {"url": "wss://sfu", "room_id": ROOM, "slot_id": "m.call#ROOM", "member_id": "xyz"}
        asking = {"Authorization": "Bearer hs", "X-Matrix-User-Identifier": ALICE}
        code, answer = await post(here.authorizer.url + client, body, asking)
        assert (code, list(answer)) == (200, ["jwt"])
        assert here.authorizer.issued[-1].identity == hashed_identity([ALICE, "xyz"])
        asking = {"Authorization": "Bearer hs", "X-Matrix-Origin": "sandbox.local"}
        code, answer = await post(here.authorizer.url + federation, body | {"user_id": ALICE}, asking)
        assert (code, list(answer)) == (200, ["jwt"])
        asking = {"Authorization": "Bearer hs", "X-Matrix-Origin": "evil.example"}
        assert (await post(here.authorizer.url + federation, body | {"user_id": ALICE}, asking))[0] == 401
        assert (await post(here.authorizer.url + client, body))[0] == 401
        assert (await post(here.authorizer.url + "/sfu/get", new_body(here)))[0] == 200
        here.authorizer.is_member = lambda room, user: False
        asking = {"Authorization": "Bearer hs", "X-Matrix-User-Identifier": ALICE}
        assert (await post(here.authorizer.url + client, body, asking))[0] == 403


@pytest_twisted.ensureDeferred
async def test_without_that_mode_there_are_no_such_routes() -> None:
    async with world() as here:
        response = await treq.post(here.authorizer.url + CLIENT, data=b"{}")
        assert await treq.content(response) == b"404 page not found\n"
        assert (await post(here.authorizer.url + "/sfu/get", new_body(here)))[0] == 400


@pytest_twisted.ensureDeferred
async def test_older_releases_took_the_new_body_on_the_old_route() -> None:
    async with world(naming="0.4.2") as here:
        assert (await post(here.authorizer.url + "/sfu/get", new_body(here)))[0] == 200
        assert (await post(here.authorizer.url + "/sfu/get", legacy_body(here)))[0] == 200
        assert {issued.alias for issued in here.authorizer.issued} == {room_alias(ROOM, "m.call#ROOM", "0.4.2")}


@pytest_twisted.ensureDeferred
async def test_webhooks_are_answered_200_whatever_they_are_and_kept_as_they_came() -> None:
    async with world() as here:
        body = b'{"event":"room_started"}'
        good = {"Authorization": here.sfu.webhooks.authorization(body)}
        for headers, verified in ((good, True), ({"Authorization": "nonsense"}, False), ({}, False)):
            assert await post(here.authorizer.url + "/sfu_webhook", body, headers) == (200, None)
            assert here.authorizer.webhooks[-1].verified is verified
            assert here.authorizer.webhooks[-1].body == body


@pytest_twisted.ensureDeferred
async def test_extra_claims_are_put_over_the_usual_ones() -> None:
    extra = {"name": "Alice", "iat": 4102444800, "video": {"canPublishSources": ["camera"]}}
    async with world(extra_claims=extra) as here:
        _, answer = await post(here.authorizer.url + "/sfu/get", legacy_body(here))
        claims = jwt.decode(answer["jwt"], options={"verify_signature": False})
        assert (claims["name"], claims["iat"]) == ("Alice", 4102444800)
        assert claims["video"]["canPublishSources"] == ["camera"]
        assert claims["video"]["room"] == ALIAS


@pytest_twisted.ensureDeferred
async def test_a_caller_may_choose_another_sfu_by_url_or_server_name() -> None:
    other = OtherSfu("wss://sfu.other.example", "otherkey", "another-secret-of-thirty-two-bytes", "other.example")
    async with world(other_sfus=[other]) as here:
        for choice in ({"url": other.url}, {"server_name": other.server_name}):
            code, answer = await post(here.authorizer.url + "/get_token", new_body(here, **choice))
            assert (code, answer["url"]) == (200, other.url)
            claims = jwt.decode(answer["jwt"], other.secret, ["HS256"])
            assert (claims["iss"], claims["video"]["room"]) == (other.key, ALIAS)
            assert here.authorizer.issued[-1].sfu_url == other.url
        assert not here.sfu.rooms
        code, answer = await post(here.authorizer.url + "/get_token", new_body(here, url=here.authorizer.livekit_url))
        assert (code, answer["url"]) == (200, here.authorizer.livekit_url)
        assert list(here.sfu.rooms) == [ALIAS]


@pytest_twisted.ensureDeferred
async def test_app_service_callers_may_choose_another_sfu_too() -> None:
    other = OtherSfu("wss://sfu.other.example", "otherkey", "another-secret-of-thirty-two-bytes")
    async with world(hs_token="hs", other_sfus=[other]) as here:
        body = {"url": other.url, "room_id": ROOM, "slot_id": "m.call#ROOM", "member_id": "xyz"}
        asking = {"Authorization": "Bearer hs", "X-Matrix-User-Identifier": ALICE}
        code, answer = await post(here.authorizer.url + CLIENT, body, asking)
        assert (code, list(answer)) == (200, ["jwt"])
        assert jwt.decode(answer["jwt"], other.secret, ["HS256"])["sub"] == hashed_identity([ALICE, "xyz"])


@pytest_twisted.ensureDeferred
async def test_newer_releases_take_a_flat_member_id() -> None:
    other = OtherSfu("wss://sfu.other.example", "otherkey", "another-secret-of-thirty-two-bytes")
    async with world(other_sfus=[other]) as here:
        body = new_body(here, member_id="xyz")
        del body["member"]
        assert (await post(here.authorizer.url + "/get_token", body))[0] == 200
        assert here.authorizer.issued[-1].identity == hashed_identity([ALICE, "xyz"])
    async with world() as here:
        assert (await post(here.authorizer.url + "/get_token", new_body(here, member_id="xyz")))[0] == 400


@pytest_twisted.ensureDeferred
async def test_the_app_service_mode_can_be_switched_on_later() -> None:
    async with world() as here:
        here.authorizer.hs_token = "hs"
        assert (await post(here.authorizer.url + CLIENT, {}))[0] == 401
