# SPDX-License-Identifier: Apache-2.0
"""``twistd lotusguard``: its options, and the service from start to stop. `lotusguard.wiring` makes the parts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.python import usage
from twisted.python.components import Componentized
from twisted.python.failure import Failure

from lotusguard import wiring
from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit_link import LiveKitLink
from lotusguard.clients.waiting import run_in_background
from lotusguard.config import ConfigurationError, Settings, read_settings, suspicions
from lotusguard.guard.health import Health
from lotusguard.guard.periodic import PeriodicService
from lotusguard.logs import LevelObserver, observer_for, write_error
from lotusguard.metrics import Metrics
from lotusguard.process import raise_file_limit, tune_garbage_collector, use_monotonic_time
from lotusguard.reload import Reloader
from lotusguard.supervision import ReactorLagMonitor, SystemdNotifier
from lotusguard.web.console.names import RoomNames
from lotusguard.web.console.routes import Console
from lotusguard.web.console.sessions import Sessions
from lotusguard.web.console.view import ConsoleView
from lotusguard.web.handlers import RequestHandler
from lotusguard.web.held import PROXIED_SILENCE
from lotusguard.web.listener import Listener
from lotusguard.web.operators import OperatorApi
from lotusguard.web.public import PublicApi
from lotusguard.web.webhooks import Webhooks

log = Logger()

BACKLOG = 4096
"""Connections that the kernel may keep waiting to be accepted. Clients that find no place try again after 1, 3, 7 s."""
WATCH_EVERY = 1.0
"""Seconds between two looks at whether what is enforced has changed."""
OPERATORS_GRACE = 1.0
"""Seconds that operators' requests may take when the guard stops."""
_TWIST_LOG = "fileLogObserverFactory"
"""The option of ``twist``, which twistd does not have, that makes the log's observer."""
WRONG_SETTING = 78
"""Exit status for a wrong setting (``EX_CONFIG``): the unit does not start the guard again until it is corrected."""


class Options(usage.Options):
    """The command line options; everything else is in the environment (see docs/configuration.md)."""

    synopsis = "[options]"
    longdesc = "Enforces Matrix rooms' call policies in front of lk-jwt-service. Settings come from the environment."
    optParameters: ClassVar[list[list[str | None]]] = [
        ["admin-listen", None, None, "endpoint of the operators' listener instead of GUARD_ADMIN_…"],
    ]

    def __init__(self) -> None:
        super().__init__()
        self["listen"] = []

    def opt_listen(self, endpoint: str) -> None:
        """endpoint to listen on instead of GUARD_BIND_HOST and GUARD_BIND_PORT; may be given several times"""
        self["listen"].append(endpoint)

    opt_l = opt_listen


def makeService(options: Options) -> Unbuilt:
    """The service of ``twistd lotusguard``. A wrong setting ends it with one line."""
    from twisted.internet import reactor

    try:
        settings = read_settings()
    except ConfigurationError as error:
        write_error(f"lotusguard: {error}", sys.stderr)
        raise SystemExit(WRONG_SETTING) from None
    use_monotonic_time(reactor)
    reactor.callWhenRunning(tune_garbage_collector)
    return Unbuilt(settings, reactor, options)


