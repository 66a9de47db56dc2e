# SPDX-License-Identifier: Apache-2.0
"""The roof: options, and the one place where everything is wired."""

from __future__ import annotations

import gc
import resource
from typing import Any, ClassVar

from twisted.application.service import MultiService
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.components import Componentized

from lotusguard.clients.dependency import Dependency
from lotusguard.clients.http import FixedAgent, connection_pool
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.lk_jwt_service import LkJwtService
from lotusguard.clients.synapse import SynapseClient
from lotusguard.config import ConfigurationError, Settings, read_settings, suspicions
from lotusguard.guard.calls.discovery import Discovery
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.calls.participants import ParticipantEnforcer
from lotusguard.guard.health import Health
from lotusguard.guard.joins.admission import Admission
from lotusguard.guard.joins.decisions import DecisionLog
from lotusguard.guard.periodic import PeriodicService
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import MemorySeatBook
from lotusguard.guard.seats.registry import MemoryTokenRegistry
from lotusguard.guard.seats.roster import Roster
from lotusguard.guard.seats.store import StateUnusable, open_state_store
from lotusguard.logs import observer_for
from lotusguard.metrics import Metrics
from lotusguard.supervision import ReactorLagMonitor, SystemdNotifier
from lotusguard.web.appservice import AppServiceApi
from lotusguard.web.handlers import RequestHandler
from lotusguard.web.listener import Listener
from lotusguard.web.operators import OperatorApi
from lotusguard.web.public import PublicApi
from lotusguard.web.webhooks import Webhooks

log = Logger()


BACKLOG = 4096
"""Callers the kernel may keep waiting to be accepted. Who finds no place tries again after 1 s, 3 s, 7 s."""
DISCOVERY_TIMEOUT = 10.0
"""Seconds for one page of the homeserver's list of rooms."""
OPERATORS_PATIENCE = 1.0
"""Seconds for which operators' requests may go on when we leave."""


class Options(usage.Options):
    """What can be said on the command line; everything else is in the environment (see README)."""

    synopsis = "[options]"
    longdesc = "Enforces Matrix rooms' call policies in front of lk-jwt-service. Settings come from the environment."
    optParameters: ClassVar[list[list[str | None]]] = [
        ["listen", "l", None, "endpoint to listen on instead of GUARD_BIND_HOST and GUARD_BIND_PORT"],
        ["admin-listen", None, None, "endpoint of the operators' listener instead of GUARD_ADMIN_…"],
    ]


def makeService(options: Options) -> Unbuilt:
    """What ``twistd lotusguard`` runs. A wrong setting ends it with one line."""
    from twisted.internet import reactor

    try:
        settings = read_settings()
    except ConfigurationError as error:
        raise SystemExit(f"lotusguard: {error}") from None
    reactor.callWhenRunning(spare_collector)
    return Unbuilt(settings, reactor, options)


class Unbuilt(MultiService):
    """The guard before it is built: ``twistd`` may yet go into the background, where this process's threads and open
    database would not follow."""

    def __init__(self, settings: Settings, reactor: Any, options: Options) -> None:
        super().__init__()
        self._settings = settings
        self._reactor = reactor
        self._options = options

    def setServiceParent(self, parent: Any) -> None:
        """Under ``twistd`` the parent is the application, whose log has the format that was asked for, unless it goes
        where twistd's own options say, or into the background."""
        twistd = getattr(self._options, "parent", None) or {"nodaemon": True}
        elsewhere = any(twistd.get(option) for option in ("logfile", "syslog", "logger"))
        if isinstance(parent, Componentized) and twistd["nodaemon"] and not elsewhere:
            observer = observer_for(self._settings.guard_log_format, self._settings.guard_log_level)
            parent.setComponent(ILogObserver, observer)
        super().setServiceParent(parent)

    def privilegedStartService(self) -> None:
        listen, admin_listen = self._options["listen"], self._options["admin-listen"]
        Guard(self._settings, self._reactor, listen=listen, admin_listen=admin_listen).setServiceParent(self)
        super().privilegedStartService()


