# SPDX-License-Identifier: Apache-2.0
"""What the guard does again and again while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twisted.application.service import Service
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit_link import LiveKitLink
from lotusguard.clients.waiting import run_in_background
from lotusguard.config import Settings
from lotusguard.guard.health import Health
from lotusguard.guard.periodic import PeriodicService
from lotusguard.process import return_free_memory
from lotusguard.wiring import Calls, Clients, State, Waiting

log = Logger()

MEMORY_RETURNED = 10.0
"""Seconds between two times at which freed memory is given back to the system."""
WATCH_EVERY = 1.0
"""Seconds between two looks at whether what is enforced has changed."""


def upkeep(
    settings: Settings, reactor: Any, clients: Clients, state: State, waiting: Waiting, calls: Calls, health: Health
) -> Iterator[Service]:
    """The services that do it."""
    homeserver, lease = clients.homeserver, state.lease
    seats = state.own_seats if state.sharing is None else state.sharing.book

    async def learn_server_name() -> None:
        if not homeserver.server_name:
            await homeserver.whoami()

    async def renew_lease() -> None:
        if lease is not None:
            lease.renew()

    async def keep_lobbies() -> None:
        await waiting.lobby.pass_time()
        waiting.notices.pass_time()

    interval = settings.guard_reconcile_interval
    yield PeriodicService("renewing the lease", 1.0, renew_lease, reactor, now=True)
    yield PeriodicService("reconciling", interval, calls.changes.reconcile, reactor, now=True)
    yield PeriodicService("asking for the server name", 5.0, learn_server_name, reactor, now=True)
    yield PeriodicService("watching what is enforced", WATCH_EVERY, health.watch, reactor)
    yield PeriodicService("keeping lobbies", 1.0, keep_lobbies, reactor)
    yield PeriodicService("looking after lobbies", 2.0, waiting.switch.pass_time, reactor)
    yield PeriodicService("checking who waits in lobbies", 2.0, calls.entitlement.end_waiting_unheard, reactor)
    yield PeriodicService("pruning", 60.0, seats.prune, reactor)
    yield PeriodicService("returning free memory", MEMORY_RETURNED, return_free_memory, reactor)
    yield LiveKitLink(reactor, settings.livekit_api, calls.changes.livekit_returned, _not_looked)
    yield from _sharing(reactor, state, calls)


def _sharing(reactor: Any, state: State, calls: Calls) -> Iterator[Service]:
    """What guards that share their seats tell each other, and what keeps the shared state."""
    sharing, changes = state.sharing, calls.changes
    if sharing is None:
        return
    sharing.leases.enforce = calls.enforcement.enforce_as_asked
    sharing.leases.changed = lambda room_id, user, how: run_in_background(
        changes.changed_at_another_guard(room_id, user, how), _report
    )
    sharing.leases.ended = lambda room_id: run_in_background(changes.lease_ended(room_id), _report)
    sharing.redis.on_subscribed.append(changes.anything_may_have_changed)
    sharing.when_shared(changes.seats_are_known)
    for name, seconds, work in sharing.upkeep():
        yield PeriodicService(name, seconds, work, reactor)


def _report(failure: Failure) -> None:
    log.failure("what another guard announced or left could not be handled", failure)


def _not_looked(failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.debug("LiveKit is back and does not answer yet: {reason}", reason=failure.getErrorMessage())
    else:
        log.failure("what LiveKit has lost could not be found", failure)
