# SPDX-License-Identifier: Apache-2.0
"""The stand-in homeserver's members: who is in a room, who may change that, and what the admin API says about it."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
import pytest_twisted

from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from tests.sandbox.test_synapse import ADMIN, CLIENT, ask, homeserver

BOB, ERIN = "@bob:sandbox.local", "@erin:elsewhere.org"


async def admin_get(synapse: FakeSynapse, path: str) -> tuple[int, dict[str, Any]]:
    return await ask(synapse, ADMIN + path, synapse.add_user("admin", admin=True))


async def memberships(synapse: FakeSynapse, user: str) -> tuple[list[str], dict[str, str]]:
    """Joined rooms and memberships, as the admin API has them."""
    joined = await admin_get(synapse, f"/users/{quote(user)}/joined_rooms")
    every = await admin_get(synapse, f"/users/{quote(user)}/memberships")
    assert (joined[0], every[0]) == (200, 200)
    assert joined[1]["total"] == len(joined[1]["joined_rooms"])
    return joined[1]["joined_rooms"], every[1]["memberships"]


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize(
    ("change", "membership"),
    [
        ("invite", "invite"),
        ("knock", "knock"),
        ("leave", "leave"),
        ("kick", "leave"),
        ("ban", "ban"),
        ("unban", "leave"),
    ],
)
@pytest.mark.parametrize("user", [BOB, ERIN])
async def test_each_change_of_membership_is_a_member_event(change: str, membership: str, user: str) -> None:
    async with homeserver() as synapse:
        room_id = synapse.create_room("alice")
        synapse.join(room_id, user)
        assert await memberships(synapse, user) == ([room_id], {room_id: "join"})
        getattr(synapse, change)(room_id, user)
        assert await memberships(synapse, user) == ([], {room_id: membership})
        _, answer = await admin_get(synapse, f"/rooms/{quote(room_id)}/state?type=m.room.member")
        contents = {event["state_key"]: event["content"]["membership"] for event in answer["state"]}
        assert contents == {"@alice:sandbox.local": "join", user: membership}
        assert (await admin_get(synapse, f"/rooms/{quote(room_id)}/members"))[1]["members"] == ["@alice:sandbox.local"]


@pytest_twisted.ensureDeferred
async def test_a_purged_member_has_no_entry_although_others_have() -> None:
    async with homeserver() as synapse:
        room_id = synapse.create_room("alice", joined=["bob", ERIN])
        synapse.purge_member(room_id, ERIN)
        assert await memberships(synapse, ERIN) == ([], {})
        assert await memberships(synapse, BOB) == ([room_id], {room_id: "join"})


@pytest_twisted.ensureDeferred
async def test_a_user_who_was_never_seen_has_no_rooms() -> None:
    async with homeserver() as synapse:
        assert await memberships(synapse, "@nobody:nowhere.org") == ([], {})


@pytest_twisted.ensureDeferred
async def test_older_releases_do_not_have_memberships() -> None:
    async with homeserver(has_memberships=False) as synapse:
        code, answer = await admin_get(synapse, f"/users/{BOB}/memberships")
        assert (code, answer["errcode"]) == (404, "M_UNRECOGNIZED")


@pytest_twisted.ensureDeferred
async def test_state_is_empty_once_the_last_local_user_has_left() -> None:
    async with homeserver() as synapse:
        room_id = synapse.create_room("alice", joined=[ERIN])
        synapse.leave(room_id, "alice")
        assert await admin_get(synapse, f"/rooms/{quote(room_id)}/state") == (200, {"state": []})
        assert (await admin_get(synapse, f"/rooms/{quote(room_id)}/members"))[1] == {"members": [], "total": 0}
        assert await memberships(synapse, ERIN) == ([], {})


@pytest_twisted.ensureDeferred
async def test_room_version_12_lists_no_creators_in_the_power_levels() -> None:
    async with homeserver() as synapse:
        room_id = synapse.create_room("alice", room_version="12", creators=["bob"])
        room = synapse.rooms[room_id]
        assert ":" not in room_id
        assert room.content("m.room.create") == {"room_version": "12", "additional_creators": [BOB]}
        assert room.content("m.room.power_levels") == {"users": {}}
        assert room.power_level("@alice:sandbox.local") == room.power_level(BOB) > 100
        with pytest.raises(ValueError, match="no additional creators"):
            synapse.create_room("alice", creators=["bob"])


@pytest_twisted.ensureDeferred
async def test_clients_join_by_invitation_and_not_after_a_ban() -> None:
    async with homeserver() as synapse:
        alice, bob = synapse.add_user("alice"), synapse.add_user("bob")
        room_id = synapse.create_room("alice")
        path = f"{CLIENT}/rooms/{quote(room_id)}"

        async def post(who: str, what: str, body: Any = None) -> int:
            return (await ask(synapse, f"{path}/{what}", who, "POST", body or {}))[0]

        assert await post(bob, "join") == 403
        assert await post(alice, "invite", {"user_id": BOB}) == 200
        assert await post(bob, "join") == 200
        assert await post(bob, "kick", {"user_id": "@alice:sandbox.local"}) == 403
        assert set((await ask(synapse, f"{path}/joined_members", bob))[1]["joined"]) == {"@alice:sandbox.local", BOB}
        assert await post(alice, "kick", {"user_id": BOB}) == 200
        assert (await ask(synapse, f"{path}/joined_members", bob))[0] == 403
        assert await post(alice, "ban", {"user_id": BOB}) == 200
        assert await post(alice, "invite", {"user_id": BOB}) == 403
        assert await post(bob, "join") == 403
        assert await post(alice, "unban", {"user_id": BOB}) == 200
        synapse.set_state(room_id, "m.room.join_rules", {"join_rule": "public"})
        assert (await ask(synapse, f"{CLIENT}/join/{quote(room_id)}", bob, "POST", {})) == (200, {"room_id": room_id})
        assert await post(bob, "leave") == 200
        assert await post(bob, "leave") == 403
        assert await post(bob, "forget") == 200


@pytest_twisted.ensureDeferred
async def test_a_former_member_reads_the_state_as_it_was() -> None:
    async with homeserver() as synapse:
        bob = synapse.add_user("bob")
        room_id = synapse.create_room("alice", joined=["bob"])
        synapse.set_state(room_id, "io.lotus.voice_limit", {"max_users": 1})
        synapse.kick(room_id, "bob")
        synapse.set_state(room_id, "io.lotus.voice_limit", {"max_users": 2})
        path = f"{CLIENT}/rooms/{quote(room_id)}/state/io.lotus.voice_limit"
        assert await ask(synapse, path, bob) == (200, {"max_users": 1})
        assert (await ask(synapse, path, synapse.add_user("carol")))[0] == 403
        synapse.set_state(room_id, "m.room.history_visibility", {"history_visibility": "world_readable"})
        assert await ask(synapse, path, synapse.add_user("carol")) == (200, {"max_users": 2})


@pytest_twisted.ensureDeferred
async def test_power_levels_decide_who_writes_state() -> None:
    async with homeserver() as synapse:
        bob = synapse.add_user("bob")
        room_id = synapse.create_room("alice", joined=["bob"])
        path = f"{CLIENT}/rooms/{quote(room_id)}/state/io.lotus.voice_limit"
        assert (await ask(synapse, path, bob, "PUT", {}))[0] == 403
        synapse.set_state(room_id, "m.room.power_levels", {"users": {BOB: 50}, "events": {"io.lotus.voice_limit": 50}})
        assert (await ask(synapse, path, bob, "PUT", {}))[0] == 200


@pytest_twisted.ensureDeferred
async def test_every_login_is_a_device() -> None:
    async with homeserver() as synapse:
        first = synapse.add_user("alice", device_id="PHONE")
        assert (await ask(synapse, f"{CLIENT}/account/whoami", first))[1]["device_id"] == "PHONE"
        second = synapse.add_user("alice", device_id="TABLET")
        devices = (await ask(synapse, f"{CLIENT}/devices", first))[1]["devices"]
        assert [device["device_id"] for device in devices] == ["PHONE", "TABLET"]
        synapse.log_out(second)
        assert (await ask(synapse, f"{CLIENT}/devices", second))[0] == 401
