# SPDX-License-Identifier: Apache-2.0
"""The three stand-ins and the guard on loopback. ``lotusguard sandbox`` and the tests use it."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from twisted.web.http_headers import Headers

from lotusguard.clients.http import Answer, ConnectionPool, FixedAgent, fetch
from lotusguard.config import Settings, read_settings
from lotusguard.sandbox.livekit.participant import Participant
from lotusguard.sandbox.livekit.server import FakeLiveKit
from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from lotusguard.service import Guard

KEY, SECRET = "sandboxkey", "sandbox-secret-that-is-nobodys-00"
ADMIN_TOKEN = "sandbox-operators"
SERVER_NAME = "sandbox.local"


class Sandbox:
    """The dependencies and the guard, each on a free port of loopback.

    :param homeserver_options: dict of keyword arguments for `FakeSynapse`.
    :param livekit_options: the same for `FakeLiveKit`.
    :param upstream_options: the same for `FakeLkJwtService`.
    :param settings: settings of the guard by lower-case name; they override those that make the sandbox work.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        homeserver_options: Any = None,
        livekit_options: Any = None,
        upstream_options: Any = None,
        **settings: object,
    ) -> None:
        self.reactor = reactor
        self._given = settings
        self._upstream_options = dict(upstream_options or {})
        self.homeserver = FakeSynapse(reactor, server_name=SERVER_NAME, **(homeserver_options or {}))
        self.livekit = FakeLiveKit(reactor, key=KEY, secret=SECRET, **(livekit_options or {}))
        self.upstream: FakeLkJwtService
        self.guard: Guard
        self.settings: Settings
        self._pool = ConnectionPool(reactor)
        self._agents: dict[str, FixedAgent] = {}

    async def start(self) -> None:
        """Start everything, the guard last."""
        await self.homeserver.start()
        await self.livekit.start()
        options = {
            "key": KEY,
            "secret": SECRET,
            "sfu_url": self.livekit.url,
            "homeservers": {SERVER_NAME: self.homeserver.url},
            **self._upstream_options,
        }
        self.upstream = FakeLkJwtService(self.reactor, **options)
        await self.upstream.start()
        self.admin_token = self.homeserver.add_user("admin", admin=True)
        await self.start_guard()

    def guard_settings(self) -> dict[str, object]:
        """The guard's settings: those that make the sandbox work, overridden by those that were given."""
        return {
            "guard_bind_host": "127.0.0.1",
            "guard_bind_port": 0,
            "guard_upstream": self.upstream.url,
            "livekit_api": self.livekit.url,
            "livekit_key": KEY,
            "livekit_secret": SECRET,
            "synapse_api": self.homeserver.url,
            "matrix_token": self.admin_token,
            "guard_admin_port": 0,
            "guard_admin_token": ADMIN_TOKEN,
            **self._given,
        }

    async def start_guard(self, **settings: object) -> None:
        """Start the guard. :param settings: override those of `guard_settings`."""
        self.settings = read_settings(**(self.guard_settings() | settings))
        self.guard = Guard(self.settings, self.reactor)
        self.guard.privilegedStartService()
        self.guard.startService()
        assert self.guard.public.port is not None
        self.url = _url(self.guard.public.port)
        self.admin_url = _url(self.guard.admin.port) if self.guard.admin and self.guard.admin.port else ""
        proxied = self.guard.appservice
        self.appservice_url = _url(proxied.port) if proxied and proxied.port else ""
        self.livekit.webhooks.urls[:] = [f"{self.url}/sfu_webhook"]

    async def stop(self) -> None:
        """Stop everything, the guard first."""
        await self.guard.stopService()
        await self.stop_dependencies()

    async def stop_dependencies(self) -> None:
        """Stop the stand-ins."""
        for standin in (self.upstream, self.livekit, self.homeserver):
            await standin.stop()
        await self._pool.close()

    # -- clients and operators ---------------------------------------------------------------------------

    async def request(
        self, method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Make one HTTP request and read the whole answer."""
        base, _, target = url.removeprefix("http://").partition("/")
        agent = self._agents.get(base)
        if agent is None:
            agent = self._agents[base] = FixedAgent(self.reactor, f"http://{base}", self._pool, 5)
        given = Headers({name: [value] for name, value in (headers or {}).items()})
        return await fetch(agent, method.encode(), f"/{target}".encode(), given, body, limit=64 * 1024 * 1024)

    async def ask_token(
        self, user: str, room_id: str, *, device: str = "PHONE", new: bool = False, member_id: str = "", **extra: Any
    ) -> Answer:
        """Ask for a token as Element Call does.

        :param new: at ``/get_token`` instead of ``/sfu/get``.
        :param extra: further keys of the body.
        """
        body: dict[str, Any] = {"openid_token": self.homeserver.openid_token(user), **extra}
        if new:
            member = {"id": member_id or uuid4().hex, "claimed_user_id": user, "claimed_device_id": device}
            body = {"room_id": room_id, "slot_id": "m.call#ROOM", "member": member} | body
        else:
            body = {"room": room_id, "device_id": device} | body
        path = "/get_token" if new else "/sfu/get"
        headers = {"Content-Type": "application/json"}
        return await self.request("POST", self.url + path, json.dumps(body).encode(), headers)

    async def enter(self, user: str, room_id: str, **how: Any) -> Participant:
        """Ask for a token and connect with it. :raises Refused: if the guard issues none."""
        answer = await self.ask_token(user, room_id, **how)
        if answer.code != 200:
            raise Refused(answer.code, json.loads(answer.body)["error"])
        return self.livekit.connect(json.loads(answer.body)["jwt"])

    async def operator(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """Make a request to the operators' listener, with its token."""
        return await self.request(method, self.admin_url + path, body, {"Authorization": f"Bearer {ADMIN_TOKEN}"})


class Refused(Exception):
    """No token was issued."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code
        self.text = text


def _url(port: Any) -> str:
    address = port.getHost()
    return f"http://{address.host}:{address.port}"
