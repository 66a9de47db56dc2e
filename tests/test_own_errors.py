# SPDX-License-Identifier: Apache-2.0
"""A failure of the guard's own code: the join goes on, its token is still rebuilt, and operators are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted

from lotusguard.guard.joins.callers import Callers
from lotusguard.guard.joins.checks import EntryChecks
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.rules.jwt import SfuKey
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.web import handlers
from tests.calls import ALICE, counted, crashes, logged, named, room_of

FAILURES: list[tuple[type, str]] = [
    (Callers, "identify"),
    (Policies, "get"),
    (EntryChecks, "homeserver_may_join"),
    (EntryChecks, "may_join"),
    (MemorySeatBook, "take"),
    (MemorySeatBook, "issue"),
]


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a mistake in the guard")


@pytest.mark.parametrize(("kind", "method"), FAILURES)
@pytest_twisted.ensureDeferred
async def test_a_join_goes_on_when_our_own_code_fails(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, kind: type, method: str
) -> None:
    room_id = room_of(sandbox, 5)
    monkeypatch.setattr(kind, method, fail)
    with logged() as events:
        answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code == 200
    claims = SfuKey(KEY, SECRET).read(json.loads(answer.body)["jwt"])
    assert claims["exp"] - claims["nbf"] <= sandbox.settings.guard_token_ttl, "it was rebuilt"
    assert counted(sandbox, "joins_total", verdict="error", reason="internal_error") == 1
    assert [line for line in named(events, "join") if line.startswith("error @alice")]
    assert crashes(events)
    ready = await sandbox.request("GET", f"{sandbox.admin_url}/readyz")
    report = json.loads(ready.body)
    assert (ready.code, report["internal_errors_seen"]) == (503, True)
    assert any("joins failed inside the guard" in reason for reason in report["reasons"])


@pytest_twisted.ensureDeferred
async def test_upstream_gets_our_serialisation_although_our_code_failed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_id = room_of(sandbox, 5)
    monkeypatch.setattr(EntryChecks, "homeserver_may_join", fail)
    openid = json.dumps(sandbox.homeserver.openid_token(ALICE))
    body = f'{{ "room" :  "{room_id}", "device_id": "PHONE",   "openid_token": {openid} }}'.encode()
    await sandbox.request("POST", f"{sandbox.url}/sfu/get", body, {"Content-Type": "application/json"})
    asked = next(asked for asked in sandbox.upstream.seen if asked.path == "/sfu/get")
    assert asked.body != body
    assert json.loads(asked.body) == json.loads(body)


@pytest_twisted.ensureDeferred
async def test_a_token_that_cannot_be_rebuilt_passes_and_is_counted(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotusguard.guard.joins.issuing.rebuilt", fail)
    assert (await sandbox.ask_token(ALICE, room_of(sandbox, 5))).code == 200
    assert counted(sandbox, "joins_total", verdict="error", reason="internal_error") == 1
    assert counted(sandbox, "fail_open_total", check="token", reason="internal_error") == 1


@pytest_twisted.ensureDeferred
async def test_error_while_reading_a_request_is_a_400_and_is_not_forwarded(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_id = room_of(sandbox, 5)
    monkeypatch.setattr(handlers, "read_request", fail)
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code == 400
    assert json.loads(answer.body)["errcode"] == "M_NOT_JSON"
    assert not [asked for asked in sandbox.upstream.seen if asked.path == "/sfu/get" and asked.method == "POST"]


@pytest_twisted.ensureDeferred
async def test_a_loop_is_refused_with_one_request(sandbox: Sandbox) -> None:
    await sandbox.guard.stopService()
    await sandbox.start_guard(guard_bind_port=0)
    port = sandbox.url.rpartition(":")[2]
    await sandbox.guard.stopService()
    await sandbox.start_guard(guard_bind_port=int(port), guard_upstream=f"http://127.0.0.1:{port}")
    with logged() as events:
        answer = await sandbox.ask_token(ALICE, room_of(sandbox))
    assert answer.code == 502
    assert sum(event.get("event_name") == "join" for event in events) == 1
    assert len(named(events, "loop")) == 1
    report = json.loads((await sandbox.request("GET", f"{sandbox.admin_url}/readyz")).body)
    assert report["ready"] is False
    assert "upstream: loop" in report["reasons"]


@pytest_twisted.ensureDeferred
async def test_readyz_requires_lk_jwt_service_and_not_any_http_server(sandbox: Sandbox) -> None:
    await sandbox.guard.stopService()
    await sandbox.start_guard(guard_upstream=sandbox.homeserver.url)
    report = json.loads((await sandbox.request("GET", f"{sandbox.admin_url}/readyz")).body)
    assert report["ready"] is False
    assert "upstream: not_lk_jwt_service" in report["reasons"]


@pytest_twisted.ensureDeferred
async def test_revoked_matrix_token_is_reported_at_once(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 5)
    await sandbox.ask_token(ALICE, room_id)
    sandbox.homeserver.logins.clear()
    with logged() as events:
        ready = await sandbox.request("GET", f"{sandbox.admin_url}/readyz")
    assert ready.code == 503
    assert any("refuses MATRIX_TOKEN" in reason for reason in json.loads(ready.body)["reasons"])
    assert named(events, "credentials_refused")
    assert counted(sandbox, "credentials_refused", dependency="synapse") == 1
    assert counted(sandbox, "enforcing", rule="limit") == 0
    assert len(named(events, "enforcing")) == 1
    with logged() as events:
        await sandbox.request("GET", f"{sandbox.admin_url}/readyz")
    assert not named(events, "enforcing"), "it is logged when it changes"
