# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Synapse: the admin API, and the parts of the client API that the guard and its tests use. Sandbox.

Read from Synapse 1.163's ``rest/admin``, ``rest/client`` and ``federation/transport/server``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from lotusguard.sandbox.standin import StandIn
from lotusguard.sandbox.synapse import admin_api, client_api, sync
from lotusguard.sandbox.synapse.admin_api import AdminApi
from lotusguard.sandbox.synapse.client_api import ClientApi
from lotusguard.sandbox.synapse.errors import PREFLIGHT_HEADERS, error, ok, query
from lotusguard.sandbox.synapse.matrix import Login, Matrix
from lotusguard.sandbox.synapse.sync import SyncApi
from lotusguard.sandbox.wire import Asked, Reply

_OPEN_ROUTES = {
    "server_version": r"/_synapse/admin/v1/server_version",
    "userinfo": r"/_matrix/federation/v1/openid/userinfo",
    "versions": r"/_matrix/client/versions",
}
ROUTES = _OPEN_ROUTES | admin_api.ROUTES | client_api.ROUTES | sync.ROUTES
_METHODS = client_api.METHODS | sync.METHODS
_PATTERNS = {name: re.compile(pattern) for name, pattern in ROUTES.items()}


class FakeSynapse(Matrix, StandIn):
    """Synapse. Route names for ``faults``: the keys of ``ROUTES``, or ``""`` for unknown paths.

    :param server_name: the part of user IDs after the first colon.
    :param ignores_type: answer with the whole state whatever ``type`` is asked for, as older releases do.
    :param has_memberships: whether the admin API has ``/users/{id}/memberships``; older releases do not.
    :param now: seconds since the epoch, for OpenID tokens and events.
    """

    def __init__(
        self,
        reactor: Any,
        server_name: str = "sandbox.local",
        *,
        ignores_type: bool = False,
        has_memberships: bool = True,
        now: Callable[[], float] = time.time,
        port: int = 0,
        clock: Any = None,
    ) -> None:
        Matrix.__init__(self, server_name, now)
        StandIn.__init__(self, reactor, port=port, clock=clock)
        self.has_memberships = has_memberships
        self.admin_api = AdminApi(self, ignores_type=ignores_type)
        self.client_api = ClientApi(self)
        self.sync_api = SyncApi(self, self.clock)

    @property
    def ignores_type(self) -> bool:
        return self.admin_api.ignores_type

    @ignores_type.setter
    def ignores_type(self, value: bool) -> None:
        self.admin_api.ignores_type = value

    def route_of(self, asked: Asked) -> str:
        return next((name for name, pattern in _PATTERNS.items() if pattern.fullmatch(asked.path)), "")

    async def answer(self, asked: Asked, route: str) -> Reply:
        if asked.method == "OPTIONS":
            return Reply(204, b"", PREFLIGHT_HEADERS)
        if not route or (route == "user_memberships" and not self.has_memberships):
            raise error(404, "M_UNRECOGNIZED", "Unrecognized request")
        if asked.method not in _METHODS.get(route, ("GET",)):
            raise error(405, "M_UNRECOGNIZED", "Unrecognized request")
        match = _PATTERNS[route].fullmatch(asked.path)
        assert match is not None
        # Synapse matches the undecoded path and decodes the groups.
        groups = [unquote(group or "", errors="strict") for group in match.groups()]
        if route in _OPEN_ROUTES:
            return ok(getattr(self, f"_{route}")(asked))
        login = self._login(asked)
        if route in admin_api.ROUTES:
            return ok(self.admin_api.answer(login, route, asked, groups))
        if route in sync.ROUTES:
            return ok(await self.sync_api.answer(login, route, asked, groups))
        return ok(self.client_api.answer(login, route, asked, groups))

    def _server_version(self, asked: Asked) -> dict[str, Any]:
        return {"server_version": "1.163.2"}

    def _versions(self, asked: Asked) -> dict[str, Any]:
        return {"versions": ["r0.6.1", "v1.1", "v1.11"], "unstable_features": {}}

    def _userinfo(self, asked: Asked) -> dict[str, Any]:
        token = query(asked).get("access_token")
        if token is None:
            raise error(401, "M_MISSING_TOKEN", "Access Token required")
        user_id, expires = self.openid.get(token, ("", 0.0))
        if expires <= self.now():
            raise error(401, "M_UNKNOWN_TOKEN", "Access Token unknown or expired")
        return {"sub": user_id}

    def _login(self, asked: Asked) -> Login:
        header = asked.header("Authorization") or ""
        token = header.removeprefix("Bearer ") if header else query(asked).get("access_token", "")
        if not token:
            raise error(401, "M_MISSING_TOKEN", "Missing access token")
        login = self.logins.get(token)
        if login is None:
            raise error(401, "M_UNKNOWN_TOKEN", "Invalid access token passed.", soft_logout=False)
        return login
