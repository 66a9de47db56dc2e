# SPDX-License-Identifier: Apache-2.0
"""The answer to each error, and which answers browsers can read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted

from lotusguard.clients.lk_jwt_service import UpstreamFailed
from lotusguard.rules.refusals import JoinRefused, Refusal
from lotusguard.rules.requests import TOKEN_ROUTES, Unreadable, WrongOrigin
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.web import handlers
from lotusguard.web.answers import REFUSALS, LoopFound, reply_to
from lotusguard.web.public import PublicApi
from lotusguard.web.site import GuardRequest, GuardSite
from tests.calls import ALICE, BOB, crashes, logged, room_of
from tests.conftest import StartSandbox

FORBIDDEN, LIMITED, UNKNOWN = "M_FORBIDDEN", "M_LIMIT_EXCEEDED", "M_UNKNOWN"


@pytest.mark.parametrize(
    ("error", "code", "errcode"),
    [
        (JoinRefused(Refusal.FULL), 403, FORBIDDEN),
        (JoinRefused(Refusal.NOT_A_MEMBER), 403, FORBIDDEN),
        (JoinRefused(Refusal.HOMESERVER_NOT_ALLOWED), 403, FORBIDDEN),
        (JoinRefused(Refusal.JOIN_LEVEL), 403, FORBIDDEN),
        (JoinRefused(Refusal.NOT_STARTED), 403, FORBIDDEN),
        (JoinRefused(Refusal.REMOVED), 403, FORBIDDEN),
        (JoinRefused(Refusal.NOT_ADMITTED), 403, FORBIDDEN),
        (JoinRefused(Refusal.NOBODY_ADMITTED), 403, FORBIDDEN),
        (JoinRefused(Refusal.TOO_MANY_SLOTS), 429, LIMITED),
        (JoinRefused(Refusal.TOO_MANY_LOOKUPS), 429, LIMITED),
        (JoinRefused(Refusal.LOBBY_FULL), 429, LIMITED),
        (JoinRefused(Refusal.SEAT_PENDING), 503, UNKNOWN),
        (Unreadable("x"), 400, "M_NOT_JSON"),
        (WrongOrigin(), 403, FORBIDDEN),
        (UpstreamFailed(502, "x"), 502, UNKNOWN),
        (UpstreamFailed(504, "x"), 504, UNKNOWN),
        (LoopFound(), 502, UNKNOWN),
    ],
    ids=repr,
)
def test_errors_have_their_answers(error: Exception, code: int, errcode: str) -> None:
    reply = reply_to(error)
    assert reply is not None
    assert (reply.code, reply.errcode) == (code, errcode)
    assert (reply.retry_after_ms is not None) == (code == 429)


def test_every_refusal_has_an_answer_and_nobody_expects_any_other_error() -> None:
    assert set(REFUSALS) == set(Refusal)
    assert reply_to(RuntimeError()) is None


def test_retry_after_is_given_in_milliseconds() -> None:
    reply = reply_to(JoinRefused(Refusal.LOBBY_FULL, 1.5))
    assert reply is not None
    assert reply.retry_after_ms == 1500


async def refused_with(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, error: Exception) -> tuple[int, Any, Any]:
    """Status, content and CORS header of the answer to a join that fails with this error."""

    async def join(*_: Any) -> None:
        raise error

    monkeypatch.setattr("lotusguard.guard.joins.admission.Admission.join", join)
    answer = await sandbox.ask_token(ALICE, room_of(sandbox, 1))
    return answer.code, json.loads(answer.body), answer.headers.getRawHeaders("access-control-allow-origin")


@pytest_twisted.ensureDeferred
async def test_browsers_can_read_refusals_but_not_errors_worth_a_retry(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for refusal in Refusal:
        code, content, allowed = await refused_with(sandbox, monkeypatch, JoinRefused(refusal, 2))
        assert (refusal, allowed) == (refusal, None if code == 503 else ["*"])
        assert content.get("retry_after_ms") == (2000 if code == 429 else None)
    for status in (502, 504):
        code, content, allowed = await refused_with(sandbox, monkeypatch, UpstreamFailed(status, "x"))
        assert (code, content["errcode"], allowed) == (status, UNKNOWN, None)


@pytest.mark.parametrize("new", [False, True])
@pytest_twisted.ensureDeferred
async def test_browsers_ask_again_while_livekit_is_restarting(sandbox: Sandbox, new: bool) -> None:
    room_id = room_of(sandbox)
    await sandbox.livekit.stop_listening()
    answer = await sandbox.ask_token(ALICE, room_id, new=new)
    assert (answer.code, json.loads(answer.body)["error"]) == (500, "Unable to create room on SFU")
    assert answer.headers.getRawHeaders("access-control-allow-origin") is None
    await sandbox.livekit.listen()
    answer = await sandbox.ask_token(ALICE, room_id, new=new)
    assert (answer.code, answer.headers.getRawHeaders("access-control-allow-origin")) == (200, ["*"])


@pytest_twisted.ensureDeferred
async def test_unexpected_error_is_logged_and_answered_502_without_cors(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged() as events:
        code, content, allowed = await refused_with(sandbox, monkeypatch, RuntimeError("secret"))
    assert (code, content["errcode"], allowed) == (502, UNKNOWN, None)
    assert "secret" not in json.dumps(content)
    assert len(crashes(events)) == 1


@pytest_twisted.ensureDeferred
async def test_error_while_reading_a_request_is_a_400_and_nothing_is_forwarded(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug in the parser")

    monkeypatch.setattr(handlers, "read_request", broken)
    with logged() as events:
        answer = await sandbox.ask_token(ALICE, room_of(sandbox, 1))
    assert (answer.code, json.loads(answer.body)["errcode"]) == (400, "M_NOT_JSON")
    assert sandbox.upstream.asked["sfu_get"] == 0
    assert len(crashes(events)) == 1


@pytest_twisted.ensureDeferred
async def test_paths_without_a_route_are_404_json_on_the_operators_listener(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    with logged() as events:
        for path in ("/x", "/rooms/x", "/%ff", "/x%0ay", "/policy-changed"):
            answer = await sandbox.operator("GET", path)
            assert (path, answer.code, json.loads(answer.body)["errcode"]) == (path, 404, "M_UNRECOGNIZED")
    assert crashes(events) == []


@pytest_twisted.ensureDeferred
async def test_klein_routes_token_requests_to_the_handler_that_the_short_cut_calls(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def through_klein(site: GuardSite, request: GuardRequest) -> None:
        request.render(site.resource)

    monkeypatch.setattr(GuardSite, "dispatch", through_klein)
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    for new in (False, True):
        refused = await sandbox.ask_token(BOB, room_id, new=new)
        assert (refused.code, json.loads(refused.body)["error"]) == (403, "This voice channel is full.")
        assert refused.headers.getRawHeaders("access-control-allow-origin") == ["*"]
    unreadable = await sandbox.request("POST", sandbox.url + "//sfu/%67et", b"x")
    assert unreadable.code == 400


def test_every_token_route_is_declared_to_klein() -> None:
    declared = {rule.rule for rule in PublicApi.app.url_map.iter_rules() if rule.endpoint == "token"}
    assert declared == set(TOKEN_ROUTES)
