# SPDX-License-Identifier: Apache-2.0
"""The stand-in homeserver answers as the real one: the same requests are made of both, and the answers compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import pytest_twisted
import treq
from attrs import Factory, define
from twisted.internet import reactor

from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from tests.synapse import Synapse

CLIENT, ADMIN = "/_matrix/client/v3", "/_synapse/admin/v1"
LIMIT = "io.lotus.voice_limit"
WANTED = [LIMIT, "m.room.member"]
FILTER = {"room": {"timeline": {"types": WANTED}, "state": {"types": WANTED}}}
MESSAGE = {"msgtype": "m.text", "body": "hello"}

Pick = Callable[[Any], Any]


def rooms_in(answer: dict[str, Any]) -> dict[str, Any]:
    """What a sync says about rooms, without IDs and times."""
    found = {}
    for section, rooms in answer.get("rooms", {}).items():
        for room in rooms.values():
            timeline = room.get("timeline", {})
            found[section] = {
                "timeline": [event["type"] for event in timeline.get("events", [])],
                "limited": timeline.get("limited"),
                "state": sorted(event["type"] for event in room.get("state", {}).get("events", [])),
                "invite_state": sorted(event["type"] for event in room.get("invite_state", {}).get("events", [])),
            }
    return found


@define
class Caller:
    """Makes requests of one homeserver and records the answers.

    :ivar tokens: access tokens by name.
    """

    url: str
    tokens: dict[str, str]
    user_id: str
    room_id: str
    answers: list[tuple[str, int, Any]] = Factory(list)

    async def ask(self, who: str, method: str, path: str, content: Any = None, pick: Pick = sorted) -> Any:
        """:param pick: the part of a good answer to record; by default its keys."""
        headers: Any = {"Authorization": f"Bearer {self.tokens[who]}"}
        data = None if content is None else json.dumps(content).encode()
        response = await treq.request(method, self.url + path, headers=headers, data=data)
        answer = await treq.json_content(response)
        seen = pick(answer) if response.code == 200 else answer["errcode"]
        shown = path.partition("?")[0].replace(quote(self.room_id), "ROOM").replace(quote(self.user_id), "USER")
        shown = "/redact" if "/redact/" in shown else shown
        self.answers.append((f"{who}: {method} {shown}", response.code, seen))
        return answer

    async def post(self, who: str, action: str, user_id: str = "") -> None:
        await self.ask(who, "POST", f"{self.room}/{action}", {"user_id": user_id} if user_id else {})

    async def send(self, who: str, transaction: str, type: str = "m.room.message", content: Any = None) -> str:
        path = f"{self.room}/send/{type}/{transaction}"
        return str((await self.ask(who, "PUT", path, content or MESSAGE)).get("event_id"))

    async def set_limit(self, who: str, seats: int) -> None:
        await self.ask(who, "PUT", f"{self.room}/state/{LIMIT}/", {"max_users": seats})

    async def sync(self, since: str | None, wanted: Any = FILTER) -> str:
        query = {"timeout": 0, "set_presence": "offline", "filter": json.dumps(wanted)}
        path = f"{CLIENT}/sync?{urlencode(query | ({'since': since} if since else {}))}"
        return str((await self.ask("bot", "GET", path, pick=rooms_in))["next_batch"])

    async def memberships(self) -> None:
        user = f"{ADMIN}/users/{quote(self.user_id)}"
        await self.ask("admin", "GET", f"{user}/memberships", pick=lambda it: list(it["memberships"].values()))
        await self.ask("admin", "GET", f"{user}/joined_rooms", pick=lambda it: (it["total"], len(it["joined_rooms"])))

    @property
    def room(self) -> str:
        return f"{CLIENT}/rooms/{quote(self.room_id)}"

    @property
    def server_name(self) -> str:
        return self.user_id.partition(":")[2]


async def strangers(caller: Caller) -> None:
    """What somebody gets who is not in the room, and what is unknown."""
    await caller.memberships()
    for action in ("join", "leave"):
        await caller.post("bot", action)
    await caller.ask("bot", "GET", f"{caller.room}/state/{LIMIT}/")
    await caller.send("bot", "stranger")
    unknown = quote(f"!unknown:{caller.server_name}")
    await caller.ask("bot", "POST", f"{CLIENT}/join/{unknown}", {})
    await caller.ask("bot", "POST", f"{CLIENT}/rooms/{unknown}/leave", {})
    await caller.ask("bot", "GET", f"{CLIENT}/rooms/{unknown}/state/{LIMIT}/")
    await caller.ask("bot", "POST", f"{CLIENT}/knock/{quote(caller.room_id)}", {})
    await caller.ask("bot", "GET", f"{CLIENT}/sync?since=nonsense")
    await caller.ask("bot", "GET", f"{CLIENT}/sync?filter=7")
    await caller.ask("admin", "GET", f"{ADMIN}/rooms/{unknown}/state")
    for user in ("@x:other.org", f"@nobody:{caller.server_name}"):
        await caller.ask("admin", "GET", f"/_synapse/admin/v2/users/{quote(user)}")
        await caller.ask("admin", "GET", f"{ADMIN}/users/{quote(user)}/joined_rooms", pick=lambda it: it)
    await caller.ask("bot", "GET", f"{ADMIN}/users/{quote(caller.user_id)}/joined_rooms")
    await caller.ask("bot", "GET", f"{CLIENT}/account/whoami")
    await caller.ask("bot", "GET", f"{CLIENT}/devices", pick=lambda it: sorted(it["devices"][0]))


async def invited(caller: Caller) -> str:
    since = await caller.sync(None)
    await caller.post("alice", "invite", caller.user_id)
    await caller.memberships()
    since = await caller.sync(await caller.sync(since))
    await caller.set_limit("alice", 1)
    since = await caller.sync(since)
    await caller.post("bot", "forget")
    return since


async def joined(caller: Caller, since: str) -> str:
    await caller.post("bot", "join")
    since = await caller.sync(since)
    await caller.memberships()
    await caller.ask("bot", "GET", f"{caller.room}/joined_members", pick=lambda it: len(it["joined"]))
    await caller.set_limit("alice", 2)
    state = {"types": [LIMIT]}
    timelines: list[Any] = [{"types": [type], "limit": limit} for type in ("m.room.message", LIMIT) for limit in (0, 1)]
    for timeline in (*timelines, {"types": []}):
        await caller.sync(since, {"room": {"timeline": timeline, "state": state}})
    for number in range(4):
        await caller.send("alice", f"message{number}")
    for start in (since, None):
        for timeline in ({"limit": 2}, {"limit": 2, "types": [LIMIT]}):
            await caller.sync(start, {"room": {"timeline": timeline, "state": state}})
    await caller.set_limit("bot", 3)
    await caller.post("bot", "kick", f"@alice:{caller.server_name}")
    sent = await caller.send("alice", "last")
    await caller.ask("bot", "PUT", f"{caller.room}/redact/{quote(sent)}/redaction", {})
    relation = {"rel_type": "m.annotation", "event_id": sent, "key": "x"}
    await caller.send("bot", "reaction", "m.reaction", {"m.relates_to": relation})
    await caller.post("bot", "forget")
    return await caller.sync(since)


async def removed(caller: Caller, since: str) -> None:
    limit_alone = {"room": {"timeline": {"types": [LIMIT]}, "state": {"types": [LIMIT]}}}
    for action in ("kick", "kick", "unban"):
        await caller.post("alice", action, caller.user_id)
    await caller.memberships()
    await caller.set_limit("alice", 4)
    await caller.ask("bot", "GET", f"{caller.room}/state/{LIMIT}/", pick=lambda it: it)
    await caller.ask("bot", "GET", f"{caller.room}/joined_members")
    await caller.sync(since, limit_alone)
    since = await caller.sync(await caller.sync(since))
    await caller.post("alice", "ban", caller.user_id)
    since = await caller.sync(since)
    await caller.memberships()
    for action in ("join", "leave"):
        await caller.post("bot", action)
    await caller.post("alice", "invite", caller.user_id)
    await caller.post("alice", "unban", caller.user_id)
    await caller.sync(since)
    await caller.post("bot", "forget")
    await caller.ask("bot", "GET", f"{caller.room}/state/{LIMIT}/")
    await caller.post("alice", "leave")
    for what in ("state", "members"):
        await caller.ask("admin", "GET", f"{ADMIN}/rooms/{quote(caller.room_id)}/{what}", pick=lambda it: it)
    await caller.memberships()


async def go_through(caller: Caller) -> list[tuple[str, int, Any]]:
    await strangers(caller)
    await removed(caller, await joined(caller, await invited(caller)))
    return caller.answers


@pytest_twisted.ensureDeferred
async def test_the_stand_in_answers_as_synapse(synapse: Synapse) -> None:
    admin = await synapse.register("admin", admin=True)
    alice, bot = await synapse.register("alice"), await synapse.register("bot")
    room_id = await synapse.create_room(alice, room_version="10", preset="private_chat")
    tokens = {"admin": admin.token, "alice": alice.token, "bot": bot.token}
    real = await go_through(Caller(synapse.url, tokens, bot.user_id, room_id))

    fake = FakeSynapse(reactor, synapse.server_name)
    await fake.start()
    try:
        tokens = {name: fake.add_user(name, admin=name == "admin") for name in ("admin", "alice", "bot")}
        room_id = fake.create_room("alice")
        fake.set_state(room_id, "m.room.join_rules", {"join_rule": "invite"})
        fake.set_state(room_id, "m.room.history_visibility", {"history_visibility": "shared"})
        fake.set_state(room_id, "m.room.guest_access", {"guest_access": "can_join"})
        answers = await go_through(Caller(fake.url, tokens, f"@bot:{synapse.server_name}", room_id))
    finally:
        await fake.stop()
    assert len(real) > 70
    assert answers == real
