# SPDX-License-Identifier: Apache-2.0
"""One soak: everything is started, users and moderators act, faults happen, and what came of it is judged."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from attrs import define, field
from livekit.protocol.models import TrackType
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.web.http_headers import Headers

from lotusguard.clients.http import IDLE_CONNECTIONS, ConnectionPool, FixedAgent, fetch
from lotusguard.rules.sources import Source
from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from tests.soak.changes import Changes
from tests.soak.faults import Faults
from tests.soak.guard_process import GuardLog
from tests.soak.guards import Guards
from tests.soak.oracle import Oracle
from tests.soak.record import SEAT_TTL, STATE_AGE, TOKEN_TTL
from tests.soak.restarts import Restarts
from tests.soak.table import SPARE_DESCRIPTORS, Row, table
from tests.soak.users import User, World

KEY, SECRET, OPERATORS = "soakkey", "a-secret-for-a-soak-and-nothing-else", "soak-operators"
SAMPLING = 0.25
"""Seconds between two checks of the running calls."""
STALL = 0.75
"""Seconds by which a check may be late. A busy machine may stop the stand-ins for a while: that is a fault too."""
STARVED = 0.4
"""Seconds in each second for which a process may wait for a processor that others use. More is a fault, too."""


@define(eq=False, slots=False)
class Soak:
    """One soak.

    :param seconds: how long users join and leave. :param users: how many users. :param count: how many guards.
    :param directory: for the guards' state and logs.
    """

    _reactor: Any
    _seconds: float
    _users: int
    _count: int
    _seed: int
    _directory: Path
    _published: dict[str, float] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._dice = Random(self._seed)
        self._oracle = Oracle()
        self._homeserver = FakeSynapse(self._reactor)
        self._livekit = FakeLiveKit(self._reactor, key=KEY, secret=SECRET)
        self._pool = ConnectionPool(self._reactor, at_most=0 if self._count > 1 else IDLE_CONNECTIONS)

    async def run(self) -> list[Row]:
        """Run it. :return: the rows of the table."""
        await self._start()
        idle = self._guards.descriptors()
        ends = self._reactor.seconds() + self._seconds
        activities: tuple[Callable[[float], Any], ...] = (
            lambda left: self._changes.change_policy(),
            lambda left: self._changes.change_level(),
            lambda left: self._changes.change_membership(),
            self._faults.cause,
            lambda left: self._sample(),
        )
        acting = [Deferred.fromCoroutine(self._repeat_until(ends, activity)) for activity in activities]
        living = [Deferred.fromCoroutine(user.live()) for user in self._people]
        await gatherResults(acting, consumeErrors=True)
        self._world.running = False
        await gatherResults(living, consumeErrors=True)
        left = await self._descriptors_when_idle(idle)
        self._restarts.check_exits(signal.SIGTERM, await self._guards.end(signal.SIGTERM))
        for standin in (self._upstream, self._livekit, self._homeserver):
            await standin.stop()
        await self._pool.close()
        return table(self._oracle, GuardLog.read(self._guards.logs), self._guards.growth(), self._users, idle, left)

    async def _start(self) -> None:
        await self._homeserver.start()
        await self._livekit.start()
        self._upstream = FakeLkJwtService(
            self._reactor, key=KEY, secret=SECRET, sfu_url=self._livekit.url,
            homeservers={self._homeserver.server_name: self._homeserver.url},
        )  # fmt: skip
        await self._upstream.start()
        self._guards = await Guards.create(self._reactor, self._count, self._directory, self._environment(), self._dice)
        # With several guards every request is on a connection of its own, so that it goes to a guard at random.
        self._livekit.pool.persistent = not self._guards.several
        self._livekit.webhooks.urls[:] = [f"{self._guards.url}/sfu_webhook"]
        self._operators = FixedAgent(self._reactor, self._guards.admin_url, self._pool, 2)
        rooms = [self._homeserver.create_room() for _ in range(max(3, self._users // 7))]
        agent = FixedAgent(self._reactor, self._guards.url, self._pool, 2)
        self._world = World(self._reactor, agent, self._homeserver, self._livekit, self._oracle, rooms, self._dice)
        self._livekit.webhooks.on_attempt.append(self._world.webhook_sent)
        self._people = [User(self._world, f"user{number}") for number in range(self._users)]
        self._changes = Changes(self._world, [user.user_id for user in self._people], self._push)
        dependencies = {"synapse": self._homeserver, "livekit": self._livekit, "upstream": self._upstream}
        self._restarts = Restarts(self._world, self._guards)
        self._faults = Faults(self._world, self._restarts, dependencies)
        for room_id in rooms:
            self._changes.set_policy(room_id)
        await self._guards.start()

    def _environment(self) -> dict[str, str]:
        return {
            "GUARD_UPSTREAM": self._upstream.url, "LIVEKIT_API": self._livekit.url,
            "SYNAPSE_API": self._homeserver.url, "LIVEKIT_KEY": KEY, "LIVEKIT_SECRET": SECRET,
            "GUARD_ADMIN_TOKEN": OPERATORS, "MATRIX_TOKEN": self._homeserver.add_user("guard", admin=True),
            # Where changes are pushed, memberships are read ten times less often; here half of the pushes are missing.
            "GUARD_MEMBERSHIP_INTERVAL": str(STATE_AGE / 10),
            "GUARD_POLICY_TTL": str(STATE_AGE), "GUARD_SEAT_TTL": str(SEAT_TTL), "GUARD_TOKEN_TTL": str(TOKEN_TTL),
            "GUARD_RECONCILE_INTERVAL": "1", "GUARD_UPSTREAM_TIMEOUT": "4", "GUARD_UPSTREAM_GRACE": "3",
        }  # fmt: skip

    async def _repeat_until(self, ends: float, activity: Callable[[float], Any]) -> None:
        """Repeat something; it is given the part of the time that is left, from 1 to 0."""
        while (left := (ends - self._reactor.seconds()) / self._seconds) > 0:
            await activity(left)

    async def _push(self, body: bytes) -> None:
        headers = Headers({b"Authorization": [f"Bearer {OPERATORS}".encode()]})
        pushed = fetch(self._operators, b"POST", b"/policy-changed", headers, body, limit=1 << 20)
        await pushed.addTimeout(5, self._reactor)

    # -- checks ------------------------------------------------------------------------------------------

    async def _sample(self) -> None:
        """Check all running calls, and measure the guards once a second."""
        due = self._reactor.seconds() + SAMPLING
        await deferLater(self._reactor, SAMPLING)
        now, world, oracle = self._reactor.seconds(), self._world, self._oracle
        if now > due + STALL:
            oracle.disturbances.begin("stand-ins", due).ended = now
            oracle.counts["stalls of the stand-ins"] += 1
        world.record_departures()
        for room_id in world.rooms:
            oracle.check_stays(room_id, now)
        present: dict[str, float] = {}
        for participant, stay in world.sessions:
            for track in list(participant.tracks.values()):
                published = present[track.sid] = self._published.get(track.sid, now)
                is_video = track.type == TrackType.VIDEO and not track.muted
                oracle.check_track(stay, track.sid, Source(track.source), is_video, published, now)
        self._published = present
        oracle.counts["most sessions at once"] = max(oracle.counts["most sessions at once"], len(world.sessions))
        if int(now) != int(now - SAMPLING):
            self._guards.measure()
            if self._guards.waited() > STARVED:
                oracle.disturbances.begin("processors", now - 1).ended = now
                oracle.counts["seconds without enough processors"] += 1
            oracle.counts["seconds in which nothing was excused"] += not oracle.disturbances.any_between(now, now)
            oracle.prune(now)

    async def _descriptors_when_idle(self, idle: int) -> int:
        """Close all connections from outside. :return: how many descriptors a guard has open soon after."""
        await self._pool.close()
        await self._livekit.pool.closeCachedConnections()
        left = idle
        for _ in range(20):
            for standin in (self._upstream, self._livekit, self._homeserver):
                await standin.drop_connections()
            await deferLater(self._reactor, 0.5)
            left = self._guards.descriptors()
            if left <= idle + SPARE_DESCRIPTORS:
                break
        return left
