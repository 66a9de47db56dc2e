# SPDX-License-Identifier: Apache-2.0
"""The guard with a real homeserver: policies that room admins write, OpenID tokens of real users."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_twisted

from lotusguard.clients.http import Answer
from lotusguard.rules.jwt import read_unverified
from tests.conftest import until
from tests.homeserver import Homeserver
from tests.synapse import Guarded, MakeGuarded, Synapse, User

VOICE_LIMIT, ROOM_QUALITY = "io.lotus.voice_limit", "io.lotus.room_quality"
FULL = {"errcode": "M_FORBIDDEN", "error": "This voice channel is full."}


async def users_of(synapse: Homeserver) -> tuple[User, User, User]:
    return await synapse.user("alice"), await synapse.user("bob"), await synapse.user("carol")


def video_of(answer: Answer) -> dict[str, Any]:
    claims = read_unverified(json.loads(answer.body)["jwt"])
    assert claims is not None
    video: dict[str, Any] = claims["video"]
    return video


async def ready(guarded: Guarded) -> tuple[int, dict[str, Any]]:
    answer = await guarded.sandbox.operator("GET", "/readyz")
    return answer.code, json.loads(answer.body)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("room_version", ["10", "12"])
async def test_the_limit_of_a_room_holds_on_both_routes(guarded: Guarded, room_version: str) -> None:
    """From version 12 on, room IDs contain no server name."""
    synapse, sandbox = guarded.synapse, guarded.sandbox
    alice, bob, carol = await users_of(synapse)
    room_id = await synapse.room_of(alice, bob, carol, room_version=room_version)
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
    await guarded.enter(alice, room_id)
    bobs = await guarded.enter(bob, room_id, new=True)
    issued = len(sandbox.upstream.issued)
    for new in (False, True):
        answer = await guarded.ask_token(carol, room_id, new=new)
        assert (answer.code, json.loads(answer.body)) == (403, FULL)
        assert (await guarded.ask_token(alice, room_id, new=new, device="TABLET")).code == 200
    assert [one.user for one in sandbox.upstream.issued][issued:] == [alice.user_id] * 2
    sandbox.livekit.disconnect(bobs.room.name, bobs.identity)
    assert (await guarded.ask_token(carol, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_raised_limit_admits_the_next_user(set_guarded: MakeGuarded) -> None:
    guarded = await set_guarded(guard_policy_ttl=0.0001)
    alice, bob, _ = await users_of(guarded.synapse)
    room_id = await guarded.synapse.room_of(alice, bob)
    await guarded.synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    await guarded.enter(alice, room_id)
    assert (await guarded.ask_token(bob, room_id, new=True)).code == 403
    await guarded.synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
    assert (await guarded.ask_token(bob, room_id, new=True)).code == 200


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_sources_that_the_rooms_admin_forbids_are_not_in_the_token(guarded: Guarded, new: bool) -> None:
    alice, bob, _ = await users_of(guarded.synapse)
    room_id = await guarded.synapse.room_of(alice, bob)
    await guarded.synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False, "allow_camera": True})
    answer = await guarded.ask_token(bob, room_id, new=new)
    assert video_of(answer)["canPublishSources"] == ["microphone", "camera"]
    bobs = guarded.sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    assert bobs.publish("CAMERA")
    assert not bobs.publish("SCREEN_SHARE")


@pytest_twisted.ensureDeferred
async def test_a_room_that_the_homeserver_does_not_know_has_no_policy(set_guarded: MakeGuarded) -> None:
    guarded = await set_guarded(guard_members_only="off", guard_tokens="policy")
    alice, _, _ = await users_of(guarded.synapse)
    answer = await guarded.ask_token(alice, "!nowhere:real.test")
    assert answer.code == 200
    assert json.loads(answer.body)["jwt"] == guarded.sandbox.upstream.issued[-1].token
    decided = json.loads((await guarded.sandbox.operator("GET", "/rooms")).body)["decisions"][-1]
    assert (decided["reason"], decided["unenforced"]) == ("no_policy", [])


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_bad_openid_token_gets_upstreams_own_401_from_a_full_room(guarded: Guarded, new: bool) -> None:
    alice, bob, carol = await users_of(guarded.synapse)
    room_id = await guarded.synapse.room_of(alice, bob, carol)
    await guarded.synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    await guarded.enter(bob, room_id)
    false = {**await guarded.synapse.openid_token(carol), "access_token": "nobodysToken"}
    answer = await guarded.ask_token(carol, room_id, new=new, openid_token=false)
    refusal = {"errcode": "M_UNAUTHORIZED", "error": "The request could not be authorised."}
    assert (answer.code, json.loads(answer.body)) == (401, refusal)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("new", [False, True])
async def test_a_user_of_another_homeserver_is_decided_on_after_upstream_verified_them(
    set_guarded: MakeGuarded, new: bool
) -> None:
    """The other homeserver is the sandbox's stand-in, which upstream can ask and the guard cannot."""
    guarded = await set_guarded(guard_members_only="off")
    synapse, sandbox = guarded.synapse, guarded.sandbox
    alice, _, _ = await users_of(synapse)
    room_id = await synapse.create_room(alice)
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    alices = await guarded.enter(alice, room_id)
    sandbox.homeserver.add_user("dora")
    issued = len(sandbox.upstream.issued)
    answer = await sandbox.ask_token("@dora:sandbox.local", room_id, new=new)
    assert (answer.code, json.loads(answer.body)) == (403, FULL)
    assert len(sandbox.upstream.issued) == issued + 1
    sandbox.livekit.disconnect(alices.room.name, alices.identity)
    assert (await sandbox.ask_token("@dora:sandbox.local", room_id, new=new)).code == 200


