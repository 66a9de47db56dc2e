# SPDX-License-Identifier: Apache-2.0
"""The stand-in homeserver: the answers that the guard and the authorizer build on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest_twisted
import treq
from twisted.internet import reactor

from lotusguard.sandbox.synapse.homeserver import FakeSynapse

ADMIN = "/_synapse/admin/v1"
CLIENT = "/_matrix/client/v3"


@asynccontextmanager
async def homeserver(**options: Any) -> AsyncIterator[FakeSynapse]:
    standin = FakeSynapse(reactor, **options)
    await standin.start()
    try:
        yield standin
    finally:
        await standin.stop()


async def ask(
    synapse: FakeSynapse, path: str, token: str | None, method: str = "GET", body: Any = None
) -> tuple[int, dict[str, Any]]:
    headers: Any = {"Authorization": f"Bearer {token}"} if token else {}
    data = None if body is None else json.dumps(body).encode()
    response = await treq.request(method, synapse.url + path, headers=headers, data=data)
    return response.code, await treq.json_content(response)


@pytest_twisted.ensureDeferred
async def test_state_by_type_and_all_of_it_from_older_releases() -> None:
    async with homeserver() as synapse:
        token = synapse.add_user("admin", admin=True)
        room_id = synapse.create_room(members=3)
        synapse.set_state(room_id, "io.lotus.voice_limit", {"max_users": 2})
        path = f"{ADMIN}/rooms/{quote(room_id)}/state?type=io.lotus.voice_limit"
        code, answer = await ask(synapse, path, token)
        assert code == 200
        assert [event["content"] for event in answer["state"]] == [{"max_users": 2}]
        synapse.ignores_type = True
        assert len((await ask(synapse, path, token))[1]["state"]) == 7


@pytest_twisted.ensureDeferred
async def test_room_ids_are_decoded_once_and_slashes_in_them_stay() -> None:
    async with homeserver() as synapse:
        token = synapse.add_user("admin", admin=True)
        for room_id in ("!a/../b?c#d%2F:x", "!é"):
            synapse.create_room(room_id=room_id)
            code, _ = await ask(synapse, f"{ADMIN}/rooms/{quote(room_id, safe='')}/members", token)
            assert code == 200


@pytest_twisted.ensureDeferred
async def test_errors_are_synapse_s() -> None:
    async with homeserver() as synapse:
        admin, nobody = synapse.add_user("admin", admin=True), synapse.add_user("nobody")
        path = f"{ADMIN}/rooms/!nowhere/state"
        assert await ask(synapse, path, None) == (
            401,
            {"errcode": "M_MISSING_TOKEN", "error": "Missing access token"},
        )
        code, answer = await ask(synapse, path, "wrong")
        assert (code, answer["errcode"], answer["soft_logout"]) == (401, "M_UNKNOWN_TOKEN", False)
        assert (await ask(synapse, path, nobody))[1]["errcode"] == "M_FORBIDDEN"
        assert await ask(synapse, path, admin) == (404, {"errcode": "M_NOT_FOUND", "error": "Room not found"})
        assert (await ask(synapse, "/nothing", admin))[1]["errcode"] == "M_UNRECOGNIZED"
        assert (await ask(synapse, path, admin, "DELETE"))[0] == 405


@pytest_twisted.ensureDeferred
async def test_rooms_come_in_pages() -> None:
    async with homeserver() as synapse:
        token = synapse.add_user("admin", admin=True)
        made = {synapse.create_room() for _ in range(5)}
        seen: list[str] = []
        at: int | None = 0
        while at is not None:
            _, page = await ask(synapse, f"{ADMIN}/rooms?from={at}&limit=2", token)
            assert page["total_rooms"] == 5
            seen += [room["room_id"] for room in page["rooms"]]
            at = page.get("next_batch")
        assert set(seen) == made
        assert len(seen) == 5


@pytest_twisted.ensureDeferred
async def test_who_am_i_users_and_versions() -> None:
    async with homeserver(server_name="example.org:8448") as synapse:
        token = synapse.add_user("admin", admin=True)
        assert (await ask(synapse, f"{CLIENT}/account/whoami", token))[1]["user_id"] == "@admin:example.org:8448"
        user = "/_synapse/admin/v2/users/@{}:example.org:8448"
        assert (await ask(synapse, user.format("admin"), token))[1]["admin"] is True
        assert (await ask(synapse, user.format("nobody"), token))[0] == 404
        assert (await ask(synapse, "/_synapse/admin/v2/users/@admin:elsewhere.org", token))[0] == 400
        assert (await ask(synapse, f"{ADMIN}/server_version", None))[1] == {"server_version": "1.163.2"}
        assert "v1.11" in (await ask(synapse, "/_matrix/client/versions", None))[1]["versions"]


@pytest_twisted.ensureDeferred
async def test_openid_tokens_last_an_hour() -> None:
    now = 1000.0
    async with homeserver(now=lambda: now) as synapse:
        access = synapse.add_user("alice")
        path = f"{CLIENT}/user/@alice:sandbox.local/openid/request_token"
        code, token = await ask(synapse, path, access, "POST", {})
        assert (code, token["matrix_server_name"], token["expires_in"]) == (200, "sandbox.local", 3600)
        userinfo = f"/_matrix/federation/v1/openid/userinfo?access_token={token['access_token']}"
        assert await ask(synapse, userinfo, None) == (200, {"sub": "@alice:sandbox.local"})
        now += 3601
        assert (await ask(synapse, userinfo, None))[1]["errcode"] == "M_UNKNOWN_TOKEN"
        assert (await ask(synapse, userinfo.split("?")[0], None))[1]["errcode"] == "M_MISSING_TOKEN"
        other = f"{CLIENT}/user/@bob:sandbox.local/openid/request_token"
        assert (await ask(synapse, other, access, "POST", {}))[0] == 403


@pytest_twisted.ensureDeferred
async def test_only_the_room_s_admin_changes_its_state_and_whoever_listens_is_told() -> None:
    async with homeserver() as synapse:
        alice, bob = synapse.add_user("alice"), synapse.add_user("bob")
        room_id = synapse.create_room("alice")
        synapse.join(room_id, "bob")
        told: list[tuple[str, str]] = []
        synapse.on_state_change.append(lambda room, type: told.append((room, type)))
        path = f"{CLIENT}/rooms/{quote(room_id)}/state/io.lotus.voice_limit"
        assert (await ask(synapse, path, bob, "PUT", {"max_users": 9}))[0] == 403
        code, answer = await ask(synapse, path + "/", alice, "PUT", {"max_users": 2})
        assert (code, answer["event_id"][0]) == (200, "$")
        assert told == [(room_id, "io.lotus.voice_limit")]
        assert await ask(synapse, path, bob) == (200, {"max_users": 2})
        assert (await ask(synapse, path + "x", bob))[0] == 404
