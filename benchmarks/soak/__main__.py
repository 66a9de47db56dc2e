# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.soak --seconds 600``: a living call load while dependencies fall ill at random. Benchmarks.

Stand-ins and virtual users live in this process, the guard in one of its own that is restarted and killed in the first
half. What must hold whatever happens is printed as a table at the end; the exit status tells whether it held.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from livekit.protocol.models import TrackInfo, TrackType
from twisted.internet import reactor as twisted_reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.http_headers import Headers

from benchmarks.processes import free_port, raise_file_limit
from benchmarks.soak.guard import GuardLog, GuardUnderSoak
from benchmarks.soak.table import SOME, Row, show, table
from benchmarks.soak.truth import POLICY_TTL, RECOVERY, SEAT_TTL, TOKEN_TTL, Disturbance, Truth
from benchmarks.soak.users import User, World
from lotusguard.clients.http import BytesBody, FixedAgent, collected, connection_pool
from lotusguard.rules.identity import room_alias
from lotusguard.rules.policy import ROOM_QUALITY, VOICE_LIMIT, Policy, forbidden_sources, max_users
from lotusguard.rules.sources import MICROPHONE, Source
from lotusguard.sandbox.faults import Fault
from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService
from lotusguard.sandbox.standin import StandIn
from lotusguard.sandbox.synapse.homeserver import FakeSynapse

log = Logger()
reactor: Any = twisted_reactor
KEY, SECRET, OPERATORS = "soakkey", "a-secret-for-a-soak-and-nothing-else", "soak-operators"
FAULTS: tuple[Callable[[], Fault], ...] = (
    Fault.hang, Fault.invalid_response, Fault.truncated, Fault.wrong_types, Fault.close, Fault.late_close,
    Fault.too_large, lambda: Fault.status(500), lambda: Fault.status(503), lambda: Fault.status(404),
    lambda: Fault.delay(0.5),
    lambda: Fault.drip(0.05), lambda: Fault.redirect("http://127.0.0.1:9/"),
)  # fmt: skip


