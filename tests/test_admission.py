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
from lotusguard.sandbox.authorizer import APP_SERVICE_ROUTES, ROUTES
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.go_http import ServeMux
from lotusguard.sandbox.homeserver import Homeserver
from lotusguard.sandbox.stage import Stage
from tests.calls import ALICE, BOB, CAROL, old_token, room_of
from tests.conftest import SetStage, until

FULL = {"errcode": "M_FORBIDDEN", "error": "This voice channel is full."}


def content(answer: Answer) -> Any:
    return json.loads(answer.body)


def counted(stage: Stage, name: str, **labels: str) -> float:
    return stage.guard.metrics.registry.get_sample_value(f"lotusguard_{name}", labels) or 0.0


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_bad_openid_token_gets_upstreams_own_401_in_a_full_room_too(stage: Stage, new: bool) -> None:
    empty, full = room_of(stage), room_of(stage, 1)
    await stage.enter(ALICE, full)
    bad = stage.homeserver.openid_token(BOB) | {"access_token": "made-up"}
    answers = [await stage.ask_token(BOB, room_id, new=new, openid_token=bad) for room_id in (empty, full)]
    assert [answer.code for answer in answers] == [401, 401]
    assert answers[0].body == answers[1].body
    assert not [issued for issued in stage.authorizer.issued if issued.room == full and issued.user != ALICE]


@pytest_twisted.ensureDeferred
async def test_claiming_to_be_somebody_who_is_in_gets_upstreams_own_401(stage: Stage) -> None:
    room_id = room_of(stage, 1)
    await stage.enter(ALICE, room_id)
    answer = await stage.ask_token(ALICE, room_id, new=True, openid_token=stage.homeserver.openid_token(BOB))
    assert answer.code == 401


@pytest_twisted.ensureDeferred
async def test_users_of_other_homeservers_are_decided_on_when_upstream_has_named_them(stage: Stage) -> None:
    other = Homeserver(reactor, server_name="other.local")
    await other.start()
    try:
        other.add_user("eve")
        stage.authorizer.homeservers["other.local"] = other.url
        room_id = room_of(stage, 1)
        eve = "@eve:other.local"
        assert (await stage.ask_token(eve, room_id, openid_token=other.openid_token(eve))).code == 200
        stage.sfu.connect(content(await stage.ask_token(eve, room_id, openid_token=other.openid_token(eve)))["jwt"])
        assert (await stage.ask_token(ALICE, room_id)).code == 403
        full = room_of(stage, 1)
        await stage.enter(ALICE, full)
        for new in (False, True):
            answer = await stage.ask_token(eve, full, new=new, openid_token=other.openid_token(eve))
            assert (answer.code, content(answer)) == (403, FULL)
        assert not [asked for asked in stage.homeserver.seen if b"other" in asked.target]
    finally:
        await other.stop()