class Unbuilt(MultiService):
    """The guard before it is built: ``twistd`` may still go into the background, where the threads and the open
    database of this process would not follow."""

    def __init__(self, settings: Settings, reactor: Any, options: Options) -> None:
        super().__init__()
        self._settings = settings
        self._reactor = reactor
        self._options = options
        self._observer: LevelObserver | None = None
        self._guard: Guard | None = None

    def setServiceParent(self, parent: Any) -> None:
        """Under ``twistd`` and ``twist`` the parent is the application. Its log gets the configured format, unless
        twistd's own options send the log elsewhere, or twistd goes into the background."""
        runner = getattr(self._options, "parent", None) or {"nodaemon": True}
        elsewhere = any(runner.get(option) for option in ("logfile", "syslog", "logger"))
        if _TWIST_LOG in runner:
            runner[_TWIST_LOG], runner["logLevel"] = self._observe, LogLevel.debug  # our observer leaves lines out
        elif isinstance(parent, Componentized) and runner.get("nodaemon") and not elsewhere:
            parent.setComponent(ILogObserver, self._observe(None))
        super().setServiceParent(parent)

    def _observe(self, stream: Any) -> LevelObserver:
        """:param stream: where to write; ``None``: standard output."""
        self._observer = observer_for(self._settings.guard_log_format, self._settings.guard_log_level, stream)
        if self._guard is not None:  # `twist` begins to log after the start
            self._guard.change_levels_of(self._observer)
        return self._observer

    def startService(self) -> None:
        if self._guard is None:  # `twist` starts services without `privilegedStartService`
            self.privilegedStartService()
        super().startService()

    def privilegedStartService(self) -> None:
        listen, admin_listen = self._options["listen"], self._options["admin-listen"]
        self._guard = Guard(
            self._settings, self._reactor, listen=listen, admin_listen=admin_listen, observer=self._observer
        )
        self._guard.setServiceParent(self)
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reload))
        super().privilegedStartService()

    def _reload(self) -> None:
        """Read the settings again, all of them before one is applied; a wrong one changes nothing."""
        try:
            settings = read_settings()
        except ConfigurationError as error:
            log.error("nothing was reloaded: {error}", error=str(error), event_name="reload_failed")
            return
        if self._guard is not None:
            self._guard.reload(settings)


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

        idle = settings.guard_upstream_timeout
        webhooks = Webhooks(calls.changes, settings.sfu_key, clients.livekit.now, metrics)
        self._reloader = Reloader(settings, clients, rooms, joins, calls, health, webhooks, metrics)
        public = PublicApi(RequestHandler(joins.admission, clients.upstream, reactor, metrics, idle=idle), webhooks)
        site = public.site(reactor, max_body=settings.guard_max_body)
        metrics.in_flight.set_function(lambda: len(site.in_flight))
        self.public = self._listener(
            "public", listen or [_endpoint(settings.guard_bind_host, settings.guard_bind_port)], "GUARD_BIND_PORT", site
        )
        self.appservice: Listener | None = None
        if settings.guard_appservice_port is not None:
            from lotusguard.web.appservice import AppServiceApi

            proxied = RequestHandler(
                joins.admission,
                clients.upstream,
                reactor,
                metrics,
                idle=idle,
                keep_identity=True,
                silence=PROXIED_SILENCE,
            )
            appservice = AppServiceApi(proxied, settings.guard_appservice_token.get_secret_value())
            self._reloader.appservice = appservice
            endpoint = _endpoint(settings.guard_appservice_host, settings.guard_appservice_port)
            site = appservice.site(reactor, max_body=settings.guard_max_body)
            self.appservice = self._listener("app-service", [endpoint], "GUARD_APPSERVICE_PORT", site)
        self.admin: Listener | None = None
        if has_operators:
            token = settings.guard_admin_token.get_secret_value()
            view = ConsoleView(
                health, state.seats, rooms.policies, joins.decision_log, reactor, wall, waiting.lobby.waiting,
                RoomNames(rooms.sources, reactor),
            )  # fmt: skip
            sessions = self._reloader.sessions = Sessions(token, reactor)
            operators = self._reloader.operators = OperatorApi(
                health=health, decision_log=joins.decision_log, enforcement=calls.enforcement, changes=calls.changes,
                policies=rooms.policies, sources=rooms.sources, seats=state.seats, registry=state.registry,
                metrics=metrics,
                lobby=waiting.lobby, moderation=calls.moderator,
                console=Console(view, sessions, calls.moderator, calls.changes, reactor), token=token,
                guard=lambda: self.public.place, clock=reactor,
            )  # fmt: skip
            endpoint = admin_listen or _endpoint(settings.guard_admin_host, settings.guard_admin_port or 0)
            self.admin = self._listener("operators'", [endpoint], "GUARD_ADMIN_PORT", operators.site(reactor))
        self._reloader.observer = observer
        self._add_periodic_work(health)
        ReactorLagMonitor(reactor, metrics).setServiceParent(self)
        self._systemd = SystemdNotifier(reactor)
        self._systemd.setServiceParent(self)

    def change_levels_of(self, observer: LevelObserver) -> None:
        """A reload changes the level of this log."""
        self._reloader.observer = observer

    def reload(self, settings: Settings) -> None:
        """Apply settings that were read again; calls and seats are kept."""
        self._reloader.reload(settings)

    def _listener(self, name: str, endpoints: Sequence[str], setting: str, site: Any) -> Listener:
        listener = Listener(f"the {name} listener", endpoints, setting, site, self._reactor)
        listener.setServiceParent(self)
        return listener

    def _add_periodic_work(self, health: Health) -> None:
        """The periodic work."""
        homeserver, lease, sharing = self._clients.homeserver, self._state.lease, self._state.sharing
        seats = self._state.own_seats if sharing is None else sharing.book
        waiting = self._waiting

        async def learn_server_name() -> None:
            if not homeserver.server_name:
                await homeserver.whoami()

        async def prune() -> None:
            seats.prune()

        async def renew_lease() -> None:
            if lease is not None:
                lease.renew()

        async def keep_lobbies() -> None:
            await waiting.lobby.pass_time()
            waiting.notices.pass_time()

        interval = self._settings.guard_reconcile_interval
        for periodic in (
            PeriodicService("renewing the lease", 1.0, renew_lease, self._reactor, now=True),
            PeriodicService("reconciling", interval, self.changes.reconcile, self._reactor, now=True),
            PeriodicService("asking for the server name", 5.0, learn_server_name, self._reactor, now=True),
            PeriodicService("watching what is enforced", WATCH_EVERY, health.watch, self._reactor),
            PeriodicService("keeping lobbies", 1.0, keep_lobbies, self._reactor),
            PeriodicService("looking after lobbies", 2.0, waiting.switch.pass_time, self._reactor),
            PeriodicService("pruning", 60.0, prune, self._reactor),
        ):
            periodic.setServiceParent(self)
        link = LiveKitLink(self._reactor, self._settings.livekit_api, self.changes.livekit_returned, _not_looked)
        link.setServiceParent(self)
        if sharing is not None:
            changes = self.changes
            sharing.leases.enforce = self.enforcement.enforce
            sharing.leases.changed = lambda room_id, user, how: run_in_background(
                changes.changed_at_another_guard(room_id, user, how), _report
            )
            sharing.redis.on_subscribed.append(changes.anything_may_have_changed)
            for name, seconds, work in sharing.upkeep():
                PeriodicService(name, seconds, work, self._reactor).setServiceParent(self)

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
            await pool.closeCachedConnections()
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


def _report(failure: Failure) -> None:
    log.failure("a change that another guard announced could not be handled", failure)


def _not_looked(failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.debug("LiveKit is back and does not answer yet: {reason}", reason=failure.getErrorMessage())
    else:
        log.failure("what LiveKit has lost could not be found", failure)


def _endpoint(host: str, port: int) -> str:
    return f"tcp:{port}:interface={host.strip('[]').replace(':', chr(92) + ':')}:backlog={BACKLOG}"
