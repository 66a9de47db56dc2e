# SPDX-License-Identifier: Apache-2.0
"""Opens the state that survives a restart: of this guard alone, or shared with other guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lotusguard.config import Settings
from lotusguard.guard.joins.decision_store import DecisionHistory, open_history
from lotusguard.guard.lobby import LobbyEntries, MemoryEntries
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.lease import StateLease
from lotusguard.guard.seats.memory import MemorySeatBook
from lotusguard.guard.seats.registry import MemoryTokenRegistry, TokenRegistry
from lotusguard.guard.seats.store import StateStore, StateUnusable, open_state_store
from lotusguard.metrics import Metrics

if TYPE_CHECKING:  # txredisapi wants the reactor when it is imported
    from lotusguard.guard.seats.sharing import Sharing


@frozen
class State:
    """The state that survives a restart.

    :ivar seats: what decides. :ivar own_seats: the same, unless the seats are shared with other guards (``sharing``).
    :ivar store: ``None`` if there is no state directory, or it cannot be used, as ``error`` says.
    :ivar guarding_since: since when a guard has run on this directory, on the reactor's clock.
    """

    store: StateStore | None
    lease: StateLease | None
    error: str | None
    history: DecisionHistory
    guarding_since: float
    registry: TokenRegistry
    seats: SeatBook
    own_seats: MemorySeatBook
    lobby: LobbyEntries
    sharing: Sharing | None


def open_state(settings: Settings, reactor: Any, metrics: Metrics, wall: Callable[[], float]) -> State:
    """Open the state directory, if there is one, and take over what an earlier run left there."""
    store, lease, error = None, None, None
    if settings.state_dir is not None:
        try:
            store = open_state_store(settings.state_dir, reactor, metrics, wall)
            lease = StateLease(settings.state_dir)
        except StateUnusable as unusable:
            error = str(unusable)
    guarding_since = reactor.seconds() - (wall() - store.guarding_since if store is not None else 0.0)
    history = open_history(settings.state_dir if store is not None else None, reactor, metrics, wall)
    registry = MemoryTokenRegistry(store, reactor, metrics, wall=wall)
    registry.load()
    seats = MemorySeatBook(store, reactor, wall, metrics, settings.guard_seat_ttl, guarding_since)
    if store is not None:
        seats.load(store.holds(), ended=reactor.seconds() - (wall() - store.last_run_ended))
    sharing = share_seats(settings, reactor, metrics, wall, guarding_since)
    if sharing is None:
        lobby = MemoryEntries(store, reactor, wall, settings.guard_lobby_wait)
        lobby.load()
        return State(store, lease, error, history, guarding_since, registry, seats, seats, lobby, None)
    shared, entries = sharing.registry(registry, reactor), share_lobby(sharing, settings, reactor)
    return State(store, lease, error, history, guarding_since, shared, sharing.book, seats, entries, sharing)


def share_seats(
    settings: Settings, reactor: Any, metrics: Metrics, wall: Callable[[], float], guarding_since: float
) -> Sharing | None:
    """The seats of several guards, if ``GUARD_REDIS_URL`` is set."""
    url = settings.guard_redis_url.get_secret_value()
    if not url:
        return None
    from lotusguard.guard.seats.sharing import Sharing

    return Sharing.create(url, reactor, metrics, wall, settings.guard_seat_ttl, guarding_since)


def share_lobby(sharing: Sharing, settings: Settings, reactor: Any) -> LobbyEntries:
    """The lobby entries of several guards."""
    from lotusguard.guard.lobby.redis.entries import RedisEntries

    return RedisEntries(sharing.redis, sharing.guard, reactor, settings.guard_lobby_wait)
