# SPDX-License-Identifier: Apache-2.0
"""Makes the listeners: the routes of each, and where it listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lotusguard.config import Settings
from lotusguard.guard.health import Health
from lotusguard.metrics import Metrics
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
from lotusguard.wiring.clients import Clients
from lotusguard.wiring.guard import Calls, Joins, Rooms, Waiting
from lotusguard.wiring.state import State

if TYPE_CHECKING:  # it is imported only where there is such a listener
    from lotusguard.web.appservice import AppServiceApi

BACKLOG = 4096
"""Connections that the kernel may keep waiting to be accepted. Clients that find no place try again after 1, 3, 7 s."""


def public_listener(
    settings: Settings, reactor: Any, metrics: Metrics, clients: Clients, joins: Joins, webhooks: Webhooks,
    endpoints: Sequence[str],
) -> Listener:  # fmt: skip
    """What clients and LiveKit reach. :param endpoints: where to listen instead of what the settings say."""
    handler = RequestHandler(joins.admission, clients.upstream, reactor, metrics, idle=settings.guard_upstream_timeout)
    site = PublicApi(handler, webhooks).site(reactor, max_body=settings.guard_max_body)
    metrics.in_flight.set_function(lambda: len(site.in_flight))
    endpoints = endpoints or [_endpoint(settings.guard_bind_host, settings.guard_bind_port)]
    return Listener("the public listener", endpoints, "GUARD_BIND_PORT", site, reactor)


def appservice_listener(
    settings: Settings, reactor: Any, metrics: Metrics, clients: Clients, joins: Joins, port: int
) -> tuple[Listener, AppServiceApi]:
    """What the homeserver reaches, for its users' requests that it passes on."""
    from lotusguard.web.appservice import AppServiceApi

    handler = RequestHandler(
        joins.admission, clients.upstream, reactor, metrics, idle=settings.guard_upstream_timeout,
        keep_identity=True, silence=PROXIED_SILENCE,
    )  # fmt: skip
    routes = AppServiceApi(handler, settings.guard_appservice_token.get_secret_value())
    endpoint = _endpoint(settings.guard_appservice_host, port)
    site = routes.site(reactor, max_body=settings.guard_max_body)
    return Listener("the app-service listener", [endpoint], "GUARD_APPSERVICE_PORT", site, reactor), routes


def operators_listener(
    settings: Settings, reactor: Any, metrics: Metrics, wall: Callable[[], float], state: State, rooms: Rooms,
    waiting: Waiting, joins: Joins, calls: Calls, health: Health, place: Callable[[], str], endpoint: str | None,
) -> tuple[Listener, OperatorApi, Sessions]:  # fmt: skip
    """What operators and their programs reach.

    :param place: where this guard is, to tell several apart. :param endpoint: where to listen instead of what the
        settings say.
    """
    token = settings.guard_admin_token.get_secret_value()
    view = ConsoleView(
        health, state.seats, rooms.policies, joins.decision_log, reactor, wall, waiting.lobby.waiting,
        RoomNames(rooms.sources, reactor),
    )  # fmt: skip
    sessions = Sessions(token, reactor)
    routes = OperatorApi(
        health=health, decision_log=joins.decision_log, enforcement=calls.enforcement, changes=calls.changes,
        policies=rooms.policies, sources=rooms.sources, seats=state.seats, registry=state.registry, metrics=metrics,
        lobby=waiting.lobby, moderation=calls.moderator,
        console=Console(view, sessions, calls.moderator, calls.changes, reactor), token=token, guard=place,
        clock=reactor,
    )  # fmt: skip
    endpoint = endpoint or _endpoint(settings.guard_admin_host, settings.guard_admin_port or 0)
    listener = Listener("the operators' listener", [endpoint], "GUARD_ADMIN_PORT", routes.site(reactor), reactor)
    return listener, routes, sessions


def _endpoint(host: str, port: int) -> str:
    return f"tcp:{port}:interface={host.strip('[]').replace(':', chr(92) + ':')}:backlog={BACKLOG}"