class Soak:
    """One soak.

    :param seconds: how long users come and go.
    :param users: how many of them.
    """

    def __init__(self, seconds: float, users: int, seed: int, directory: Path) -> None:
        self.dice = Random(seed)
        self.seconds = seconds
        self.truth = Truth()
        self.homeserver = FakeSynapse(reactor)
        self.livekit = FakeLiveKit(reactor, key=KEY, secret=SECRET)
        self.directory = directory
        self.users = users
        self.pool = connection_pool(reactor)

    async def run(self) -> list[Row]:
        """The whole soak. :return: the table: what, how much, allowed, whether it held."""
        await self._set_up()
        idle = self.guard.descriptors()
        ends = reactor.seconds() + self.seconds
        world = self.world
        helpers = [self._until(ends, work) for work in (self._change_policies, self._make_trouble, self._sample)]
        living = [Deferred.fromCoroutine(User(world, f"user{n}").live()) for n in range(self.users)]
        await gatherResults([Deferred.fromCoroutine(helper) for helper in helpers], consumeErrors=True)
        world.running = False
        await gatherResults(living, consumeErrors=True)
        left = await self._settled(idle)
        status = await self.guard.end(signal.SIGTERM)
        self.truth.counts["wrong exits on SIGTERM"] += status not in (0, -signal.SIGTERM)
        for standin in (self.upstream, self.livekit, self.homeserver):
            await standin.stop()
        await self.pool.closeCachedConnections()
        return table(self.truth, GuardLog.read(self.log), self.guard.growth(), self.users, idle, left)

    async def _set_up(self) -> None:
        await self.homeserver.start()
        await self.livekit.start()
        self.upstream = FakeLkJwtService(
            reactor, key=KEY, secret=SECRET, sfu_url=self.livekit.url,
            homeservers={self.homeserver.server_name: self.homeserver.url},
        )  # fmt: skip
        await self.upstream.start()
        port, admin_port = free_port(), free_port()
        url, admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        environment = {
            "GUARD_BIND_HOST": "127.0.0.1", "GUARD_BIND_PORT": str(port), "GUARD_ADMIN_PORT": str(admin_port),
            "GUARD_UPSTREAM": self.upstream.url, "LIVEKIT_API": self.livekit.url, "SYNAPSE_API": self.homeserver.url,
            "LIVEKIT_KEY": KEY, "LIVEKIT_SECRET": SECRET, "GUARD_ADMIN_TOKEN": OPERATORS,
            "MATRIX_TOKEN": self.homeserver.add_user("guard", admin=True), "GUARD_STATE_DIR": str(self.directory),
            "GUARD_POLICY_TTL": str(POLICY_TTL), "GUARD_SEAT_TTL": str(SEAT_TTL), "GUARD_TOKEN_TTL": str(TOKEN_TTL),
            "GUARD_RECONCILE_INTERVAL": "1", "GUARD_UPSTREAM_TIMEOUT": "4", "GUARD_UPSTREAM_GRACE": "3",
            "GUARD_LOG_FORMAT": "json",
        }  # fmt: skip
        self.log = self.directory / "guard.log"
        self.guard = GuardUnderSoak(reactor, environment, self.log, url)
        self.livekit.webhooks.urls[:] = [f"{url}/sfu_webhook"]
        self.operators = FixedAgent(reactor, admin_url, self.pool, 2)
        agent = FixedAgent(reactor, url, self.pool, 2)
        rooms = [self.homeserver.create_room() for _ in range(max(3, self.users // 7))]
        for room_id in rooms:
            self._set_policy(room_id)
        self.world = World(reactor, agent, self.homeserver, self.livekit, self.truth, rooms, self.dice)
        await self.guard.start(self._answers)

    async def _answers(self) -> None:
        await self._operator(b"GET", b"/healthz")

    async def _operator(self, method: bytes, path: bytes, body: bytes | None = None) -> None:
        headers = Headers({b"Authorization": [f"Bearer {OPERATORS}".encode()]})
        sent = self.operators.request(method, path, headers, None if body is None else BytesBody(body))
        await collected(await sent.addTimeout(5, reactor), 1 << 20)

    # -- what goes on meanwhile --------------------------------------------------------------------------

    async def _until(self, ends: float, work: Callable[[float], Any]) -> None:
        """Do something again and again; it is told how much of the time is left, from 1 to 0."""
        while (left := (ends - reactor.seconds()) / self.seconds) > 0:
            await work(left)

    async def _change_policies(self, left: float) -> None:
        await self.world.pause(0.5, 3.0)
        room_id = self.dice.choice(self.world.rooms)
        self._set_policy(room_id)
        if self.dice.random() < 0.5:
            try:
                await self._operator(b"POST", b"/policy-changed", b'{"room_id":"%s"}' % room_id.encode())
            except Exception as error:
                log.debug("the guard was not told: {error}", error=error)

    def _set_policy(self, room_id: str) -> None:
        dice = self.dice
        limit = {"max_users": dice.choice((1, 2, 3, 4, 6, 8, 8, None))}
        quality = {key: dice.random() < 0.6 for key in ("allow_screenshare", "allow_camera")}
        self.homeserver.set_state(room_id, VOICE_LIMIT, limit)
        self.homeserver.set_state(room_id, ROOM_QUALITY, quality)
        policy = Policy(max_users(limit)[0], forbidden_sources(quality)[0])
        self.truth.policy_is(room_id, policy, reactor.seconds())

    async def _make_trouble(self, left: float) -> None:
        await self.world.pause(RECOVERY, RECOVERY * 2)
        dependencies: dict[str, StandIn] = {
            "synapse": self.homeserver, "livekit": self.livekit, "upstream": self.upstream,
        }  # fmt: skip
        if left > 0.5 and self.dice.random() < 0.3:
            await self._restart(self.dice.choice((signal.SIGTERM, signal.SIGKILL)))
            return
        names = self.dice.sample(sorted(dependencies), self.dice.choice((1, 1, 1, 2)))
        disturbances = [Disturbance(name, reactor.seconds()) for name in names]
        self.truth.disturbances.extend(disturbances)
        if self.dice.random() < 0.25:
            self.truth.counts["faults: away"] += 1
            for name in names:
                await dependencies[name].stop_listening()
        else:
            for name in names:
                fault = dependencies[name].fault = self.dice.choice(FAULTS)()
                self.truth.counts[f"faults: {fault.kind}"] += 1
        await self.world.pause(0.5, 4.0)
        for name in names:
            dependencies[name].fault = None
            await dependencies[name].listen()
        for disturbance in disturbances:
            disturbance.ended = reactor.seconds()

    async def _restart(self, how: signal.Signals) -> None:
        killed = how is signal.SIGKILL
        self.truth.counts[f"restarts by {how.name}"] += 1
        disturbance = Disturbance("killed" if killed else "guard", reactor.seconds())
        self.truth.disturbances.append(disturbance)
        status = await self.guard.end(how)
        if not killed:
            self.truth.counts["wrong exits on SIGTERM"] += status not in (0, -signal.SIGTERM)
        await self.guard.start(self._answers)
        disturbance.ended = reactor.seconds()

    async def _sample(self, left: float) -> None:
        await deferLater(reactor, 0.25)
        now, truth = reactor.seconds(), self.truth
        self.world.look()
        for room_id in self.world.rooms:
            truth.past_the_cap(room_id, now)
            policy = truth.policies[room_id][-1][1]
            room = self.livekit.rooms.get(room_alias(room_id))
            for participant in list(room.participants.values()) if room else ():
                for track in participant.tracks.values():
                    self._judge_track(room_id, policy, track, now)
        present = {sid for room in self.livekit.rooms.values() for p in room.participants.values() for sid in p.tracks}
        self.published = {sid: at for sid, at in self.published.items() if sid in present}
        truth.counts["most sessions at once"] = max(truth.counts["most sessions at once"], len(self.world.there))
        if int(now) != int(now - 0.25):
            self.guard.measure()
            truth.prune(now)

    published: dict[str, float] = {}  # noqa: RUF012 replaced, never changed

    def _judge_track(self, room_id: str, policy: Policy, track: TrackInfo, now: float) -> None:
        source = Source(track.source)
        since = self.published.setdefault(track.sid, now)
        if source in policy.forbidden:
            self.truth.forbidden_track(room_id, source, since, now, "forbidden tracks")
        elif source is MICROPHONE and track.type == TrackType.VIDEO and not track.muted:
            for hidden in policy.forbidden:
                self.truth.forbidden_track(room_id, hidden, since, now, "disguised tracks")

    async def _settled(self, idle: int) -> int:
        """Close all connections from outside. :return: how many descriptors the guard has left soon after."""
        await self.pool.closeCachedConnections()
        await self.livekit.pool.closeCachedConnections()
        left = idle
        for _ in range(20):
            for standin in (self.upstream, self.livekit, self.homeserver):
                await standin.drop_connections()
            await deferLater(reactor, 0.5)
            left = self.guard.descriptors()
            if left <= idle + SOME:
                break
        return left


def main() -> None:
    """Run a soak and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--seed", type=int, default=None, help="the dice's seed; timing still differs from run to run")
    parser.add_argument("--keep-log", type=Path, help="where to copy the guard's log")
    options = parser.parse_args()
    raise_file_limit()
    rows: list[Row] = []
    failed: list[object] = []

    def done(outcome: Any) -> None:
        if isinstance(outcome, list):
            rows.extend(outcome)
        else:
            failed.append(outcome)
        reactor.stop()

    with TemporaryDirectory(prefix="soak") as directory:
        soak = Soak(options.seconds, options.users, options.seed or Random().randrange(10**6), Path(directory))
        reactor.callWhenRunning(lambda: Deferred.fromCoroutine(soak.run()).addBoth(done))
        reactor.run()
        if options.keep_log and soak.log.exists():
            options.keep_log.write_bytes(soak.log.read_bytes())
    if failed:
        sys.exit(str(failed[0]))
    show(rows)
    sys.exit(0 if all(row[3] for row in rows) else 1)


if __name__ == "__main__":
    main()
