# SPDX-License-Identifier: Apache-2.0
"""Admission over the wire: who gets a seat when callers fail, lie, come from elsewhere, or we cannot tell."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted
from livekit.protocol.models import ParticipantInfo
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults

from lotusguard.clients.http import Answer
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from tests.calls import ALICE, BOB, CAROL, old_token, room_of
from tests.conftest import StartSandbox, until

FULL = {"errcode": "M_FORBIDDEN", "error": "This voice channel is full."}


def content(answer: Answer) -> Any:
    return json.loads(answer.body)


def counted(sandbox: Sandbox, name: str, **labels: str) -> float:
    return sandbox.guard.metrics.registry.get_sample_value(f"lotusguard_{name}", labels) or 0.0


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
async def test_claiming_to_be_somebody_who_is_in_gets_upstreams_own_401(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    answer = await sandbox.ask_token(ALICE, room_id, new=True, openid_token=sandbox.homeserver.openid_token(BOB))
    assert answer.code == 401


@pytest_twisted.ensureDeferred
async def test_users_of_other_homeservers_are_decided_on_when_upstream_has_named_them(sandbox: Sandbox) -> None:
    other = FakeSynapse(reactor, server_name="other.local")
    await other.start()
    try:
        other.add_user("eve")
        sandbox.upstream.homeservers["other.local"] = other.url
        room_id = room_of(sandbox, 1)
        eve = "@eve:other.local"
        assert (await sandbox.ask_token(eve, room_id, openid_token=other.openid_token(eve))).code == 200
        sandbox.livekit.connect(
            content(await sandbox.ask_token(eve, room_id, openid_token=other.openid_token(eve)))["jwt"]
        )
        assert (await sandbox.ask_token(ALICE, room_id)).code == 403
        full = room_of(sandbox, 1)
        await sandbox.enter(ALICE, full)
        for new in (False, True):
            answer = await sandbox.ask_token(eve, full, new=new, openid_token=other.openid_token(eve))
            assert (answer.code, content(answer)) == (403, FULL)
        assert not [asked for asked in sandbox.homeserver.seen if b"other" in asked.target]
    finally:
        await other.stop()


@pytest_twisted.ensureDeferred
async def test_a_request_that_upstream_fails_gives_its_seat_back(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.status(500, b'{"errcode":"M_UNKNOWN","error":"x"}')
    assert (await sandbox.ask_token(ALICE, room_id)).code == 500
    sandbox.upstream.faults.clear()
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_caller_who_hangs_up_gives_the_seat_back(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.fault = Fault.hang()
    asking = Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id))
    await until(lambda: sandbox.upstream.seen)
    asking.cancel()
    with pytest.raises(CancelledError):
        await asking
    sandbox.upstream.fault = None
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    assert (await sandbox.ask_token(ALICE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_seat_that_only_an_unanswered_request_holds_is_waited_for(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.upstream.faults["sfu_get"] = Fault.status(500)
    sandbox.upstream.faults["get_token"] = Fault.delay(0.2)
    first, second = (Deferred.fromCoroutine(sandbox.ask_token(user, room_id, new=True)) for user in (ALICE, BOB))
    await until(lambda: sandbox.upstream.seen)
    sandbox.upstream.faults.clear()
    answers = await gatherResults([first, second])
    assert sorted(answer.code for answer in answers) == [200, 403]
    assert len(sandbox.upstream.issued) == 1


@pytest_twisted.ensureDeferred
async def test_nothing_is_scheduled_upstream_for_who_is_refused(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    delay: dict[str, Any] = {"delay_id": "d", "delay_timeout": 8000}
    for new in (False, True):
        assert (await sandbox.ask_token(BOB, room_id, new=new, **delay)).code == 403
    assert not sandbox.upstream.jobs
    assert not sandbox.upstream.replaced


@pytest_twisted.ensureDeferred
async def test_a_slot_of_the_clients_choice_is_the_same_room(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    for slot in ("m.call#OTHER", "anything"):
        assert (await sandbox.ask_token(BOB, room_id, new=True, slot_id=slot)).code == 403
    await sandbox.enter(ALICE, room_id, new=True, slot_id="m.call#OTHER")
    assert len({issued.alias for issued in sandbox.upstream.issued}) == 2
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("naming", ["0.4.2", "0.3.0"])
async def test_releases_that_name_rooms_otherwise_are_understood_from_their_tokens(
    sandbox: Sandbox, naming: Any
) -> None:
    sandbox.upstream.naming = naming
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    await until(lambda: not sandbox.livekit.webhooks.attempts or sandbox.livekit.webhooks.attempts[-1].status == 200)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert (await sandbox.ask_token(ALICE, room_id, device="TABLET")).code == 200


@pytest_twisted.ensureDeferred
async def test_app_service_routes_are_enforced_as_well(start_sandbox: StartSandbox) -> None:
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
async def test_secret_mismatch_hands_the_token_on_untouched_and_says_so(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, livekit_secret="another-secret-of-thirty-two-chars")
    room_id = room_of(sandbox, 5, allow_screenshare=False)
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code == 200
    assert content(answer)["jwt"] == sandbox.upstream.issued[-1].token
    assert counted(sandbox, "fail_open_total", check="sources", reason="secret_mismatch") == 1
    assert counted(sandbox, "secret_mismatches_total") == 1
    report = content(await sandbox.operator("GET", "/readyz"))
    assert report["secret_mismatch_seen"] is True
    assert report["enforcing"]["sources"] is False


@pytest_twisted.ensureDeferred
async def test_the_caps_trouble_does_not_skip_the_sources(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    await sandbox.enter(ALICE, room_id)
    sandbox.livekit.fault = Fault.status(500)
    sandbox.upstream.full_access = ["nobody"]  # it would ask the SFU for a room
    answer = await sandbox.ask_token(BOB, room_id)
    assert answer.code == 200
    assert answer.body != b""
    assert sandbox.upstream.issued[-1].token != content(answer)["jwt"]
    assert counted(sandbox, "fail_open_total", check="cap", reason="status_500") >= 1


@pytest_twisted.ensureDeferred
async def test_fail_open_without_credentials(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, livekit_key="", matrix_token="")
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    for user in (ALICE, BOB, CAROL):
        answer = await sandbox.ask_token(user, room_id)
        assert content(answer)["jwt"] == sandbox.upstream.issued[-1].token
    report = await sandbox.operator("GET", "/readyz")
    assert report.code == 503
    assert content(report)["enforcing"] == {"cap": False, "sources": False, "in_call": False}
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
async def test_who_is_still_joining_or_hidden_takes_a_seat(sandbox: Sandbox, activate: bool) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.livekit.connect(old_token(BOB, room_id, hidden=True), activate=activate)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 403
