# SPDX-License-Identifier: Apache-2.0
"""A real homeserver for the tests: one Synapse process per session, with SQLite in a temporary directory.

Its ``PolicyPush`` module reports to ``guard_port``, where a test may start a guard.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import itertools
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_twisted
import treq
import yaml
from attrs import field, frozen
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.web.client import Agent
from twisted.web.http_headers import Headers

import lotusguard
from lotusguard.clients.http import Answer, BytesBody
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, Sandbox

SERVER_NAME = "real.test"
START_WITHIN = 60.0
STOP_WITHIN = 10.0
KNOWN_WITHIN = 5.0


@frozen
class User:
    """:ivar token: the access token."""

    user_id: str
    token: str = field(repr=False)


class Failed(Exception):
    """Synapse refused something that a test needs."""


class Synapse:
    """One homeserver process.

    :param directory: an empty directory.
    :param guard_port: the port of the guard's operators' listener, whose token is `ADMIN_TOKEN`.
    """

    def __init__(self, directory: Path, *, guard_port: int) -> None:
        self.server_name = SERVER_NAME
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.guard_port = guard_port
        self._directory = directory
        self._log = directory / "homeserver.log"
        self._shared_secret = secrets.token_hex(16)
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: Any = None
        self._users: dict[str, User] = {}

    # -- the process -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it and wait until it serves."""
        path = self._directory / "homeserver.yaml"
        path.write_text(yaml.safe_dump(self._configuration()))
        (self._directory / "signing.key").write_text(f"ed25519 a_test {b64encode(os.urandom(32)).decode().rstrip('=')}")
        (self._directory / "log.yaml").write_text(yaml.safe_dump(_LOGGING))
        # Synapse does not get the tests' warning filters; it loads the module under test.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
        environment["PYTHONPATH"] = str(Path(lotusguard.__file__).parent.parent)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "synapse.app.homeserver", "-c", str(path)],
                cwd=self._directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_serves(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_WITHIN
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > end:
                raise Failed(f"Synapse did not start:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """Stop the process that `start` started."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """Its log so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _configuration(self) -> dict[str, Any]:
        plenty = {"per_second": 10_000, "burst_count": 10_000}
        return {
            "server_name": SERVER_NAME,
            "listeners": [
                {
                    "port": self.port,
                    "bind_addresses": ["127.0.0.1"],
                    "type": "http",
                    "resources": [{"names": ["client", "openid"]}],
                }
            ],
            "database": {"name": "sqlite3", "args": {"database": str(self._directory / "homeserver.db")}},
            "log_config": str(self._directory / "log.yaml"),
            "media_store_path": str(self._directory / "media"),
            "signing_key_path": str(self._directory / "signing.key"),
            "registration_shared_secret": self._shared_secret,
            "macaroon_secret_key": secrets.token_hex(16),
            "bcrypt_rounds": 4,
            "trusted_key_servers": [],
            "federation_domain_whitelist": [],
            "presence": {"enabled": False},
            "report_stats": False,
            "rc_message": plenty,
            "rc_registration": plenty,
            "rc_login": {"address": plenty, "account": plenty, "failed_attempts": plenty},
            "rc_joins": {"local": plenty, "remote": plenty},
            "rc_room_creation": plenty,
            "rc_admin_redaction": plenty,
            "modules": [
                {
                    "module": "lotusguard.synapse_module.PolicyPush",
                    "config": {"url": f"http://127.0.0.1:{self.guard_port}", "token": ADMIN_TOKEN},
                }
            ],
        }

    # -- what its users do -------------------------------------------------------------------------------

    async def ask(self, method: str, path: str, token: str = "", content: object = None) -> tuple[int, Any]:
        """Make one request. :return: the status and the JSON of the answer."""
        if self._agent is None:
            self._agent = Agent(reactor, connectTimeout=5)
        headers = Headers({"Authorization": [f"Bearer {token}"]} if token else {})
        body = None if content is None else BytesBody(json.dumps(content).encode())
        answer = await self._agent.request(method.encode(), f"{self.url}{path}".encode(), headers, body)
        return answer.code, json.loads(await treq.content(answer))

    async def _done(self, method: str, path: str, token: str = "", content: object = None) -> Any:
        code, answered = await self.ask(method, path, token, content)
        if code != 200:
            raise Failed(f"{method} {path}: {code} {answered}")
        return answered

    async def register(self, name: str, *, admin: bool = False) -> User:
        """A new user, registered by shared secret; a number is appended to the name.

        :param admin: of the homeserver.
        """
        path = "/_synapse/admin/v1/register"
        nonce = (await self._done("GET", path))["nonce"]
        username, password = f"{name}{next(self._numbers)}", secrets.token_hex(8)
        signed = "\0".join([nonce, username, password, "admin" if admin else "notadmin"])
        mac = hmac.new(self._shared_secret.encode(), signed.encode(), hashlib.sha1).hexdigest()
        content = {"nonce": nonce, "username": username, "password": password, "admin": admin, "mac": mac}
        registered = await self._done("POST", path, content=content)
        return User(registered["user_id"], registered["access_token"])

    async def user(self, name: str, *, admin: bool = False) -> User:
        """The user of that name, registered at the first call."""
        if name not in self._users:
            self._users[name] = await self.register(name, admin=admin)
        return self._users[name]

    async def create_room(self, creator: User, **how: object) -> str:
        """:param how: keys of the request. :return: the room ID."""
        room_id: str = (await self._done("POST", f"{_CLIENT}/createRoom", creator.token, how))["room_id"]
        return room_id

    async def room_of(self, creator: User, *members: User, **how: object) -> str:
        """A room that these users have joined. :param how: keys of the request. :return: the room ID."""
        room_id = await self.create_room(creator, preset="public_chat", **how)
        for member in members:
            await self.change_membership(member, room_id, "join")
        return room_id

    async def set_state(self, by: User, room_id: str, kind: str, content: dict[str, Any]) -> str:
        """Put a state event with the empty key, as a client does. :return: the event ID."""
        path = f"{_CLIENT}/rooms/{quote(room_id, safe='')}/state/{kind}"
        event_id: str = (await self._done("PUT", path, by.token, content))["event_id"]
        return event_id

    async def change_membership(self, by: User, room_id: str, action: str, of: User | None = None) -> None:
        """:param action: ``join``, ``leave``, ``invite``, ``kick``, ``ban``, ``unban`` or ``knock``."""
        room = quote(room_id, safe="")
        path = f"{_CLIENT}/knock/{room}" if action == "knock" else f"{_CLIENT}/rooms/{room}/{action}"
        await self._done("POST", path, by.token, {"user_id": of.user_id} if of is not None else {})

    async def redact(self, by: User, room_id: str, event_id: str) -> None:
        path = f"{_CLIENT}/rooms/{quote(room_id, safe='')}/redact/{quote(event_id, safe='')}/{secrets.token_hex(4)}"
        await self._done("PUT", path, by.token, {})

    async def saw(self, user: User, what: str = "", since: str = "") -> str:
        """Wait until /sync shows something to a user.

        :param what: an event's ID or type. :return: the token for the next /sync.
        """
        while True:
            query = f"?since={since}&timeout=30000" if since else ""
            new = await self._done("GET", f"{_CLIENT}/sync{query}", user.token)
            since = new["next_batch"]
            if what in json.dumps(new):
                return since

    async def openid_token(self, user: User) -> dict[str, Any]:
        path = f"{_CLIENT}/user/{quote(user.user_id, safe='')}/openid/request_token"
        openid: dict[str, Any] = await self._done("POST", path, user.token, {})
        return openid


class Guarded:
    """A guard with the real homeserver; everything else is the sandbox's."""

    def __init__(self, synapse: Synapse, sandbox: Sandbox) -> None:
        self.synapse = synapse
        self.sandbox = sandbox
        sandbox.upstream.homeservers[synapse.server_name] = synapse.url

    async def ask_token(self, user: User, room_id: str, **how: Any) -> Answer:
        """As `Sandbox.ask_token`, with an OpenID token of the real homeserver."""
        how.setdefault("openid_token", await self.synapse.openid_token(user))
        return await self.sandbox.ask_token(user.user_id, room_id, **how)

    async def enter(self, user: User, room_id: str, **how: Any) -> Any:
        """Ask for a token and connect with it. :return: the participant."""
        how.setdefault("openid_token", await self.synapse.openid_token(user))
        return await self.sandbox.enter(user.user_id, room_id, **how)

    async def limit_becomes(self, room_id: str, cap: int | None) -> None:
        """Wait until the guard knows a room's new limit. Somebody must be in the room's call."""
        end = reactor.seconds() + KNOWN_WITHIN
        while True:
            rooms = json.loads((await self.sandbox.operator("GET", "/rooms")).body)["rooms"]
            caps = {room["room_id"]: room["policy"]["max_users"] for room in rooms}
            if room_id in caps and caps[room_id] == cap:
                return
            if reactor.seconds() > end:
                raise Failed(f"{room_id} should have {cap} seats: {caps}")
            await deferLater(reactor, 0.01)


MakeGuarded = Callable[..., Awaitable[Guarded]]


@pytest.fixture(scope="session")
def synapse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synapse]:
    if importlib.util.find_spec("synapse") is None:
        pytest.skip("matrix-synapse is not installed: the tests with a real homeserver were skipped")
    homeserver = Synapse(tmp_path_factory.mktemp("synapse"), guard_port=free_port())
    homeserver.start()
    yield homeserver
    homeserver.stop()


@pytest_twisted.async_yield_fixture
async def set_guarded(synapse: Synapse, start_sandbox: Any) -> AsyncIterator[MakeGuarded]:
    """Makes a guard with the real homeserver; settings by lower-case name."""

    async def make(**settings: object) -> Guarded:
        admin = await synapse.user("admin", admin=True)
        given = {"synapse_api": synapse.url, "matrix_token": admin.token, "guard_reconcile_interval": 3600}
        return Guarded(synapse, await start_sandbox(**{**given, **settings}))

    yield make


@pytest_twisted.async_yield_fixture
async def guarded(set_guarded: MakeGuarded) -> AsyncIterator[Guarded]:
    yield await set_guarded()


def free_port() -> int:
    """A free port of loopback, outside the range of outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


_CLIENT = "/_matrix/client/v3"
_LOGGING = {
    "version": 1,
    "formatters": {"plain": {"format": "%(asctime)s %(name)s %(levelname)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"level": "WARNING", "handlers": ["console"]},
    "disable_existing_loggers": False,
}
