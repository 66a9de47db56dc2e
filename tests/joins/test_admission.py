# SPDX-License-Identifier: Apache-2.0
"""Admission over the wire: who gets a seat when callers fail, lie or are foreign, or when nobody can tell."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from livekit.protocol.models import ParticipantInfo
from twisted.internet.defer import CancelledError, gatherResults

from lotusguard.clients.http import Answer
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.lk_jwt_service.dependencies import Dependencies
from tests.calls import ALICE, BOB, CAROL, change_policy, counted, old_token, room_of
from tests.conftest import StartSandbox, until
from tests.joins.helpers import EVE, FULL, ask, content, other_homeserver


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_bad_openid_token_gets_upstreams_own_401_in_a_full_room_too(sandbox: Sandbox, new: bool) -> None:
    empty, full = room_of(sandbox), room_of(sandbox, 1)
    await sandbox.enter(ALICE, full)
    bad = sandbox.homeserver.openid_token(BOB) | {"access_token": "made-up"}
    answers = [await sandbox.ask_token(BOB, room_id, new=new, openid_token=bad) for room_id in (empty, full)]
    assert [answer.code for answer in answers] == [401, 401]
    assert answers[0].body == answers[1].body
    assert not [issued for issued in sandbox.upstream.issued if issued.room == full and issued.user != ALICE]


@pytest_twisted.ensureDeferred
async def test_claiming_to_be_a_participant_gets_upstreams_own_401(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    answer = await sandbox.ask_token(ALICE, room_id, new=True, openid_token=sandbox.homeserver.openid_token(BOB))
    assert answer.code == 401


@pytest_twisted.ensureDeferred
async def test_the_limit_holds_for_users_of_other_homeservers_once_upstream_has_named_them(sandbox: Sandbox) -> None:
    async with other_homeserver(sandbox) as other:
        room_id, full = room_of(sandbox, 1), room_of(sandbox, 1)
        for room in (room_id, full):
            sandbox.homeserver.join(room, EVE)
        assert (await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE))).code == 200
        answer = await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE))
        sandbox.livekit.connect(content(answer)["jwt"])
        assert (await sandbox.ask_token(ALICE, room_id)).code == 403
        await sandbox.enter(ALICE, full)
        for new in (False, True):
            answer = await sandbox.ask_token(EVE, full, new=new, openid_token=other.openid_token(EVE))
            assert (answer.code, content(answer)) == (403, FULL)
        assert not [
            asked for asked in sandbox.homeserver.seen if b"openid" in asked.target and b"other" in asked.target
        ]


@pytest_twisted.ensureDeferred
async def test_a_request_that_upstream_fails_releases_its_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.status(500, b'{"errcode":"M_UNKNOWN","error":"x"}')
    assert (await sandbox.ask_token(ALICE, room_id)).code == 500
    sandbox.upstream.faults.clear()
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_caller_who_disconnects_releases_the_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.fault = Fault.hang()
    asking = ask(sandbox, ALICE, room_id)
    await until(lambda: sandbox.upstream.seen)
    asking.cancel()
    with pytest.raises(CancelledError):
        await asking
    sandbox.upstream.fault = None
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    assert (await sandbox.ask_token(ALICE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_caller_waits_for_a_seat_that_only_a_request_in_flight_holds(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.status(500)
    sandbox.upstream.faults["get_token"] = Fault.delay(0.2)
    first, second = (ask(sandbox, user, room_id, new=True) for user in (ALICE, BOB))
    await until(lambda: sandbox.upstream.seen)
    sandbox.upstream.faults.clear()
    answers = await gatherResults([first, second])
    assert sorted(answer.code for answer in answers) == [200, 403]
    assert len(sandbox.upstream.issued) == 1


@pytest.mark.parametrize("change", ["limit", "level"])
@pytest_twisted.ensureDeferred
async def test_a_policy_that_was_changed_while_a_caller_waited_for_a_seat_counts(sandbox: Sandbox, change: str) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    sandbox.upstream.fault = Fault.hang()
    in_flight = ask(sandbox, CAROL, room_id)
    await until(lambda: len(sandbox.upstream.seen) > 1)
    looked_up = len(sandbox.homeserver.seen) + 2  # who Bob is, and whether he is a member
    waiting = ask(sandbox, BOB, room_id)
    await until(lambda: len(sandbox.homeserver.seen) >= looked_up)
    for _ in range(3):
        await sandbox.operator("GET", "/rooms")  # he waits by now
    if change == "level":
        sandbox.homeserver.set_state(room_id, "io.lotus.call_permissions", {"join": 50})
    await change_policy(sandbox, room_id, 1 if change == "limit" else 2)
    in_flight.cancel()
    with pytest.raises(CancelledError):
        await in_flight
    sandbox.upstream.fault = None
    assert (await waiting).code == 403


@pytest_twisted.ensureDeferred
async def test_a_refused_local_user_causes_nothing_upstream(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    delay: dict[str, Any] = {"delay_id": "d", "delay_timeout": 8000}
    for new in (False, True):
        assert (await sandbox.ask_token(BOB, room_id, new=new, **delay)).code == 403
    assert [issued.user for issued in sandbox.upstream.issued] == [ALICE]
    assert not sandbox.upstream.jobs
    assert not sandbox.upstream.replaced


@pytest_twisted.ensureDeferred
async def test_all_slots_of_a_room_share_its_seats(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    for slot in ("m.call#OTHER", "anything"):
        assert (await sandbox.ask_token(BOB, room_id, new=True, slot_id=slot)).code == 403
    await sandbox.enter(ALICE, room_id, new=True, slot_id="m.call#OTHER")
    assert len({issued.alias for issued in sandbox.upstream.issued}) == 2
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("naming", ["0.4.2", "0.3.0"])
async def test_older_releases_that_name_sfu_rooms_otherwise_are_understood_from_their_tokens(
    sandbox: Sandbox, naming: Any
) -> None:
    sandbox.upstream.naming = naming
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    await until(lambda: not sandbox.livekit.webhooks.attempts or sandbox.livekit.webhooks.attempts[-1].status == 200)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert (await sandbox.ask_token(ALICE, room_id, device="TABLET")).code == 200


@pytest_twisted.ensureDeferred
async def test_the_limit_and_the_sources_hold_on_app_service_routes(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_appservice_port=0, guard_appservice_token="hs")
    sandbox.upstream.hs_token = "hs"
    room_id = room_of(sandbox, 1, allow_camera=False)
    base = "/_matrix/{}/unstable/io.element.msc4195/rtc/livekit/get_token"
    body = {"url": sandbox.upstream.livekit_url, "room_id": room_id, "slot_id": "m.call#ROOM", "member_id": "m1"}

    async def ask(side: str, user: str, token: str = "hs") -> Answer:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        whole: dict[str, Any] = dict(body)
        if side == "client":
            headers["X-Matrix-User-Identifier"] = user
            whole["server_name"] = "sandbox.local"
        else:
            headers["X-Matrix-Origin"] = "sandbox.local"
            whole["user_id"] = user
        return await sandbox.request(
            "POST", sandbox.appservice_url + base.format(side), json.dumps(whole).encode(), headers
        )

    first = await ask("client", ALICE)
    assert first.code == 200, first.body
    assert set(content(first)) == {"jwt"}
    participant = sandbox.livekit.connect(content(first)["jwt"])
    assert not participant.publish("CAMERA")
    for side in ("client", "federation"):
        assert (await ask(side, ALICE)).code == 200
        refused = await ask(side, BOB)
        assert (refused.code, content(refused)) == (403, FULL)
        assert refused.headers.getRawHeaders("access-control-allow-origin") is None
        assert (await ask(side, BOB, token="wrong")).code == 401


@pytest_twisted.ensureDeferred
async def test_a_token_of_another_secret_is_passed_on_unchanged_and_reported(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, livekit_secret="another-secret-of-thirty-two-chars")
    room_id = room_of(sandbox, 5, allow_screenshare=False)
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code == 200
    assert content(answer)["jwt"] == sandbox.upstream.issued[-1].token
    assert counted(sandbox, "fail_open_total", check="token", reason="secret_mismatch") == 1
    assert counted(sandbox, "secret_mismatches_total") == 1
    report = content(await sandbox.operator("GET", "/readyz"))
    assert report["secret_mismatch_seen"] is True
    assert report["enforcing"]["sources"] is False


@pytest_twisted.ensureDeferred
async def test_forbidden_sources_are_withheld_although_the_limit_cannot_be_checked(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    await sandbox.enter(ALICE, room_id)
    sandbox.livekit.fault = Fault.status(500)
    sandbox.upstream.full_access = ["nobody"]  # else it would ask LiveKit to create the SFU room
    answer = await sandbox.ask_token(BOB, room_id)
    assert answer.code == 200
    assert answer.body != b""
    assert sandbox.upstream.issued[-1].token != content(answer)["jwt"]
    assert counted(sandbox, "fail_open_total", check="limit", reason="status_500") >= 1


@pytest_twisted.ensureDeferred
async def test_joins_pass_unchanged_without_credentials(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, livekit_key="", matrix_token="")
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    for user in (ALICE, BOB, CAROL):
        answer = await sandbox.ask_token(user, room_id)
        assert content(answer)["jwt"] == sandbox.upstream.issued[-1].token
    report = await sandbox.operator("GET", "/readyz")
    assert report.code == 503
    assert content(report)["enforcing"] == {"limit": False, "sources": False, "membership": False, "in_call": False}
    assert counted(sandbox, "fail_open_total", check="policy", reason="no_matrix_token") == 3


@pytest_twisted.ensureDeferred
async def test_a_dry_run_decides_and_changes_nothing(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_dry_run=True)
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    await sandbox.enter(ALICE, room_id)
    answer = await sandbox.ask_token(BOB, room_id)
    assert content(answer)["jwt"] == sandbox.upstream.issued[-1].token
    assert counted(sandbox, "joins_total", verdict="would_refuse", reason="full") == 1


@pytest_twisted.ensureDeferred
async def test_two_devices_and_hashed_identities_are_one_user(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    for _ in range(3):
        await sandbox.enter(ALICE, room_id, new=True)
    await sandbox.enter(ALICE, room_id, device="TABLET")
    assert (await sandbox.ask_token(BOB, room_id, new=True)).code == 200
    assert (await sandbox.ask_token(CAROL, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_agents_and_recorders_take_no_seat(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    for kind in (ParticipantInfo.Kind.AGENT, ParticipantInfo.Kind.EGRESS):
        helper = sandbox.livekit.connect(old_token(f"@helper{kind}:sandbox.local", room_id), activate=False)
        helper.kind = kind
        helper.activate()
    await sandbox.enter(ALICE, room_id)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("activate", [True, False])
async def test_a_participant_who_is_still_joining_or_hidden_takes_a_seat(sandbox: Sandbox, activate: bool) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.livekit.connect(old_token(BOB, room_id, hidden=True), activate=activate)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_lookups_before_and_after_upstream_named_the_caller_share_one_budget(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=3)
    room_id = room_of(sandbox)
    sandbox.homeserver.faults["userinfo"] = Fault.hang(times=1)  # the guard's own question, not upstream's
    for route in ("room_state", "user_joined_rooms"):
        sandbox.homeserver.faults[route] = Fault.hang()
    began = sandbox.reactor.seconds()
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    assert sandbox.reactor.seconds() - began < 5.5
    assert counted(sandbox, "fail_open_total", check="membership", reason="timeout") == 1


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_homeserver_cannot_vouch_for_users_of_another_one(
    start_sandbox: StartSandbox, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def believe(*_: object) -> str:
        return ALICE

    monkeypatch.setattr(Dependencies, "user_of", believe)
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only="off")
    room_id = room_of(sandbox)
    delay: dict[str, Any] = {"delay_id": "d", "delay_timeout": 8000, "delay_cs_api_url": sandbox.homeserver.url}
    await sandbox.ask_token(ALICE, room_id)  # the guard knows that the room has no policy
    async with other_homeserver(sandbox) as other:
        answer = await sandbox.ask_token(ALICE, room_id, new=new, openid_token=other.openid_token(EVE), **delay)
    assert sandbox.upstream.issued, "upstream believed it"
    assert not sandbox.upstream.jobs
    assert (answer.code, content(answer)["errcode"]) == (401, "M_UNAUTHORIZED")
    assert counted(sandbox, "joins_total", verdict="refused", reason="other_server") == 1
