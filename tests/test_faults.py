# SPDX-License-Identifier: Apache-2.0
"""Faults of the dependencies: joins go on, in bounded time, and what passed unenforced is said and counted."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater

from lotusguard.clients.http import Answer
from lotusguard.rules.identity import room_alias
from lotusguard.sandbox.demo.sandbox import KEY, SECRET, Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.tokens import mint
from tests.calls import ALICE, BOB, CAROL, DAVE, room_of
from tests.conftest import StartSandbox, until

ILLNESSES = {
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


def ail_synapse(sandbox: Sandbox, fault: Fault | None) -> None:
    """The admin API is ill; upstream's verifying of OpenID tokens is not, so that joins can go on."""
    for route in ("room_state", "whoami"):
        if fault is None:
            sandbox.homeserver.faults.pop(route, None)
        else:
            sandbox.homeserver.faults[route] = fault


async def timed(asking: Any) -> tuple[Answer, float]:
    began = reactor.seconds()
    return await asking, reactor.seconds() - began


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("illness", ILLNESSES)
async def test_a_join_goes_on_whatever_ails_synapse(start_sandbox: StartSandbox, illness: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=0.2)
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    ail_synapse(sandbox, ILLNESSES[illness])
    answer, seconds = await timed(sandbox.ask_token(ALICE, room_id))
    assert answer.code == 200
    assert seconds < 5
    assert json.loads(answer.body)["jwt"] == sandbox.upstream.issued[-1].token
    assert counted(sandbox, "fail_open_total", check="policy") == 1


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("illness", ILLNESSES)
async def test_a_join_goes_on_whatever_ails_livekit(start_sandbox: StartSandbox, illness: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=1)
    room_id = room_of(sandbox, 1, allow_screenshare=False)
    sandbox.livekit.faults["ListParticipants"] = ILLNESSES[illness]
    for user in (ALICE, BOB):
        answer, seconds = await timed(sandbox.ask_token(user, room_id))
        assert answer.code == 200
        assert seconds < 5
        assert json.loads(answer.body)["jwt"] != sandbox.upstream.issued[-1].token
    assert counted(sandbox, "fail_open_total", check="cap") == 2


@pytest_twisted.ensureDeferred
async def test_after_a_few_failures_nobody_waits_and_a_probe_finds_out_when_it_is_well(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=1)
    rooms = [room_of(sandbox, 1) for _ in range(8)]
    ail_synapse(sandbox, Fault.hang())
    answers = await gatherResults([Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id)) for room_id in rooms[:6]])
    assert [answer.code for answer in answers] == [200] * 6
    assert counted(sandbox, "circuit_open", dependency="synapse") == 1
    answer, seconds = await timed(sandbox.ask_token(ALICE, rooms[6]))
    assert answer.code == 200
    assert seconds < 0.8
    assert counted(sandbox, "fail_open_total", reason="circuit_open") >= 1
    ail_synapse(sandbox, None)
    await until(lambda: counted(sandbox, "circuit_open", dependency="synapse") == 0, seconds=8)
    assert (await sandbox.ask_token(ALICE, rooms[7])).code == 200
    assert (await sandbox.ask_token(BOB, rooms[7])).code == 403


@pytest_twisted.ensureDeferred
async def test_the_last_known_policy_serves_while_synapse_is_away(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.05)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    ail_synapse(sandbox, Fault.close())
    await deferLater(reactor, 0.06)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert counted(sandbox, "cache_lookups_total", cache="policies", result="stale") >= 1


@pytest_twisted.ensureDeferred
async def test_a_last_known_policy_is_not_believed_for_ever(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_policy_ttl=0.05, guard_policy_stale=0.1)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    ail_synapse(sandbox, Fault.close())
    await deferLater(reactor, 0.12)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_one_look_up_serves_all_who_wait_for_it(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 50, allow_camera=False)
    before = sandbox.homeserver.asked["room_state"]
    sandbox.homeserver.faults["room_state"] = Fault.delay(0.1)
    await gatherResults([Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id)) for _ in range(30)])
    assert sandbox.homeserver.asked["room_state"] - before == 2  # one for each type of event
    assert sandbox.livekit.asked["ListParticipants"] == 1


@pytest_twisted.ensureDeferred
async def test_an_old_synapse_that_ignores_the_type_is_filtered_and_asked_once(sandbox: Sandbox) -> None:
    sandbox.homeserver.ignores_type = True
    first, second = room_of(sandbox, 1), room_of(sandbox, 1)
    for room_id in (first, second):
        await sandbox.enter(ALICE, room_id)
        assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert sandbox.homeserver.asked["room_state"] == 3


@pytest_twisted.ensureDeferred
async def test_a_room_that_synapse_does_not_know_has_no_policy(sandbox: Sandbox) -> None:
    room_of(sandbox)
    answer = await sandbox.ask_token(ALICE, "!unknown:sandbox.local")
    assert answer.code == 200
    assert counted(sandbox, "fail_open_total") == 0


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_join_is_held_while_upstream_restarts(sandbox: Sandbox, new: bool) -> None:
    room_id = room_of(sandbox, 2)
    await sandbox.upstream.stop_listening()
    asking = Deferred.fromCoroutine(sandbox.ask_token(ALICE, room_id, new=new))
    await deferLater(reactor, 0.2)
    assert not asking.called
    await sandbox.upstream.listen()
    assert (await asking).code == 200


