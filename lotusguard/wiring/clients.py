# SPDX-License-Identifier: Apache-2.0
"""Makes the clients of the services that the guard relies on."""

from __future__ import annotations

from collections.abc import Callable
from secrets import token_hex
from typing import Any

from attrs import frozen

from lotusguard.clients.dependency import Dependency
from lotusguard.clients.http import ConnectionPool, FixedAgent
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.lk_jwt_service import LkJwtService
from lotusguard.clients.synapse import AccessToken, MatrixClient, OpenIDClient, SynapseClient
from lotusguard.clients.synapse.matrix import FIRST_SYNC, LARGEST_SYNC
from lotusguard.clients.synapse.openid import CALLS_AT_ONCE as OPENID_AT_ONCE
from lotusguard.clients.unconfigured import UnconfiguredDependency
from lotusguard.config import Settings
from lotusguard.metrics import Metrics
from lotusguard.rules.jwt import SfuKey

DISCOVERY_TIMEOUT = 10.0
"""Seconds for one page of the homeserver's list of rooms."""
MATRIX_TIMEOUT = 10.0
"""Seconds for a call of the client-server API; joining a room of another homeserver takes long."""


@frozen
class Clients:
    """The services that the guard relies on. ``all`` are to be stopped, ``pools`` to be closed at the end.

    :ivar token: the access token of the guard's account, which the clients of the homeserver share.
    :ivar discovery: lists the homeserver's rooms, which may be slow.
    :ivar openid: verifies tokens that anybody can send.
    :ivar matrix: the calls of the guard's account as a member of rooms, over connections of their own.
    """

    pools: tuple[ConnectionPool, ...]
    token: AccessToken
    livekit: LiveKitClient
    homeserver: SynapseClient
    discovery: SynapseClient
    openid: OpenIDClient
    matrix: MatrixClient
    upstream: LkJwtService
    all: tuple[Dependency, ...]


def connect(settings: Settings, reactor: Any, metrics: Metrics, wall: Callable[[], float]) -> Clients:
    """The clients. Nothing is connected to yet."""
    pool, matrix_pool = ConnectionPool(reactor), ConnectionPool(reactor)
    token = AccessToken(settings.matrix_token.get_secret_value())
    key = settings.sfu_key

    def dependency(
        name: str, base: str, timeout: float, missing: str, pool: ConnectionPool = pool, **more: Any
    ) -> Dependency:
        agent = FixedAgent(reactor, base, pool)
        if missing:
            return UnconfiguredDependency(
                name, agent, reactor, metrics, timeout=timeout, wall_clock=wall, missing=missing
            )
        return Dependency(name, agent, reactor, metrics, timeout=timeout, wall_clock=wall, **more)

    timeout = settings.guard_lookup_timeout
    no_token = "" if token.value else "no_matrix_token"
    livekit = dependency("livekit", settings.livekit_api, timeout, "" if key else "no_livekit_key")
    synapse = dependency("synapse", settings.synapse_api, timeout, no_token)
    verifying = dependency("synapse_openid", settings.synapse_api, timeout, no_token, at_once=OPENID_AT_ONCE)
    listing_rooms = dependency("synapse_discovery", settings.synapse_api, DISCOVERY_TIMEOUT, no_token)
    matrix = dependency("matrix", settings.synapse_api, MATRIX_TIMEOUT, no_token, matrix_pool)
    syncing = dependency("matrix_sync", settings.synapse_api, FIRST_SYNC + 1, no_token, matrix_pool, limit=LARGEST_SYNC)
    upstream = LkJwtService(
        FixedAgent(reactor, settings.guard_upstream, pool), reactor, metrics,
        timeout=settings.guard_upstream_timeout, grace=settings.guard_upstream_grace,
    )  # fmt: skip
    homeserver = SynapseClient(synapse, token, settings.guard_server_name)
    return Clients(
        (pool, matrix_pool),
        token,
        LiveKitClient(livekit, key or SfuKey("unconfigured", token_hex()), wall),
        homeserver,
        SynapseClient(listing_rooms, token, settings.guard_server_name),
        OpenIDClient(verifying, homeserver),
        MatrixClient(matrix, syncing, token),
        upstream,
        (livekit, synapse, verifying, listing_rooms, matrix, syncing),
    )
