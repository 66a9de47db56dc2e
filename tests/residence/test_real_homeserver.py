# SPDX-License-Identifier: Apache-2.0
"""The guard's account in many and in large rooms of a real Synapse, and how soon changes take effect there.

What every homeserver has to do is in ``tests/real/test_any_homeserver.py``.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from lotusguard.sandbox.demo.sandbox import Refused
from tests.calls import counted
from tests.conftest import until
from tests.residence.residents import HEARD_WITHIN, NO_LOOKUPS, PATIENCE, Residents, latency_of, say
from tests.synapse import MakeGuarded, Synapse

LARGE = bool(os.environ.get("LARGE_ROOMS"))
ROOMS = 200
MEMBERS = 5000 if LARGE else 300
only_when_asked = pytest.mark.skipif(not os.environ.get("LATENCIES"), reason="LATENCIES is not set: it takes minutes")


@pytest_twisted.async_yield_fixture
async def residents(set_guarded: MakeGuarded) -> AsyncIterator[Residents]:
    """A guard that hears of everything, or does not know it."""
    yield await Residents.of(await set_guarded(**NO_LOOKUPS))


@pytest_twisted.ensureDeferred
async def test_limit_holds_in_a_room_of_version_10(residents: Residents) -> None:
    room_id = await residents.room(room_version="10")
    await residents.set_limit(room_id, 1)
    await residents.guarded.enter(residents.bob, room_id)
    with pytest.raises(Refused, match="full"):
        await residents.guarded.enter(residents.carol, room_id)


@pytest.mark.skipif(not LARGE, reason="LARGE_ROOMS is not set: it takes minutes")
@pytest_twisted.ensureDeferred
async def test_many_rooms_are_heard_and_not_read_again_when_the_homeserver_restarts(residents: Residents) -> None:
    began = reactor.seconds()
    room_ids = [await residents.room() for _ in range(ROOMS)]
    residence = residents.sandbox.guard.residence
    invited = reactor.seconds() - began
    first, last = room_ids[0], room_ids[-1]
    await residents.set_limit(last, 1)
    await residents.homeserver.stopped()
    await until(lambda: not residence.alive, PATIENCE)
    before = counted(residents.sandbox, "dependency_calls_total", dependency="matrix", outcome="ok")
    await residents.homeserver.started()
    await residents.put(first, "io.lotus.voice_limit", {"max_users": 1})
    began = reactor.seconds()
    await until(lambda: residence.alive, PATIENCE)
    await residents.limit_is(first, 1)
    alive = reactor.seconds() - began
    for room_id in (first, last):
        await residents.guarded.enter(residents.bob, room_id)
        with pytest.raises(Refused, match="full"):
            await residents.guarded.enter(residents.carol, room_id)
    calls = counted(residents.sandbox, "dependency_calls_total", dependency="matrix", outcome="ok") - before
    assert calls <= 10  # what the refusals confirmed; no room was read again
    assert all(residence.is_joined(room_id, residents.bob.user_id) for room_id in room_ids)
    say(f"{ROOMS} rooms: invited in {invited:.0f} s, alive {alive:.1f} s after a restart, {calls:.0f} lookups")
    await residents.sandbox.guard.stopService()
    began = reactor.seconds()
    await residents.start_guard()
    residence = residents.sandbox.guard.residence
    alive = reactor.seconds() - began
    await until(lambda: all(residence.is_joined(one, residents.bob.user_id) for one in room_ids), PATIENCE)
    members = reactor.seconds() - began
    say(f"{ROOMS} rooms: after a start without state alive in {alive:.1f} s, all members known in {members:.1f} s")


def add_members(database: str, room_id: str, template: str, count: int) -> None:
    """Write joined members into Synapse's database while it is stopped: joining takes it 20 ms for each.

    They exist where ``/joined_members`` and the membership lookups read; they have sent no events.

    :param template: a member after whose rows the others are written.
    """
    with sqlite3.connect(database) as rows:
        for table, user in (("room_memberships", "user_id"), ("current_state_events", "state_key")):
            names = [name for _, name, *_ in rows.execute(f"PRAGMA table_info({table})")]
            where = f"room_id = ? AND {user} = ?" + (" AND type = 'm.room.member'" if user == "state_key" else "")
            found = rows.execute(f"SELECT * FROM {table} WHERE {where}", (room_id, template)).fetchall()[-1]
            row = dict(zip(names, found, strict=True))
            added = ({**row, user: f"@many{number}:real.test", "event_id": f"$many{number}"} for number in range(count))
            places = ", ".join("?" for _ in names)
            rows.executemany(f"INSERT INTO {table} VALUES ({places})", (tuple(one.values()) for one in added))


@pytest_twisted.ensureDeferred
async def test_room_of_thousands_of_members_is_resident(residents: Residents, synapse: Synapse) -> None:
    room_id = await synapse.room_of(residents.alice, residents.bob, residents.carol)
    await residents.homeserver.stopped()
    database = str(synapse.directory / "homeserver.db")
    await deferToThread(add_members, database, room_id, residents.carol.user_id, MEMBERS)
    await residents.homeserver.started()
    await until(lambda: residents.sandbox.guard.residence.alive, PATIENCE)
    began = reactor.seconds()
    await residents.invite(room_id)
    if LARGE:
        say(f"{MEMBERS} members: known {reactor.seconds() - began:.1f} s after the invitation")
    residence = residents.sandbox.guard.residence
    assert residence.is_joined(room_id, f"@many{MEMBERS - 1}:real.test")
    await residents.set_limit(room_id, 1)
    bob = await residents.guarded.enter(residents.bob, room_id)
    with pytest.raises(Refused, match="full"):
        await residents.guarded.enter(residents.carol, room_id)
    await synapse.change_membership(residents.alice, room_id, "kick", residents.bob)
    await until(lambda: not bob.connected, PATIENCE)
    assert await residents.guarded.enter(residents.carol, room_id)


# -- how soon changes take effect where the guard is not in the room ------------------------------------------


@only_when_asked
@pytest_twisted.ensureDeferred
async def test_latency_with_the_module(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await set_guarded(guard_admin_port=synapse.guard_port, guard_policy_ttl=3600)
    residents = Residents.looking_up(guarded, [await synapse.register(name) for name in ("alice", "bob", "carol")])
    room_id = await synapse.room_of(residents.alice, residents.bob)
    latency = await latency_of(residents, room_id, await guarded.enter(residents.bob, room_id))
    say(f"module: {latency}")
    assert latency.median < HEARD_WITHIN


@only_when_asked
@pytest_twisted.ensureDeferred
async def test_latency_with_the_admin_api_and_default_settings(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await set_guarded(guard_reconcile_interval=3)
    residents = Residents.looking_up(guarded, [await synapse.register(name) for name in ("alice", "bob", "carol")])
    room_id = await synapse.room_of(residents.alice, residents.bob)
    bob = await guarded.enter(residents.bob, room_id)

    async def at_any_time() -> None:
        await deferLater(reactor, random.uniform(0, 13))

    latency = await latency_of(residents, room_id, bob, before_each=at_any_time)
    say(f"admin API: {latency}")
    assert 1 < latency.worst < 20