class Guard(MultiService):
    """The whole service. Its parts and how they hang gather are in ``__init__``, from the ground up.

    :param listen: an endpoint to listen on instead of what the settings say.
    """

    def __init__(
        self, settings: Settings, reactor: Any, *, listen: str | None = None, admin_listen: str | None = None
    ) -> None:
        super().__init__()
        self._settings = settings
        self._reactor = reactor
        metrics = self.metrics = Metrics()
        key = settings.sfu_key
        token = settings.matrix_token.get_secret_value()

        # what survives a restart
        self._store, store_error = None, None
        if settings.state_dir is not None:
            try:
                self._store = open_state_store(settings.state_dir, reactor, metrics)
            except StateUnusable as error:
                store_error = str(error)
        registry = MemoryTokenRegistry(self._store, reactor, metrics)
        seats = MemorySeatBook(self._store, reactor, metrics, seat_ttl=settings.guard_seat_ttl)
        seats.load(registry.load())

        # dependencies
        pool = self._pool = connection_pool(reactor)
        timeout = settings.guard_lookup_timeout
        upstream_agent = FixedAgent(reactor, settings.guard_upstream, pool)
        authorizer = LkJwtService(
            upstream_agent,
            reactor,
            metrics,
            timeout=settings.guard_upstream_timeout,
            grace=settings.guard_upstream_grace,
        )
        livekit = Dependency(
            "livekit", FixedAgent(reactor, settings.livekit_api, pool), reactor, metrics, timeout=timeout
        )
        synapse = Dependency(
            "synapse", FixedAgent(reactor, settings.synapse_api, pool), reactor, metrics, timeout=timeout
        )
        listing_rooms = Dependency(
            "synapse_discovery",
            FixedAgent(reactor, settings.synapse_api, pool),
            reactor,
            metrics,
            timeout=DISCOVERY_TIMEOUT,
        )
        self._dependencies = (livekit, synapse, listing_rooms)
        sfu = LiveKitClient(livekit, key, reactor) if key is not None else None
        homeserver = SynapseClient(synapse, token, settings.guard_server_name) if token else None
        rooms = SynapseClient(listing_rooms, token, settings.guard_server_name) if token else None

        # what we do
        policies = Policies(
            homeserver, reactor, metrics, ttl=settings.guard_policy_ttl, stale=settings.guard_policy_stale
        )
        roster = Roster(sfu, seats, registry, policies, reactor, metrics)
        decision_log = self.decision_log = DecisionLog(reactor, metrics)
        admission = Admission(
            policies=policies,
            roster=roster,
            seats=seats,
            registry=registry,
            homeserver=homeserver,
            key=key,
            decision_log=decision_log,
            clock=reactor,
            metrics=metrics,
            lookup_timeout=timeout,
            token_ttl=settings.guard_token_ttl,
            dry_run=settings.guard_dry_run,
        )
        participants = ParticipantEnforcer(
            roster=roster,
            seats=seats,
            registry=registry,
            clock=reactor,
            metrics=metrics,
            lookup_timeout=timeout,
            eject=settings.guard_overflow == "eject",
            restore=settings.guard_restore,
            dry_run=settings.guard_dry_run,
        )
        enforcement = self._enforcement = Enforcement(
            sfu=sfu,
            policies=policies,
            roster=roster,
            seats=seats,
            registry=registry,
            discovery=Discovery(rooms, registry, reactor, metrics),
            participants=participants,
            clock=reactor,
            metrics=metrics,
            lookup_timeout=timeout,
        )
        health = Health(
            sfu=sfu,
            homeserver=homeserver,
            authorizer=authorizer,
            decision_log=decision_log,
            enforcement=enforcement,
            store=self._store,
            store_error=store_error,
            clock=reactor,
            dry_run=settings.guard_dry_run,
            reconcile_interval=settings.guard_reconcile_interval,
        )

        # doors
        webhooks = Webhooks(enforcement, key, reactor, metrics)
        idle = settings.guard_upstream_timeout
        public = PublicApi(RequestHandler(admission, authorizer, reactor, metrics, idle=idle), webhooks)
        site = public.site(reactor, max_body=settings.guard_max_body)
        metrics.in_flight.set_function(lambda: len(site.in_flight))
        self.public = Listener(
            "the public door",
            listen or _endpoint(settings.guard_bind_host, settings.guard_bind_port),
            "GUARD_BIND_PORT",
            site,
            reactor,
        )
        self.public.setServiceParent(self)
        self.appservice: Listener | None = None
        if settings.guard_appservice_port is not None:
            proxied = RequestHandler(admission, authorizer, reactor, metrics, idle=idle, keep_identity=True)
            appservice = AppServiceApi(proxied, settings.guard_appservice_token.get_secret_value())
            self.appservice = Listener(
                "the app-service listener",
                _endpoint(settings.guard_appservice_host, settings.guard_appservice_port),
                "GUARD_APPSERVICE_PORT",
                appservice.site(reactor, max_body=settings.guard_max_body),
                reactor,
            )
            self.appservice.setServiceParent(self)
        self.admin: Listener | None = None
        if admin_listen or settings.guard_admin_port is not None:
            door = OperatorApi(
                health=health,
                decision_log=decision_log,
                enforcement=enforcement,
                policies=policies,
                seats=seats,
                registry=registry,
                metrics=metrics,
                clock=reactor,
                token=settings.guard_admin_token.get_secret_value(),
            )
            self.admin = Listener(
                "the operators' door",
                admin_listen or _endpoint(settings.guard_admin_host, settings.guard_admin_port or 0),
                "GUARD_ADMIN_PORT",
                door.site(reactor),
                reactor,
            )
            self.admin.setServiceParent(self)

        # what happens every few seconds
        async def learn_server_name() -> None:
            if homeserver is not None and not homeserver.server_name:
                await homeserver.whoami()

        async def tidy() -> None:
            seats.prune()

        for every in (
            PeriodicService("reconciling", settings.guard_reconcile_interval, enforcement.reconcile, reactor, now=True),
            PeriodicService("asking for the server name", 5.0, learn_server_name, reactor, now=True),
            PeriodicService("tidying", 60.0, tidy, reactor),
        ):
            every.setServiceParent(self)
        ReactorLagMonitor(reactor, metrics).setServiceParent(self)
        self._supervised = SystemdNotifier(reactor)
        self._supervised.setServiceParent(self)
        self._store_error = store_error

    def privilegedStartService(self) -> None:
        raise_file_limit()
        self._say(self._store_error)
        super().privilegedStartService()

    def startService(self) -> None:
        super().startService()
        self._supervised.ready()

    def stopService(self) -> Deferred[None]:
        """Accept nobody, finish what is in flight, then leave; what was promised is on disk."""
        return Deferred.fromCoroutine(self._leave())

    async def _leave(self) -> None:
        self._supervised.stopping()
        patience = self._settings.guard_upstream_timeout + self._settings.guard_upstream_grace
        await self.public.close(patience)
        if self.appservice is not None:
            await self.appservice.close(patience)
        if self.admin is not None:
            await self.admin.close(OPERATORS_PATIENCE)
        await self._enforcement.stop()
        for dependency in self._dependencies:
            dependency.stop()
        stopping = super().stopService()
        if isinstance(stopping, Deferred):
            await stopping
        await self._pool.closeCachedConnections()
        if self._store is not None:
            await self._store.close()

    def _say(self, store_error: str | None) -> None:
        """What is not as it probably should be, loudly and once."""
        settings = self._settings
        for suspicion in suspicions(settings):
            log.warn("{suspicion}", suspicion=suspicion, event_name="suspicious_setting")
        if settings.sfu_key is None:
            log.critical(
                "LIVEKIT_KEY and LIVEKIT_SECRET are not both set: neither caps nor sources are enforced",
                event_name="not_enforcing",
            )
        if not settings.matrix_token.get_secret_value():
            log.critical("MATRIX_TOKEN is not set: no room's policy can be read, nothing is enforced",
                         event_name="not_enforcing")  # fmt: skip
        if store_error is not None:
            log.error("what must survive a restart is kept in memory only: {error}", error=store_error,
                      event_name="no_state")  # fmt: skip


def _endpoint(host: str, port: int) -> str:
    return f"tcp:{port}:interface={host.strip('[]').replace(':', chr(92) + ':')}:backlog={BACKLOG}"


def spare_collector() -> None:
    """Let the garbage collector pass over what stays for good, and come less often: a join makes hundreds of objects,
    nearly all of which go without it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


def raise_file_limit() -> None:
    """PeriodicService join that is held costs two descriptors: take as many as we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
