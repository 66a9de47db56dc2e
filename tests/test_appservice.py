# SPDX-License-Identifier: Apache-2.0
"""Requests that a homeserver proxies: only on a listener of their own, because their headers carry no proof."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted

from lotusguard.clients.http import Answer
from lotusguard.config import ConfigurationError, read_settings
from lotusguard.sandbox.demo.sandbox import Sandbox
from tests.conftest import StartSandbox, until
from tests.raw_http import exchange, recorder

UNSTABLE = "/_matrix/{}/unstable/io.element.msc4195/rtc/livekit/get_token"
STABLE = "/_matrix/{}/v1/rtc/livekit/get_token"
PATHS = [path.format(api) for path in (UNSTABLE, STABLE) for api in ("client", "federation")]
USER = "@alice:sandbox.local"
BODY = {"room_id": "!r:sandbox.local", "slot_id": "m.call#ROOM", "member_id": "m", "url": "wss://x"}
HEADERS = {"Authorization": "Bearer hs", "X-Matrix-User-Identifier": USER, "X-Matrix-Origin": "sandbox.local"}


async def ask(
    sandbox: Sandbox,
    path: str,
    *,
    at: str | None = None,
    method: str = "POST",
    headers: dict[str, str] = HEADERS,
    **changes: Any,
) -> Answer:
    """A proxied token request at the app-service listener, or at another address."""
    body = json.dumps(BODY | {"user_id": USER} | changes).encode()
    return await sandbox.request(method, (at or sandbox.appservice_url) + path, body, headers)


def errcode(answer: Answer) -> tuple[int, str]:
    return answer.code, json.loads(answer.body)["errcode"]


# -- the public listener -------------------------------------------------------------------------------------------


def spellings(path: str) -> list[str]:
    """The same path, as routers along the way may read it."""
    return [
        path,
        path + "/",
        path + "?x=1",
        path + "/more",
        path.removesuffix("/get_token"),
        path.removesuffix("get_token"),
        path.removesuffix("get_token") + "anything_else",
        path.replace("rtc", "%72tc"),
        path.replace("_matrix", "%5fmatrix"),
        path.replace("_matrix", "%5Fmatrix"),
        path.replace("/rtc/", "//rtc//"),
        "/" + path,
        path.replace("/rtc/", "/./rtc/"),
        path.replace("/rtc/", "/x/../rtc/"),
        path.replace("/rtc/", "/x/%2e%2E/rtc/"),
        path.replace("/rtc/", "%2Frtc%2f"),
        "".join(f"%{ord(letter):02x}" if letter != "/" else letter for letter in path),
        "/sfu/get/../.." + path,
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest_twisted.ensureDeferred
async def test_public_listener_answers_proxied_routes_with_404_in_every_spelling(
    start_sandbox: StartSandbox, path: str
) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        for spelling in spellings(path):
            for method in (b"POST", b"OPTIONS", b"GET"):
                head = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % (method, spelling.encode())
                (answer,) = await exchange(sandbox.url, head + b"X-Matrix-User-Identifier: @a:b\r\n\r\n")
                assert (spelling, answer.code, answer.json()["errcode"]) == (spelling, 404, "M_UNRECOGNIZED")
        assert upstream.requests == []


@pytest_twisted.ensureDeferred
async def test_public_listener_forwards_no_header_that_names_a_user(start_sandbox: StartSandbox) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(guard_upstream=upstream.url, guard_reconcile_interval=3600)
        body = b'{"room":"!r:x"}'
        for target in (b"/sfu/get", b"/other", b"/sfu_webhook", b"/delegate_delayed_leave"):
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n" % (target, len(body))
            identity = b"X-Matrix-User-Identifier: @a:b\r\nx-mAtrix-origin: b\r\nX_Matrix_Origin: b\r\nX-Other: 1\r\n"
            await exchange(sandbox.url, head + identity + b"\r\n" + body)
            sent = upstream.requests[-1].lower().replace(b"_", b"-")
            assert b"x-other: 1" in sent
            assert b"x-matrix" not in sent


# -- the app-service listener --------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_there_is_no_app_service_listener_by_default(sandbox: Sandbox) -> None:
    assert sandbox.guard.appservice is None


@pytest_twisted.ensureDeferred
async def test_every_request_must_carry_the_homeservers_token_if_one_is_set(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600, guard_appservice_port=0, guard_appservice_token="hs", guard_members_only="off"
    )
    wrong = [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer h"}, {"Authorization": "hs"}]
    for path in (*PATHS, "/_matrix/app/v1/ping"):
        for given in wrong:
            identity = {name: value for name, value in HEADERS.items() if name != "Authorization"}
            answer = await ask(sandbox, path, headers=identity | given)
            assert errcode(answer) == (401, "M_UNAUTHORIZED")
    assert list(sandbox.upstream.seen) == []
    lower = await ask(sandbox, PATHS[0], headers=HEADERS | {"Authorization": "bearer hs"})
    assert lower.code == 404, "the scheme's case does not matter"
    sandbox.upstream.seen.clear()
    assert (await ask(sandbox, PATHS[0])).code == 404  # upstream's answer: the stand-in is not in app-service mode
    assert len(sandbox.upstream.seen) == 1


@pytest_twisted.ensureDeferred
async def test_readyz_tells_that_the_listener_believes_anybody_and_is_ready(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_appservice_port=0, guard_appservice_host="0.0.0.0")
    await until(lambda: sandbox.guard.changes.round_at is not None)
    answer = await sandbox.operator("GET", "/readyz")
    assert any("GUARD_APPSERVICE_TOKEN is not set" in reason for reason in json.loads(answer.body)["reasons"])
    assert answer.code == 200


@pytest_twisted.ensureDeferred
async def test_requests_are_forwarded_with_their_identity_headers(start_sandbox: StartSandbox) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(
            guard_upstream=upstream.url,
            guard_reconcile_interval=3600,
            guard_appservice_port=0,
            guard_members_only="off",
        )
        for path in PATHS:
            answer = await ask(sandbox, path)
            assert answer.code == 200
            assert answer.headers.getRawHeaders("access-control-allow-origin") is None
            sent = upstream.requests[-1]
            assert sent.startswith(f"POST {path} HTTP/1.1\r\n".encode())
            assert b"X-Matrix-User-Identifier: @alice:sandbox.local\r\n" in sent
            assert b"X-Matrix-Origin: sandbox.local\r\n" in sent
            assert b"Authorization: Bearer hs\r\n" in sent


@pytest_twisted.ensureDeferred
async def test_user_of_another_homeserver_than_the_origin_is_refused(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_appservice_port=0)
    for path in PATHS:
        if "/federation/" in path:
            for user in ("@alice:other.example", "alice", "@alice:sandbox.local:1", "@a:b:sandbox.local"):
                assert errcode(await ask(sandbox, path, user_id=user)) == (403, "M_FORBIDDEN")
    assert list(sandbox.upstream.seen) == []


@pytest_twisted.ensureDeferred
async def test_other_methods_and_routes_of_a_homeserver_are_relayed_and_the_publics_are_not_served(
    start_sandbox: StartSandbox,
) -> None:
    async with recorder() as upstream:
        sandbox = await start_sandbox(
            guard_upstream=upstream.url, guard_reconcile_interval=3600, guard_appservice_port=0
        )
        for path in (*PATHS, "/_matrix/app/v1/ping"):
            for method in ("OPTIONS", "GET", "PUT"):
                assert (await ask(sandbox, path, method=method)).code == 200
        relayed = len(upstream.requests)
        assert relayed == 15
        for path in ("/sfu/get", "/get_token", "/sfu_webhook", "/", "/healthz", "/_matri"):
            assert errcode(await ask(sandbox, path)) == (404, "M_UNRECOGNIZED")
        assert len(upstream.requests) == relayed


@pytest_twisted.ensureDeferred
async def test_answers_of_the_guards_own_carry_no_cors_header_there(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_appservice_port=0, guard_appservice_token="hs")
    for answer in (
        await ask(sandbox, PATHS[0], headers={}),
        await ask(sandbox, PATHS[0], room_id="x" * 256),
        await ask(sandbox, PATHS[1], user_id="@a:other"),
        await ask(sandbox, "/x"),
    ):
        assert answer.code >= 400
        assert answer.headers.getRawHeaders("access-control-allow-origin") is None


def test_port_of_the_app_service_listener_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(guard_appservice_port="").guard_appservice_port is None
    monkeypatch.setenv("GUARD_APPSERVICE_PORT", "8073")
    assert read_settings().guard_appservice_port == 8073
    with pytest.raises(ConfigurationError, match="GUARD_APPSERVICE_PORT"):
        read_settings(guard_appservice_port="x")
