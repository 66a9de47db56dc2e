# SPDX-License-Identifier: Apache-2.0
"""Only members of the room get a token, and only users of allowed homeservers."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from tests.calls import ALICE, BOB, CAROL, change_policy, counted, room_of
from tests.conftest import StartSandbox
from tests.joins.helpers import (
    EVE,
    HOMESERVER_NOT_ALLOWED,
    NOT_A_MEMBER,
    NOT_STARTED,
    bodies,
    content,
    other_homeserver,
)

DELAY: dict[str, Any] = {"delay_id": "d1", "delay_timeout": 8000, "delay_cs_api_url": "https://sandbox.local"}
MADE_UP = "!made-up:sandbox.local"


def make_outsider(sandbox: Sandbox, room_id: str, how: str) -> str:
    """Somebody who is not joined to the room."""
    if how == "unknown room":
        return MADE_UP
    if how != "knock":
        sandbox.homeserver.leave(room_id, BOB)
    if how in ("ban", "invite", "kick"):
        getattr(sandbox.homeserver, how)(room_id, BOB)
    elif how == "knock":
        sandbox.homeserver.leave(room_id, BOB)
        sandbox.homeserver.knock(room_id, BOB)
    elif how == "never":
        sandbox.homeserver.purge_member(room_id, BOB)
    return room_id


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True], ids=["sfu_get", "get_token"])
@pytest.mark.parametrize("how", ["leave", "kick", "ban", "invite", "knock", "never", "unknown room"])
async def test_only_people_who_are_joined_get_a_token(sandbox: Sandbox, how: str, new: bool) -> None:
    room_id = make_outsider(sandbox, room_of(sandbox), how)
    answer = await sandbox.ask_token(BOB, room_id, new=new, **DELAY)
    assert (answer.code, content(answer)) == (403, NOT_A_MEMBER)
    assert not sandbox.upstream.seen
    assert counted(sandbox, "joins_total", verdict="refused", reason="not_a_member") == 1


@pytest_twisted.ensureDeferred
async def test_joining_the_room_again_counts_at_once_without_a_push(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    for _ in range(3):
        sandbox.homeserver.leave(room_id, BOB)
        await change_policy(sandbox, room_id)  # so that the "joined" of the last round is not believed
        assert (await sandbox.ask_token(BOB, room_id)).code == 403
        sandbox.homeserver.join(room_id, BOB)
        assert (await sandbox.ask_token(BOB, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_somebody_who_joins_the_room_and_its_call_in_the_same_breath_is_let_in(sandbox: Sandbox) -> None:
    """The first answer is from before they joined. It is read a second time."""
    room_id = room_of(sandbox)
    sandbox.homeserver.leave(room_id, BOB)
    refused_once = sandbox.homeserver.seen
    sandbox.reactor.callLater(0.1, sandbox.homeserver.join, room_id, BOB)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    assert len([asked for asked in refused_once if b"memberships" in asked.target]) >= 1


@pytest_twisted.ensureDeferred
async def test_a_bad_openid_token_learns_nothing_about_memberships(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    bad = sandbox.homeserver.openid_token(BOB) | {"access_token": "made-up"}
    answers = [
        await sandbox.ask_token(user, room, openid_token=bad)
        for user, room in ((BOB, room_id), (ALICE, room_id), (BOB, MADE_UP))
    ]
    assert {(answer.code, answer.body) for answer in answers} == {(401, answers[0].body)}
    assert not [asked for asked in sandbox.homeserver.seen if b"/users/" in asked.target]


@pytest_twisted.ensureDeferred
async def test_an_unknown_membership_refuses_nobody(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_lookup_timeout=2)
    room_id = room_of(sandbox)
    sandbox.homeserver.leave(room_id, BOB)
    for route in ("user_joined_rooms", "user_memberships"):
        sandbox.homeserver.faults[route] = Fault.status(500)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    assert counted(sandbox, "fail_open_total", check="membership", reason="status_500") >= 1


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(("setting", "unenforced"), [("log", 1), ("off", 0)])
async def test_guard_members_only_can_be_off_or_only_log(
    start_sandbox: StartSandbox, setting: str, unenforced: int
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only=setting)
    room_id = room_of(sandbox)
    sandbox.homeserver.ban(room_id, BOB)
    assert (await sandbox.ask_token(BOB, room_id)).code == 200
    assert counted(sandbox, "fail_open_total", check="membership", reason="ban_logged_only") == unenforced


# -- users of other homeservers ------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_the_token_of_a_foreign_user_who_is_not_a_member_is_withheld_and_delays_nothing(
    sandbox: Sandbox,
) -> None:
    async with other_homeserver(sandbox) as other:
        room_id = room_of(sandbox)
        sandbox.homeserver.join(room_id, EVE)
        sandbox.homeserver.ban(room_id, EVE)
        for new in (False, True):
            answer = await sandbox.ask_token(EVE, room_id, new=new, openid_token=other.openid_token(EVE), **DELAY)
            assert (answer.code, content(answer)) == (403, NOT_A_MEMBER)
        assert len(sandbox.upstream.issued) == 2
        assert not sandbox.upstream.jobs
        assert not [body for body in bodies(sandbox) if any(key.startswith("delay") for key in body)]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("members_only", ["on", "off"])
async def test_an_admitted_foreign_user_is_asked_for_again_with_the_delay_fields(
    start_sandbox: StartSandbox, members_only: str
) -> None:
    """Also in a room that the guard has never heard of: it may turn out to be full."""
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only=members_only)
    async with other_homeserver(sandbox) as other:
        room_id = room_of(sandbox)
        sandbox.homeserver.join(room_id, EVE)
        answer = await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE), **DELAY)
        assert answer.code == 200
        first, second = bodies(sandbox)
        assert not [key for key in first if key.startswith("delay")]
        assert {key: second[key] for key in DELAY} == DELAY
        assert len(sandbox.upstream.jobs) == 1


@pytest_twisted.ensureDeferred
async def test_a_foreign_user_whose_membership_arrives_late_is_let_in(sandbox: Sandbox) -> None:
    """Federation lags: without any entry the membership is read again and again."""
    async with other_homeserver(sandbox) as other:
        room_id = room_of(sandbox)
        sandbox.reactor.callLater(1.2, sandbox.homeserver.join, room_id, EVE)
        assert (await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE))).code == 200


@pytest_twisted.ensureDeferred
async def test_guard_homeservers_is_applied_before_anything_is_asked(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_homeservers="sandbox.local,*.friends.example")
    async with other_homeserver(sandbox) as other:
        room_id = room_of(sandbox)
        sandbox.homeserver.join(room_id, EVE)
        for new in (False, True):
            answer = await sandbox.ask_token(EVE, room_id, new=new, openid_token=other.openid_token(EVE))
            assert (answer.code, content(answer)) == (403, HOMESERVER_NOT_ALLOWED)
        assert not sandbox.upstream.seen
        assert not other.seen
        asked = [request.path for request in sandbox.homeserver.seen]
        assert not [path for path in asked if "/users/" in path or "/rooms/!" in path or "openid" in path]
        assert (await sandbox.ask_token(ALICE, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_guard_start_homeservers_lets_others_in_once_one_of_theirs_is_in_the_call(
    start_sandbox: StartSandbox,
) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_start_homeservers="sandbox.local")
    async with other_homeserver(sandbox) as other:
        room_id = room_of(sandbox)
        sandbox.homeserver.join(room_id, EVE)
        answer = await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE))
        assert (answer.code, content(answer)) == (403, NOT_STARTED)
        await sandbox.enter(CAROL, room_id)
        assert (await sandbox.ask_token(EVE, room_id, openid_token=other.openid_token(EVE))).code == 200


@pytest_twisted.ensureDeferred
async def test_the_default_limit_yields_to_the_rooms_own_in_both_directions(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_default_max_users=1)
    for own, code in ((None, 403), (2, 200), (0, 200)):
        room_id = room_of(sandbox, own)
        await sandbox.enter(ALICE, room_id)
        assert (await sandbox.ask_token(BOB, room_id)).code == code