@pytest_twisted.ensureDeferred
async def test_502_without_cors_while_upstream_refuses_connections(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_grace=0.2)
    room_id = room_of(sandbox, 1)
    await sandbox.upstream.stop_listening()
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code == 502
    assert json.loads(answer.body)["errcode"] == "M_UNKNOWN"
    assert answer.headers.getRawHeaders("access-control-allow-origin") is None
    await sandbox.upstream.listen()
    assert (await sandbox.ask_token(BOB, room_id)).code == 200  # alice's seat was given back


@pytest_twisted.ensureDeferred
async def test_504_without_cors_when_upstream_does_not_answer_in_time(start_sandbox: StartSandbox) -> None:
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
@pytest.mark.parametrize("illness", ["truncated", "too_large", "invalid_response"])
async def test_upstreams_broken_answers_are_no_500(start_sandbox: StartSandbox, illness: str) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_upstream_timeout=2)
    room_id = room_of(sandbox, 1)
    sandbox.upstream.fault = ILLNESSES[illness]
    answer = await sandbox.ask_token(ALICE, room_id)
    assert answer.code in (200, 502)
    sandbox.upstream.fault = None
    assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_kept_alive_connection_that_upstream_closed_is_not_the_callers_problem(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    sandbox.upstream.faults["sfu_get"] = Fault.close(times=1)
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_both_neighbours_hanging_cost_one_budget_and_not_two(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=1, guard_policy_ttl=0.01)
    room_id = room_of(sandbox, 3)
    await sandbox.enter(ALICE, room_id)
    ail_synapse(sandbox, Fault.hang())
    sandbox.livekit.fault = Fault.hang()
    sandbox.upstream.full_access = ["nobody"]
    answer, seconds = await timed(sandbox.ask_token(BOB, room_id))
    assert answer.code == 200
    assert seconds < 1.9


@pytest_twisted.ensureDeferred
async def test_what_passes_unenforced_is_one_event_and_one_count(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.livekit.fault = Fault.status(500)
    sandbox.upstream.full_access = ["nobody"]
    for user in (ALICE, BOB, CAROL, DAVE):
        await sandbox.ask_token(user, room_id)
    assert counted(sandbox, "fail_open_total", check="cap", reason="status_500") == 4
    decisions = list(sandbox.guard.decision_log.decisions)
    assert [decision.unenforced for decision in decisions] == [["cap:status_500"]] * 4


@pytest_twisted.ensureDeferred
async def test_questions_that_synapse_does_not_like_are_no_illness(sandbox: Sandbox) -> None:
    """A caller has a hand in what is asked: that must not stop the guard asking for other rooms."""
    room_id = room_of(sandbox, 1)
    sandbox.homeserver.faults["room_state"] = Fault.status(400, b'{"errcode":"M_INVALID_PARAM"}', times=20)
    for number in range(8):
        assert (await sandbox.ask_token(ALICE, f"!odd{number}:sandbox.local")).code == 200
    sandbox.homeserver.faults.clear()
    assert counted(sandbox, "circuit_open", dependency="synapse") == 0
    assert counted(sandbox, "fail_open_total", check="policy", reason="status_400") == 8
    await sandbox.enter(ALICE, room_id)
    assert (await sandbox.ask_token(BOB, room_id)).code == 403


@pytest_twisted.ensureDeferred
async def test_a_synapse_that_became_newer_is_asked_for_both_types_again(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    old, new = room_of(sandbox, 5), room_of(sandbox, 5, allow_camera=False)
    sandbox.homeserver.ignores_type = True
    await sandbox.enter(ALICE, old)
    sandbox.homeserver.ignores_type = False
    participant = await sandbox.enter(ALICE, new)
    assert not participant.publish("CAMERA")


@pytest_twisted.ensureDeferred
async def test_a_list_of_nobody_may_be_called_not_found(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    sandbox.livekit.faults["ListParticipants"] = Fault.status(404, b'{"code":"not_found","msg":"no such room"}')
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert counted(sandbox, "fail_open_total") == 0


@pytest_twisted.ensureDeferred
async def test_the_call_in_another_slot_is_older_than_the_guard(sandbox: Sandbox) -> None:
    """Its people count as soon as somebody asks for it, and stop counting when they leave."""
    room_id, slot = room_of(sandbox, 1), "m.call#OLDER"
    token = mint(KEY, SECRET, {
        "sub": f"{ALICE}:OLD", "video": {"roomJoin": True, "room": room_alias(room_id, slot)},
    }, now=time.time(), valid_for=3600)  # fmt: skip
    alice = sandbox.livekit.connect(token)
    assert (await sandbox.ask_token(BOB, room_id, new=True, slot_id=slot)).code == 403
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    sandbox.livekit.disconnect(alice.room.name, alice.identity)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