@pytest_twisted.ensureDeferred
async def test_server_name_is_read_from_the_homeserver_unless_it_is_set(set_guarded: MakeGuarded) -> None:
    """Users of the server whose name we know can be refused before upstream is asked."""
    synapse = (await set_guarded()).synapse
    alice, bob, _ = await users_of(synapse)
    room_id = await synapse.room_of(alice, bob)
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    for settings, asked_upstream in (({}, 0), ({"guard_server_name": "elsewhere.test"}, 1)):
        guarded = await set_guarded(**settings)
        await guarded.enter(alice, room_id)
        issued = len(guarded.sandbox.upstream.issued)
        assert (await guarded.ask_token(bob, room_id)).code == 403
        assert len(guarded.sandbox.upstream.issued) == issued + asked_upstream


@pytest_twisted.ensureDeferred
async def test_guard_with_an_admins_token_is_ready(guarded: Guarded) -> None:
    code, report = await ready(guarded)
    assert (code, report["ready"], report["reasons"]) == (200, True, [])


@pytest_twisted.ensureDeferred
async def test_with_an_ordinary_users_token_only_rooms_of_that_user_are_enforced(
    set_guarded: MakeGuarded, synapse: Synapse
) -> None:
    alice, bob, carol = await users_of(synapse)
    guarded = await set_guarded(matrix_token=carol.token, guard_tokens="policy")
    room_id = await synapse.room_of(alice, bob)
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    await guarded.enter(alice, room_id)
    assert (await guarded.ask_token(bob, room_id)).code == 200
    _, report = await ready(guarded)
    assert report["rooms"]["admin_api"] == "no"
    assert [reason for reason in report["reasons"] if reason.startswith("MATRIX_TOKEN is not an admin's")]


@pytest_twisted.ensureDeferred
async def test_with_an_invalid_token_joins_are_allowed_and_the_guard_is_not_ready(
    set_guarded: MakeGuarded, synapse: Synapse
) -> None:
    alice, bob, _ = await users_of(synapse)
    guarded = await set_guarded(matrix_token="syt_nobody", guard_tokens="policy")
    room_id = await synapse.room_of(alice, bob)
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    await guarded.enter(alice, room_id)
    answer = await guarded.ask_token(bob, room_id)
    assert answer.code == 200
    assert json.loads(answer.body)["jwt"] == guarded.sandbox.upstream.issued[-1].token
    code, report = await ready(guarded)
    assert (code, report["ready"]) == (503, False)
    assert report["enforcing"] == dict.fromkeys(("limit", "sources", "membership", "in_call"), False)
    assert [reason for reason in report["reasons"] if "status_401" in reason]


@pytest_twisted.ensureDeferred
async def test_an_address_without_the_admin_api_does_not_mean_that_rooms_have_no_policy(
    set_guarded: MakeGuarded, synapse: Synapse
) -> None:
    """A proxy that does not forward the admin API answers 404, too."""
    alice, _, _ = await users_of(synapse)
    guarded = await set_guarded(synapse_api=f"{synapse.url}/elsewhere")
    room_id = await synapse.create_room(alice)
    assert (await guarded.ask_token(alice, room_id)).code == 200
    decided = json.loads((await guarded.sandbox.operator("GET", "/rooms")).body)["decisions"][-1]
    assert decided["unenforced"] == ["policy:status_404", "membership:status_404"]
    code, report = await ready(guarded)
    assert (code, report["enforcing"]["limit"]) == (503, False)


@pytest_twisted.ensureDeferred
async def test_a_call_from_before_the_start_is_found_among_the_homeservers_rooms(
    set_guarded: MakeGuarded,
) -> None:
    guarded = await set_guarded(guard_reconcile_interval=0.2)
    synapse, sandbox = guarded.synapse, guarded.sandbox
    alice, _, _ = await users_of(synapse)
    room_id = await synapse.create_room(alice)
    await synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False})
    body = {"room": room_id, "device_id": "PHONE", "openid_token": await synapse.openid_token(alice)}
    past_the_guard = await sandbox.request("POST", f"{sandbox.upstream.url}/sfu/get", json.dumps(body).encode())
    alices = sandbox.livekit.connect(json.loads(past_the_guard.body)["jwt"])
    assert alices.publish("SCREEN_SHARE")
    await until(lambda: not alices.tracks, 10)