@pytest_twisted.ensureDeferred
async def test_a_request_that_upstream_fails_gives_its_seat_back(stage: Stage) -> None:
    room_id = room_of(stage, 1)
    stage.authorizer.faults["sfu_get"] = Fault.status(500, b'{"errcode":"M_UNKNOWN","error":"x"}')
    assert (await stage.ask_token(ALICE, room_id)).code == 500
    stage.authorizer.faults.clear()
    assert (await stage.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_caller_who_hangs_up_gives_the_seat_back(stage: Stage) -> None:
    room_id = room_of(stage, 1)
    stage.authorizer.fault = Fault.hang()
    asking = Deferred.fromCoroutine(stage.ask_token(ALICE, room_id))
    await until(lambda: stage.authorizer.seen)
    asking.cancel()
    with pytest.raises(CancelledError):
        await asking
    stage.authorizer.fault = None
    assert (await stage.ask_token(BOB, room_id)).code == 200
    assert (await stage.ask_token(ALICE, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_seat_that_only_an_unanswered_request_holds_is_waited_for(stage: Stage) -> None:
    room_id = room_of(stage, 1)
    stage.authorizer.faults["sfu_get"] = Fault.status(500)
    stage.authorizer.faults["get_token"] = Fault.delay(0.2)
    first, second = (Deferred.fromCoroutine(stage.ask_token(user, room_id, new=True)) for user in (ALICE, BOB))
    await until(lambda: stage.authorizer.seen)
    stage.authorizer.faults.clear()
    answers = await gatherResults([first, second])
    assert sorted(answer.code for answer in answers) == [200, 403]
    assert len(stage.authorizer.issued) == 1


@pytest_twisted.ensureDeferred
async def test_nothing_is_scheduled_upstream_for_who_is_refused(stage: Stage) -> None:
    room_id = room_of(stage, 1)
    await stage.enter(ALICE, room_id)
    delay: dict[str, Any] = {"delay_id": "d", "delay_timeout": 8000}
    for new in (False, True):
        assert (await stage.ask_token(BOB, room_id, new=new, **delay)).code == 403
    assert not stage.authorizer.jobs
    assert not stage.authorizer.replaced


@pytest_twisted.ensureDeferred
async def test_a_slot_of_the_clients_choice_is_the_same_room(stage: Stage) -> None:
    room_id = room_of(stage, 1)
    await stage.enter(ALICE, room_id)
    for slot in ("m.call#OTHER", "anything"):
        assert (await stage.ask_token(BOB, room_id, new=True, slot_id=slot)).code == 403
    await stage.enter(ALICE, room_id, new=True, slot_id="m.call#OTHER")
    assert len({issued.alias for issued in stage.authorizer.issued}) == 2
    assert (await stage.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("naming", ["0.4.2", "0.3.0"])
async def test_releases_that_name_rooms_otherwise_are_understood_from_their_tokens(stage: Stage, naming: Any) -> None:
    stage.authorizer.naming = naming
    room_id = room_of(stage, 1)
    await stage.enter(ALICE, room_id)
    await until(lambda: not stage.sfu.webhooks.attempts or stage.sfu.webhooks.attempts[-1].status == 200)
    assert (await stage.ask_token(BOB, room_id)).code == 403
    assert (await stage.ask_token(ALICE, room_id, device="TABLET")).code == 200


@pytest_twisted.ensureDeferred
async def test_app_service_routes_are_enforced_as_well(stage: Stage) -> None:
    stage.authorizer.hs_token = "hs"
    stage.authorizer._routes = ROUTES | APP_SERVICE_ROUTES
    stage.authorizer._mux = ServeMux(stage.authorizer._routes, 307)
    room_id = room_of(stage, 1, allow_camera=False)
    base = "/_matrix/{}/unstable/io.element.msc4195/rtc/livekit/get_token"
    body = {"url": stage.authorizer.livekit_url, "room_id": room_id, "slot_id": "m.call#ROOM", "member_id": "m1"}

    async def ask(side: str, user: str, token: str = "hs") -> Answer:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        whole: dict[str, Any] = dict(body)
        if side == "client":
            headers["X-Matrix-User-Identifier"] = user
            whole["server_name"] = "sandbox.local"
        else:
            headers["X-Matrix-Origin"] = "sandbox.local"
            whole["user_id"] = user
        return await stage.request("POST", stage.url + base.format(side), json.dumps(whole).encode(), headers)

    first = await ask("client", ALICE)
    assert first.code == 200, first.body
    assert set(content(first)) == {"jwt"}
    participant = stage.sfu.connect(content(first)["jwt"])
    assert not participant.publish("CAMERA")
    for side, cors in (("client", ["*"]), ("federation", None)):
        assert (await ask(side, ALICE)).code == 200
        refused = await ask(side, BOB)
        assert (refused.code, content(refused)) == (403, FULL)
        assert refused.headers.getRawHeaders("access-control-allow-origin") == cors
        assert (await ask(side, BOB, token="wrong")).code in (401, 403)
        assert content(await ask(side, BOB, token="wrong")) != FULL


@pytest_twisted.ensureDeferred
async def test_secret_mismatch_hands_the_token_on_untouched_and_says_so(set_stage: SetStage) -> None:
    stage = await set_stage(guard_reconcile_interval=3600, livekit_secret="another-secret-of-thirty-two-chars")
    room_id = room_of(stage, 5, allow_screenshare=False)
    answer = await stage.ask_token(ALICE, room_id)
    assert answer.code == 200
    assert content(answer)["jwt"] == stage.authorizer.issued[-1].token
    assert counted(stage, "fail_open_total", check="sources", reason="secret_mismatch") == 1
    assert counted(stage, "secret_mismatches_total") == 1
    report = content(await stage.operator("GET", "/readyz"))
    assert report["secret_mismatch_seen"] is True
    assert report["enforcing"]["sources"] is False


@pytest_twisted.ensureDeferred
async def test_the_caps_trouble_does_not_skip_the_sources(stage: Stage) -> None:
    room_id = room_of(stage, 1, allow_screenshare=False)
    await stage.enter(ALICE, room_id)
    stage.sfu.fault = Fault.status(500)
    stage.authorizer.full_access = ["nobody"]  # it would ask the SFU for a room
    answer = await stage.ask_token(BOB, room_id)
    assert answer.code == 200
    assert answer.body != b""
    assert stage.authorizer.issued[-1].token != content(answer)["jwt"]
    assert counted(stage, "fail_open_total", check="cap", reason="status_500") >= 1


@pytest_twisted.ensureDeferred
async def test_fail_open_without_credentials(set_stage: SetStage) -> None:
    stage = await set_stage(guard_reconcile_interval=3600, livekit_key="", matrix_token="")
    room_id = room_of(stage, 1, allow_screenshare=False)
    for user in (ALICE, BOB, CAROL):
        answer = await stage.ask_token(user, room_id)
        assert content(answer)["jwt"] == stage.authorizer.issued[-1].token
    report = await stage.operator("GET", "/readyz")
    assert report.code == 503
    assert content(report)["enforcing"] == {"cap": False, "sources": False, "in_call": False}
    assert counted(stage, "fail_open_total", check="policy", reason="no_matrix_token") == 3


@pytest_twisted.ensureDeferred
async def test_a_dry_run_decides_and_changes_nothing(set_stage: SetStage) -> None:
    stage = await set_stage(guard_reconcile_interval=3600, guard_dry_run=True)
    room_id = room_of(stage, 1, allow_screenshare=False)
    await stage.enter(ALICE, room_id)
    answer = await stage.ask_token(BOB, room_id)
    assert content(answer)["jwt"] == stage.authorizer.issued[-1].token
    assert counted(stage, "joins_total", verdict="would_refuse", reason="full") == 1


@pytest_twisted.ensureDeferred
async def test_two_devices_and_hashed_identities_are_one_user(stage: Stage) -> None:
    room_id = room_of(stage, 2)
    for _ in range(3):
        await stage.enter(ALICE, room_id, new=True)
    await stage.enter(ALICE, room_id, device="TABLET")
    assert (await stage.ask_token(BOB, room_id, new=True)).code == 200
    assert (await stage.ask_token(CAROL, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_agents_and_recorders_take_no_seat(stage: Stage) -> None:
    room_id = room_of(stage, 1)
    for kind in (ParticipantInfo.Kind.AGENT, ParticipantInfo.Kind.EGRESS):
        helper = stage.sfu.connect(old_token(f"@helper{kind}:sandbox.local", room_id), activate=False)
        helper.kind = kind
        helper.activate()
    await stage.enter(ALICE, room_id)
    assert (await stage.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("activate", [True, False])
async def test_who_is_still_joining_or_hidden_takes_a_seat(stage: Stage, activate: bool) -> None:
    room_id = room_of(stage, 1)
    stage.sfu.connect(old_token(BOB, room_id, hidden=True), activate=activate)
    assert (await stage.ask_token(ALICE, room_id)).code == 403
