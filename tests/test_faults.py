# SPDX-License-Identifier: Apache-2.0
"""Faults of the dependencies: joins succeed in bounded time, and what was not enforced is logged and counted."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults

from lotusguard.clients.http import Answer
from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.tokens import mint
from tests.calls import ALICE, BOB, CAROL, DAVE, event_about, room_of, tell
from tests.conftest import StartSandbox, until

FAULTS = {
    "slow": Fault.delay(30),
    "hanging": Fault.hang(),
    "500": Fault.status(500),
    "invalid_response": Fault.invalid_response(b"\x00\xff not what you asked for"),
    "truncated": Fault.truncated(),
    "redirecting": Fault.redirect("http://127.0.0.1:9/"),
    "too_large": Fault.too_large(),
    "wrongly typed": Fault.wrong_types(),
    "hanging up": Fault.close(),
}


def counted(sandbox: Sandbox, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    return sum(
        sample.value
        for metric in sandbox.guard.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == f"lotusguard_{name}" and labels.items() <= sample.labels.items()
    )


def break_synapse(sandbox: Sandbox, fault: Fault | None) -> None:
    """The admin API fails; upstream can still verify OpenID tokens, so that joins succeed. None: it works again."""
    for route in ("room_state", "whoami"):
        if fault is None:
            sandbox.homeserver.faults.pop(route, None)
        else:
            sandbox.homeserver.faults[route] = fault


async def timed(asking: Any) -> tuple[Answer, float]:
    began = reactor.seconds()
    return await asking, reactor.seconds() - began


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("fault", FAULTS)
async def test_join_succeeds_despite_any_fault_of_synapse(start_sandbox: StartSandbox, fault: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=0.2)
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    break_synapse(sandbox, FAULTS[fault])
    answer, seconds = await timed(sandbox.ask_token(ALICE, room_id))
    assert answer.code == 200
    assert seconds < 5
    alice = sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    assert alice.publish("SCREEN_SHARE")
    assert counted(sandbox, "fail_open_total", check="policy") == 1


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("fault", FAULTS)
async def test_join_succeeds_despite_any_fault_of_livekit(start_sandbox: StartSandbox, fault: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=1)
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    sandbox.livekit.faults["ListParticipants"] = FAULTS[fault]
    for user in (ALICE, BOB):
        answer, seconds = await timed(sandbox.ask_token(user, room_id))
        assert answer.code == 200
        assert seconds < 5
        assert json.loads(answer.body)["jwt"] != sandbox.upstream.issued[-1].token
    assert counted(sandbox, "fail_open_total", check="limit") == 2


@pytest_twisted.ensureDeferred
async def test_five_failures_open_the_circuit_until_a_probe_succeeds(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(
        guard_reconcile_interval=3600, guard_lookup_timeout=3, guard_server_name="sandbox.local"
    )
    rooms = [room_of(sandbox, 1) for _ in range(8)]
    break_synapse(sandbox, Fault.hang())
    answers = await gatherResults([Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id)) for room_id in rooms[:6]])
    assert [answer.code for answer in answers] == [200] * 6
    assert counted(sandbox, "circuit_open", dependency="synapse") == 1
    answer, seconds = await timed(sandbox.ask_token(ALICE, rooms[6]))
    assert answer.code == 200
    assert seconds < 2.5
    assert counted(sandbox, "fail_open_total", reason="circuit_open") >= 1
    break_synapse(sandbox, None)
    await until(lambda: counted(sandbox, "circuit_open", dependency="synapse") == 0, seconds=8)
    assert (await sandbox.ask_token(ALICE, rooms[7])).code == 200
    assert (await sandbox.ask_token(BOB, rooms[7])).code == 403


@pytest_twisted.ensureDeferred
async def test_the_last_known_policy_is_used_while_synapse_is_down(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    break_synapse(sandbox, Fault.close())
    sandbox.guard.policies.forget_freshness(room_id)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert counted(sandbox, "cache_lookups_total", cache="policies", result="stale") >= 1


@pytest_twisted.ensureDeferred
async def test_the_last_known_policy_is_used_for_a_limited_time(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.05, guard_policy_stale=0.1)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    break_synapse(sandbox, Fault.close())
    end = reactor.seconds() + 15
    while (await sandbox.ask_token(BOB, room_id)).code != 200:
        assert reactor.seconds() < end, "an old policy still serves"


@pytest_twisted.ensureDeferred
async def test_concurrent_joins_share_one_lookup(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 50, allow_camera=False)
    sandbox.homeserver.faults["room_state"] = Fault.delay(0.1)
    await gatherResults([Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id)) for _ in range(30)])
    asked = [asked.target for asked in sandbox.homeserver.seen if b"/state" in asked.target]
    lookups = [target for target in asked if b"%3Aprobe" not in target]
    assert len(lookups) == len(set(lookups)) == 5  # one for each type of event
    assert sandbox.livekit.asked["ListParticipants"] == 1


@pytest_twisted.ensureDeferred
async def test_an_old_synapse_that_ignores_the_type_is_asked_once_per_room(sandbox: Sandbox) -> None:
    sandbox.homeserver.ignores_type = True
    first, second = room_of(sandbox, 1), room_of(sandbox, 1)
    await sandbox.ask_token(ALICE, first)
    before = sandbox.homeserver.asked["room_state"]
    await sandbox.ask_token(ALICE, second)
    assert sandbox.homeserver.asked["room_state"] - before == 1
    assert (await sandbox.ask_token(BOB, second)).code == 403


@pytest_twisted.ensureDeferred
async def test_unknown_room_has_no_members(sandbox: Sandbox) -> None:
    room_of(sandbox)
    answer = await sandbox.ask_token(ALICE, "!unknown:sandbox.local")
    assert answer.code == 403
    assert json.loads(answer.body)["error"] == "You are not a member of this room."
    assert counted(sandbox, "fail_open_total") == 0


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_join_is_held_while_upstream_restarts(sandbox: Sandbox, new: bool) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.upstream.stop_listening()
    asking = Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id, new=new))
    await until(lambda: counted(sandbox, "requests_in_flight") == 1)
    await sandbox.upstream.listen()
    assert (await asking).code == 200


@pytest_twisted.ensureDeferred
async def test_refused_connection_to_upstream_becomes_502_without_cors(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_grace=0.2)
    room_id = room_of(sandbox, 1)
    await sandbox.upstream.stop_listening()
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code == 502
    assert json.loads(answer.body)["errcode"] == "M_UNKNOWN"
    assert answer.headers.getRawHeaders("access-control-allow-origin") is None
    await sandbox.upstream.listen()
    assert (await sandbox.ask_token(BOB, room_id)).code == 200  # alice's seat was released


@pytest_twisted.ensureDeferred
async def test_late_answer_of_upstream_becomes_504_without_cors(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_timeout=1)
    room_id = room_of(sandbox, 1)
    sandbox.upstream.fault = Fault.hang()
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code == 504
    assert json.loads(answer.body)["errcode"] == "M_UNKNOWN"
    assert answer.headers.getRawHeaders("access-control-allow-origin") is None
    sandbox.upstream.fault = None
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("fault", ["truncated", "too_large", "invalid_response"])
async def test_broken_answer_of_upstream_is_relayed_or_becomes_502(start_sandbox: StartSandbox, fault: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_timeout=2)
    room_id = room_of(sandbox, 1)
    sandbox.upstream.fault = FAULTS[fault]
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code in (200, 502)
    sandbox.upstream.fault = None
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


async def keep_connections(sandbox: Sandbox, room_id: str) -> None:
    """Several used connections to upstream stay open: one for a join, although the guard may be probing upstream."""
    answers = await gatherResults([Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id)) for _ in range(3)])
    assert [answer.code for answer in answers] == [200] * 3


@pytest_twisted.ensureDeferred
async def test_a_kept_alive_connection_that_upstream_closed_is_replaced(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    await keep_connections(sandbox, room_id)
    sandbox.upstream.faults["sfu_get"] = Fault.close(times=1)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_token_request_is_sent_once_more_on_a_used_connection_and_never_on_a_new_one(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    await keep_connections(sandbox, room_id)
    sandbox.upstream.faults["sfu_get"] = Fault.late_close()
    for sent in (2, 1):  # on a connection that was used before, then on a new one
        before = sandbox.upstream.asked["sfu_get"]
        assert (await sandbox.ask_token(ALICE, room_id)).code == 502
        assert sandbox.upstream.asked["sfu_get"] - before == sent
        await sandbox.upstream.drop_connections()


@pytest_twisted.ensureDeferred
async def test_only_joins_are_held_while_upstream_is_down(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_grace=60)
    room_id = room_of(sandbox, 2)
    alice = await sandbox.enter(ALICE, room_id)
    await sandbox.livekit.drained()
    await sandbox.upstream.stop_listening()
    accepted = counted(sandbox, "webhooks_total", outcome="accepted")
    preflight = Deferred.fromCoroutine(sandbox.request("OPTIONS", f"{sandbox.url}/sfu/get"))
    told = await tell(sandbox, event_about("participant_left", alice))
    assert (told.code, (await sandbox.request("GET", f"{sandbox.url}/healthz")).code) == (502, 502)
    assert counted(sandbox, "webhooks_total", outcome="accepted") == accepted + 1
    assert not preflight.called
    await sandbox.upstream.listen()
    assert (await preflight).code == 200


@pytest_twisted.ensureDeferred
async def test_two_hanging_dependencies_cost_one_lookup_timeout(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=3, guard_policy_ttl=0.0001)
    room_id = room_of(sandbox, 3)
    await sandbox.enter(ALICE, room_id)
    break_synapse(sandbox, Fault.hang())
    sandbox.livekit.fault = Fault.hang()
    sandbox.upstream.full_access = ["nobody"]
    answer, seconds = await timed(sandbox.ask_token(BOB, room_id))
    assert answer.code == 200
    assert seconds < 5.5


@pytest_twisted.ensureDeferred
async def test_unenforced_join_is_logged_once_and_counted_once(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.livekit.fault = Fault.status(500)
    sandbox.upstream.full_access = ["nobody"]
    for user in (ALICE, BOB, CAROL, DAVE):
        await sandbox.ask_token(user, room_id)
    assert counted(sandbox, "fail_open_total", check="limit", reason="status_500") == 4
    decisions = list(sandbox.guard.decision_log.decisions)
    assert [decision.unenforced for decision in decisions] == [["limit:status_500"]] * 4


@pytest_twisted.ensureDeferred
async def test_requests_that_synapse_rejects_do_not_open_its_circuit(start_sandbox: StartSandbox) -> None:
    """A client chooses the room: that must not stop lookups of other rooms."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only="off")
    room_id = room_of(sandbox, 1)
    sandbox.homeserver.faults["room_state"] = Fault.status(400, b'{"errcode":"M_INVALID_PARAM"}', times=40)
    for number in range(8):
        assert (await sandbox.ask_token(ALICE, f"!odd{number}:sandbox.local")).code == 200
    sandbox.homeserver.faults.clear()
    assert counted(sandbox, "circuit_open", dependency="synapse") == 0
    assert counted(sandbox, "fail_open_total", check="policy", reason="status_400") == 8
    await sandbox.enter(ALICE, room_id)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_upgraded_synapse_is_asked_for_each_type_again(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    old, new = room_of(sandbox, 5), room_of(sandbox, 5, allow_camera=False)
    sandbox.homeserver.ignores_type = True
    await sandbox.enter(ALICE, old)
    sandbox.homeserver.ignores_type = False
    participant = await sandbox.enter(ALICE, new)
    assert not participant.publish("CAMERA")


@pytest_twisted.ensureDeferred
async def test_an_sfu_room_that_does_not_exist_has_no_participants(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.livekit.faults["ListParticipants"] = Fault.status(404, b'{"code":"not_found","msg":"no such room"}')
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert counted(sandbox, "fail_open_total") == 0


@pytest_twisted.ensureDeferred
async def test_call_in_another_slot_that_began_before_the_guard_counts(sandbox: Sandbox) -> None:
    """Its participants count as soon as somebody asks for a token there, and until they leave."""
    room_id, slot = room_of(sandbox, 1), "m.call#OLDER"
    token = mint(KEY, SECRET, {
        "sub": f"{ALICE}:OLD", "video": {"roomJoin": True, "room": room_alias(room_id, slot)},
    }, now=time.time(), valid_for=3600)  # fmt: skip
    alice = sandbox.livekit.connect(token)
    assert (await sandbox.ask_token(BOB, room_id, new=True, slot_id=slot)).code == 403
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
