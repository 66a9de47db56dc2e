# SPDX-License-Identifier: Apache-2.0
"""Joins over real sockets: what a client gets, what upstream sees, and what LiveKit lets them do."""

from __future__ import annotations

import json
import time

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, counted, old_token, room_of
from tests.conftest import StartSandbox, until
from tests.joins.helpers import FULL, claims_of


@pytest_twisted.ensureDeferred
async def test_by_default_every_token_is_short_lived_and_has_no_administrative_grant(sandbox: Sandbox) -> None:
    sandbox.upstream.extra_claims = {"video": {"roomCreate": True, "roomAdmin": True, "hidden": True}}
    claims = claims_of(await sandbox.ask_token(ALICE, room_of(sandbox)))
    assert claims["exp"] - claims["nbf"] == 120
    assert not {"roomCreate", "roomAdmin", "hidden"} & claims["video"].keys()
    assert "canPublishSources" not in claims["video"]


def issue_to_anybody(sandbox: Sandbox) -> None:
    """Let upstream answer ``/get_token`` with a token whatever it is asked for."""
    token = old_token(ALICE, "!unheard-of:sandbox.local", roomCreate=True)
    sandbox.upstream.faults["get_token"] = Fault.status(200, json.dumps({"url": "wss://sfu", "jwt": token}).encode())


@pytest.mark.parametrize("body", ["{}", '{"slot_id": "m.call#ROOM"}', '{"room_id": "", "device_id": "PHONE"}'])
@pytest_twisted.ensureDeferred
async def test_a_token_for_no_room_that_we_know_is_rebuilt_and_reported(sandbox: Sandbox, body: str) -> None:
    issue_to_anybody(sandbox)
    answer = await sandbox.request("POST", f"{sandbox.url}/get_token", body.encode())
    claims = claims_of(answer)
    assert claims["exp"] <= time.time() + 121
    assert "roomCreate" not in claims["video"]
    assert counted(sandbox, "fail_open_total", check="policy", reason="no_room") == 1


@pytest_twisted.ensureDeferred
async def test_the_old_body_is_held_to_the_rules_on_the_new_route(sandbox: Sandbox) -> None:
    issue_to_anybody(sandbox)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(BOB, room_id)
    body = {"room": room_id, "device_id": "PHONE", "openid_token": sandbox.homeserver.openid_token(ALICE)}
    answer = await sandbox.request("POST", f"{sandbox.url}/get_token", json.dumps(body).encode())
    assert (answer.code, json.loads(answer.body)) == (403, FULL)


@pytest_twisted.ensureDeferred
async def test_guard_tokens_policy_passes_answers_of_rooms_without_a_policy_byte_for_byte(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_tokens="policy")
    answer = await sandbox.ask_token(ALICE, room_of(sandbox))
    assert answer.code == 200
    assert json.loads(answer.body)["jwt"] == sandbox.upstream.issued[-1].token
    assert claims_of(answer)["exp"] - claims_of(answer)["nbf"] >= 3600
    assert answer.body.endswith(b"}\n")
    assert answer.headers.getRawHeaders("access-control-allow-origin") == ["*"]
    limited = claims_of(await sandbox.ask_token(ALICE, room_of(sandbox, 5)))
    assert limited["exp"] - limited["nbf"] == 120


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("ahead", [-7200, 7200])
async def test_tokens_work_although_the_guards_clock_is_wrong(start_sandbox: StartSandbox, ahead: int) -> None:
    """To the guard, upstream's clock is two hours behind or ahead. ``exp`` rests on upstream's own ``iat``."""
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600,
        upstream_options={"now": lambda: time.time() + ahead},
        livekit_options={"now": lambda: time.time() + ahead},
    )
    answer = await sandbox.ask_token(ALICE, room_of(sandbox, 5))
    claims = claims_of(answer)
    assert claims["exp"] - claims["iat"] == 120
    assert sandbox.livekit.connect(json.loads(answer.body)["jwt"])


@pytest_twisted.ensureDeferred
async def test_a_full_room_is_refused_on_both_routes_and_causes_nothing_upstream(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.enter(ALICE, room_id)
    await sandbox.enter(BOB, room_id, new=True)
    for new in (False, True):
        before = len(sandbox.upstream.issued)
        answer = await sandbox.ask_token(CAROL, room_id, new=new)
        assert answer.code == 403
        assert json.loads(answer.body) == FULL
        assert answer.headers.getRawHeaders("access-control-allow-origin") == ["*"]
        assert len(sandbox.upstream.issued) == before


@pytest_twisted.ensureDeferred
async def test_a_participant_is_let_in_again_with_any_device_on_any_route(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id, new=True)
    for how in ({"device": "TABLET"}, {"new": True}, {"new": True, "device": "TABLET"}):
        assert (await sandbox.ask_token(ALICE, room_id, **how)).code == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_forbidden_sources_are_not_in_the_token(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, allow_screenshare=False)
    answer = await sandbox.ask_token(ALICE, room_id)
    claims = claims_of(answer)
    assert claims["video"]["canPublishSources"] == ["microphone", "camera"]
    assert claims["video"]["canPublish"] is True
    assert claims["exp"] - claims["nbf"] <= 180
    participant = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    assert participant.publish("MICROPHONE")
    assert not participant.publish("SCREEN_SHARE")


@pytest_twisted.ensureDeferred
async def test_a_seat_is_free_again_when_its_user_has_left(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    alice = await sandbox.enter(ALICE, room_id)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_running_screen_share_is_revoked_when_the_policy_changes(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox)
    alice = await sandbox.enter(ALICE, room_id)
    alice.publish("MICROPHONE")
    alice.publish("SCREEN_SHARE")
    sandbox.homeserver.set_state(room_id, "io.lotus.room_quality", {"allow_screenshare": False})
    answer = await sandbox.operator("POST", "/policy-changed", json.dumps({"room_id": room_id}).encode())
    assert answer.code == 202
    await until(lambda: [track.source for track in alice.info().tracks] == [2])
    assert alice.info().permission.can_subscribe


@pytest_twisted.ensureDeferred
async def test_200_users_at_once_on_10_seats_admit_exactly_10(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 10)
    users = [f"@u{number}:sandbox.local" for number in range(200)]
    for user in users:
        sandbox.homeserver.add_user(user.split(":")[0][1:])
        sandbox.homeserver.join(room_id, user)
    answers = await gatherResults(
        [Deferred.fromCoroutine(sandbox.ask_token(user, room_id, new=n % 2 == 0)) for n, user in enumerate(users)]
    )
    assert sorted(answer.code for answer in answers) == [200] * 10 + [403] * 190
    assert len(sandbox.upstream.issued) == 10
