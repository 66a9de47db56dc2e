# SPDX-License-Identifier: Apache-2.0
"""The stand-in homeserver for an account that is in rooms: ``/sync``, messages, reactions and redactions."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote, urlencode

import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from tests.conftest import until
from tests.sandbox.test_synapse import CLIENT, ask, homeserver

LIMIT = "io.lotus.voice_limit"


async def sync(synapse: FakeSynapse, token: str, **query: Any) -> dict[str, Any]:
    given = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in query.items()}
    code, answer = await ask(synapse, f"{CLIENT}/sync?{urlencode(given)}", token)
    assert code == 200, answer
    return answer


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def only(*names: str, **more: Any) -> dict[str, Any]:
    """A filter that names these types in the timeline and in the state."""
    return {"room": {"timeline": {"types": list(names), **more}, "state": {"types": list(names)}}}


@pytest_twisted.ensureDeferred
async def test_first_sync_has_state_and_timeline_of_joined_rooms() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        room_id = synapse.create_room("alice", joined=["bot"])
        synapse.create_room("alice")
        synapse.set_state(room_id, LIMIT, {"max_users": 1})
        synapse.send_message(room_id, "alice", "hello")
        answer = await sync(synapse, bot, filter=only("m.*", LIMIT, limit=1))
        assert list(answer["rooms"]) == ["join"]
        assert list(answer["rooms"]["join"]) == [room_id]
        room = answer["rooms"]["join"][room_id]
        assert types(room["timeline"]["events"]) == ["m.room.message"]
        assert room["timeline"]["limited"] is True
        state = {(event["type"], event["state_key"]): event["content"] for event in room["state"]["events"]}
        assert state[LIMIT, ""] == {"max_users": 1}
        assert state["m.room.member", "@bot:sandbox.local"]["membership"] == "join"
        assert "room_id" not in room["timeline"]["events"][0]


@pytest_twisted.ensureDeferred
async def test_a_type_that_the_timeline_filter_lacks_is_reported_nowhere() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        room_id = synapse.create_room("alice", joined=["bot"])
        since = (await sync(synapse, bot))["next_batch"]
        synapse.set_state(room_id, LIMIT, {"max_users": 1})
        state_only = {"room": {"timeline": {"types": ["m.room.message"]}, "state": {"types": [LIMIT]}}}
        assert "rooms" not in await sync(synapse, bot, since=since, filter=state_only)
        answer = await sync(synapse, bot, since=since, filter=only(LIMIT))
        room = answer["rooms"]["join"][room_id]
        assert (types(room["timeline"]["events"]), room["state"]["events"]) == ([LIMIT], [])


@pytest_twisted.ensureDeferred
async def test_a_gap_before_a_limited_timeline_is_covered_by_the_state() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        room_id = synapse.create_room("alice", joined=["bot"])
        since = (await sync(synapse, bot))["next_batch"]
        for seats in (1, 2):
            synapse.set_state(room_id, LIMIT, {"max_users": seats})
        for _ in range(3):
            synapse.send_message(room_id, "alice", "hello")
        answer = await sync(synapse, bot, since=since, filter=only(LIMIT, "m.room.message", limit=3))
        room = answer["rooms"]["join"][room_id]
        assert (types(room["timeline"]["events"]), room["timeline"]["limited"]) == (["m.room.message"] * 3, True)
        assert [event["content"] for event in room["state"]["events"]] == [{"max_users": 2}]


@pytest_twisted.ensureDeferred
async def test_a_long_poll_ends_with_the_next_wanted_event_and_wakes_after_modules() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        room_id = synapse.create_room("alice", joined=["bot"])
        since = (await sync(synapse, bot))["next_batch"]
        order: list[str] = []
        polling = Deferred.fromCoroutine(sync(synapse, bot, since=since, timeout=60_000, filter=only(LIMIT)))

        def note(answer: dict[str, Any]) -> dict[str, Any]:
            order.append("sync")
            return answer

        polling.addCallback(note)
        await until(lambda: synapse.asked["sync"] == 2)
        synapse.on_state_change.append(lambda room, type: order.append("module"))
        synapse.send_message(room_id, "alice", "not wanted")
        synapse.set_state(room_id, LIMIT, {})
        answer = await polling
        assert types(answer["rooms"]["join"][room_id]["timeline"]["events"]) == [LIMIT]
        assert order == ["module", "sync"]


@pytest_twisted.ensureDeferred
async def test_a_long_poll_without_events_ends_empty_after_its_timeout() -> None:
    clock = Clock()
    async with homeserver(clock=clock) as synapse:
        bot = synapse.add_user("bot")
        since = (await sync(synapse, bot))["next_batch"]
        polling = Deferred.fromCoroutine(sync(synapse, bot, since=since, timeout=30_000))
        await until(lambda: synapse.asked["sync"] == 2)
        clock.advance(29)
        assert not polling.called
        clock.advance(1)
        answer = await polling
        assert answer["next_batch"] == since
        assert "rooms" not in answer


@pytest_twisted.ensureDeferred
async def test_invitation_join_kick_and_ban_come_in_their_sections() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        room_id = synapse.create_room("alice")

        async def next_section(since: str | None) -> tuple[str, dict[str, Any], str]:
            answer = await sync(synapse, bot, **({} if since is None else {"since": since}))
            ((section, rooms),) = answer["rooms"].items()
            return section, rooms[room_id], answer["next_batch"]

        synapse.invite(room_id, "bot", sender="alice")
        section, room, since = await next_section(None)
        invitation = room["invite_state"]["events"][-1]
        assert (section, invitation["sender"], invitation["content"]["membership"]) == (
            "invite",
            "@alice:sandbox.local",
            "invite",
        )
        assert "rooms" not in await sync(synapse, bot, since=since)
        synapse.set_state(room_id, LIMIT, {"max_users": 1})
        assert (await ask(synapse, f"{CLIENT}/join/{quote(room_id)}", bot, "POST", {}))[0] == 200
        section, room, since = await next_section(since)
        events = room["timeline"]["events"] + room["state"]["events"]
        assert (section, room["timeline"]["limited"]) == ("join", True)
        assert LIMIT in types(events)
        for change in (synapse.kick, synapse.ban):
            change(room_id, "bot", sender="alice")
            section, room, since = await next_section(since)
            assert (section, room["timeline"]["events"][-1]["state_key"]) == ("leave", "@bot:sandbox.local")
        synapse.set_state(room_id, LIMIT, {"max_users": 2})
        assert "rooms" not in await sync(synapse, bot, since=since)
        assert "rooms" not in await sync(synapse, bot)


@pytest_twisted.ensureDeferred
async def test_filters_are_stored_per_user() -> None:
    async with homeserver() as synapse:
        bot, alice = synapse.add_user("bot"), synapse.add_user("alice")
        room_id = synapse.create_room("alice", joined=["bot"])
        path = f"{CLIENT}/user/{quote('@bot:sandbox.local')}/filter"
        code, answer = await ask(synapse, path, bot, "POST", only("m.room.create"))
        assert code == 200
        stored = await ask(synapse, f"{path}/{answer['filter_id']}", bot)
        assert stored == (200, only("m.room.create"))
        assert (await ask(synapse, path, alice, "POST", {}))[0] == 403
        room = (await sync(synapse, bot, filter=answer["filter_id"]))["rooms"]["join"][room_id]
        assert types(room["timeline"]["events"]) == ["m.room.create"]
        assert (await ask(synapse, f"{CLIENT}/sync?filter=7", bot))[0] == 400
        assert (await ask(synapse, f"{CLIENT}/sync?since=nonsense", bot))[0] == 400


@pytest_twisted.ensureDeferred
async def test_set_presence_is_online_unless_the_client_says_otherwise() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        await sync(synapse, bot)
        assert synapse.sync_api.presence == {"@bot:sandbox.local": "online"}
        await sync(synapse, bot, set_presence="offline")
        assert synapse.sync_api.presence == {"@bot:sandbox.local": "offline"}


@pytest_twisted.ensureDeferred
async def test_sync_deletes_the_device_s_messages_whatever_the_filter() -> None:
    async with homeserver() as synapse:
        bot, other = synapse.add_user("bot"), synapse.add_user("bot")
        for token in (bot, other):
            synapse.sync_api.send_to_device(token, "m.room_key", {}, "alice")
        first = await sync(synapse, bot, filter=only())
        assert types(first["to_device"]["events"]) == ["m.room_key"]
        second = await sync(synapse, bot, since=first["next_batch"])
        assert "to_device" not in second
        assert "to_device" not in await sync(synapse, bot)
        assert "to_device" in await sync(synapse, other)


@pytest_twisted.ensureDeferred
async def test_messages_are_sent_once_per_transaction() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        room_id = synapse.create_room("alice", joined=["bot"])
        path = f"{CLIENT}/rooms/{quote(room_id)}/send/m.room.message"
        content = {"msgtype": "m.notice", "body": "Erin is waiting."}
        first = await ask(synapse, f"{path}/1", bot, "PUT", content)
        assert first == await ask(synapse, f"{path}/1", bot, "PUT", content)
        second = await ask(synapse, f"{path}/2", bot, "PUT", content)
        sent = [event["event_id"] for _, event in synapse.rooms[room_id].timeline if event["type"] == "m.room.message"]
        assert sent == [first[1]["event_id"], second[1]["event_id"]]
        synapse.kick(room_id, "bot")
        assert (await ask(synapse, f"{path}/3", bot, "PUT", content))[0] == 403


@pytest_twisted.ensureDeferred
async def test_in_encrypted_rooms_messages_are_encrypted_and_reactions_are_not() -> None:
    async with homeserver() as synapse:
        bot = synapse.add_user("bot")
        room_id = synapse.create_room("alice", joined=["bot"], encrypted=True)
        since = (await sync(synapse, bot))["next_batch"]
        message = synapse.send_message(room_id, "alice", "secret")
        synapse.react(room_id, "alice", message, "✅")
        room = (await sync(synapse, bot, since=since))["rooms"]["join"][room_id]
        encrypted, reaction = room["timeline"]["events"]
        assert (encrypted["type"], "secret" in json.dumps(encrypted)) == ("m.room.encrypted", False)
        assert reaction["content"]["m.relates_to"] == {"rel_type": "m.annotation", "event_id": message, "key": "✅"}


@pytest_twisted.ensureDeferred
async def test_redaction_empties_the_event_and_needs_permission_for_those_of_others() -> None:
    async with homeserver() as synapse:
        alice, bot = synapse.add_user("alice"), synapse.add_user("bot")
        room_id = synapse.create_room("alice", joined=["bot"])
        limit = synapse.set_state(room_id, LIMIT, {"max_users": 1}, sender="alice")
        since = (await sync(synapse, bot))["next_batch"]
        told: list[str] = []
        synapse.on_state_change.append(lambda room, type: told.append(type))
        path = f"{CLIENT}/rooms/{quote(room_id)}/redact/{quote(limit)}"
        assert (await ask(synapse, f"{path}/1", bot, "PUT", {}))[0] == 403
        assert (await ask(synapse, f"{path}/2", alice, "PUT", {"reason": "test"}))[0] == 200
        assert synapse.rooms[room_id].content(LIMIT) == {}
        assert told == [LIMIT]
        events = (await sync(synapse, bot, since=since))["rooms"]["join"][room_id]["timeline"]["events"]
        assert [(event["type"], event["redacts"]) for event in events] == [("m.room.redaction", limit)]


@pytest_twisted.ensureDeferred
async def test_stopping_ends_long_polls() -> None:
    synapse = FakeSynapse(reactor)
    await synapse.start()
    bot = synapse.add_user("bot")
    since = (await sync(synapse, bot))["next_batch"]
    polling = Deferred.fromCoroutine(sync(synapse, bot, since=since, timeout=600_000))
    await until(lambda: synapse.asked["sync"] == 2)
    await synapse.stop()
    failed: list[Any] = []
    polling.addErrback(failed.append)
    await until(lambda: failed)
    assert not synapse.in_flight
