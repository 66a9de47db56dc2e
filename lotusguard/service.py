# SPDX-License-Identifier: Apache-2.0
"""The guard as a service: its parts, and how it starts and stops. `lotusguard.wiring` makes the parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from lotusguard import wiring
from lotusguard.config import Settings, suspicions
from lotusguard.logs import LevelObserver
from lotusguard.metrics import Metrics
from lotusguard.process import raise_file_limit
from lotusguard.reload import Reloader
from lotusguard.supervision import ReactorLagMonitor, SystemdNotifier
from lotusguard.upkeep import upkeep
from lotusguard.web.listener import Listener
from lotusguard.web.webhooks import Webhooks

log = Logger()

OPERATORS_GRACE = 1.0
"""Seconds that operators' requests may take when the guard stops."""


class Guard(MultiService):
    """The whole service.

    :param listen: endpoints to listen on instead of what the settings say.
    :param observer: the log, if its level can be changed.
    """

    def __init__(
        self,
        settings: Settings,
        reactor: Any,
        *,
        listen: Sequence[str] = (),
        admin_listen: str | None = None,
        observer: LevelObserver | None = None,
    ) -> None:
        super().__init__()
        self._settings = settings
        self._reactor = reactor
        wall = wiring.WALL_CLOCK
        metrics = self.metrics = Metrics()
        state = self._state = wiring.open_state(settings, reactor, metrics, wall)
        clients = self._clients = wiring.connect(settings, reactor, metrics, wall)
        rooms = wiring.rooms(settings, reactor, metrics, wall, clients, state)
        has_operators = bool(admin_listen) or settings.guard_admin_port is not None
        waiting = self._waiting = wiring.waiting(
            settings, reactor, metrics, wall, clients, state, rooms, operators=has_operators
        )
        joins = wiring.joins(settings, reactor, metrics, wall, clients, state, rooms, waiting)
        calls = wiring.calls(settings, reactor, metrics, clients, state, rooms, waiting, joins.decision_log)
        health = wiring.health(settings, reactor, metrics, clients, state, rooms, joins, calls, waiting)
        self.policies, self.members, self.sharing = rooms.policies, rooms.members, state.sharing
        self.decision_log, self.admission = joins.decision_log, joins.admission
        self.enforcement, self.changes = calls.enforcement, calls.changes
        self.residence, self.voice = rooms.residence, rooms.voice
        if settings.matrix_token.get_secret_value():
            syncing, self.commands = wiring.syncing(
                reactor, metrics, clients, state, rooms, calls, health, calls.moderator, waiting.lobby.waiting_in
            )
            syncing.setServiceParent(self)

        webhooks = Webhooks(calls.changes, settings.sfu_key, clients.livekit.now, metrics)
        self._reloader = Reloader(settings, clients, rooms, joins, calls, health, webhooks, metrics)
        self.public = wiring.public_listener(settings, reactor, metrics, clients, joins, webhooks, listen)
        self.appservice: Listener | None = None
        if settings.guard_appservice_port is not None:
            self.appservice, self._reloader.appservice = wiring.appservice_listener(
                settings, reactor, metrics, clients, joins, settings.guard_appservice_port
            )
        self.admin: Listener | None = None
        if has_operators:
            self.admin, self._reloader.operators, self._reloader.sessions = wiring.operators_listener(
                settings, reactor, metrics, wall, state, rooms, waiting, joins, calls, health,
                lambda: self.public.place, admin_listen,
            )  # fmt: skip
        for listener in (self.public, self.appservice, self.admin):
            if listener is not None:
                listener.setServiceParent(self)
        self._reloader.observer = observer
        for work in upkeep(settings, reactor, clients, state, waiting, calls, health):
            work.setServiceParent(self)
        ReactorLagMonitor(reactor, metrics).setServiceParent(self)
        self._systemd = SystemdNotifier(reactor)
        self._systemd.setServiceParent(self)

    def change_levels_of(self, observer: LevelObserver) -> None:
        """A reload changes the level of this log."""
        self._reloader.observer = observer

    def reload(self, settings: Settings) -> None:
        """Apply settings that were read again; calls and seats are kept."""
        self._reloader.reload(settings)

    def privilegedStartService(self) -> None:
        raise_file_limit()
        self._warn()
        super().privilegedStartService()

    def startService(self) -> None:
        if self._state.sharing is not None:
            self._state.sharing.start()
        super().startService()
        self._systemd.ready()

    def stopService(self) -> Deferred[None]:
        """Accept no more connections, answer the requests in flight, write the state, then stop."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._systemd.stopping()
        if self._state.sharing is not None:
            await self._state.sharing.turns.hand_over()
        self._waiting.lobby.stop()
        grace = self._settings.guard_upstream_timeout + self._settings.guard_upstream_grace
        await self.public.close(grace)
        if self.appservice is not None:
            await self.appservice.close(grace)
        if self.admin is not None:
            await self.admin.close(OPERATORS_GRACE)
        self.changes.stop()
        for dependency in self._clients.all:
            dependency.stop()
        stopping = super().stopService()
        if isinstance(stopping, Deferred):
            await stopping
        if self._state.sharing is not None:
            await self._state.sharing.stop()
        for pool in self._clients.pools:
            await pool.close()
        await self._state.history.close()
        if self._state.store is not None:
            await self._state.store.close()
        if self._state.lease is not None:
            self._state.lease.release()

    def _warn(self) -> None:
        """Say once and loudly what is probably not as it should be."""
        settings = self._settings
        for suspicion in suspicions(settings):
            log.warn("{suspicion}", suspicion=suspicion, event_name="suspicious_setting")
        if settings.sfu_key is None:
            log.critical(
                "LIVEKIT_KEY and LIVEKIT_SECRET are not both set: neither limits nor sources are enforced",
                event_name="not_enforcing",
            )
        if not settings.matrix_token.get_secret_value():
            log.critical(
                "MATRIX_TOKEN is not set: policies and memberships cannot be read, nothing is enforced",
                event_name="not_enforcing",
            )
        if self._state.error is not None:
            log.error(
                "what must survive a restart is kept in memory only: {error}", error=self._state.error,
                event_name="no_state",
            )  # fmt: skip
