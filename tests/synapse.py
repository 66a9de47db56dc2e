# SPDX-License-Identifier: Apache-2.0
"""A real Synapse for the tests: one process per session, with SQLite in a temporary directory.

Its ``PolicyPush`` module reports to ``guard_port``, where a test may start a guard.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import yaml
from twisted.internet import reactor
from twisted.internet.task import deferLater

import lotusguard
from lotusguard.clients.http import Answer
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN, Sandbox
from tests.homeserver import SERVER_NAME, Failed, Homeserver, User, free_port

__all__ = ["Failed", "Guarded", "MakeGuarded", "Synapse", "User", "free_port"]
KNOWN_WITHIN = 5.0


class Synapse(Homeserver):
    """One Synapse process.

    :param directory: an empty directory.
    :param guard_port: the port of the guard's operators' listener, whose token is `ADMIN_TOKEN`.
    """

    ready_path = "/health"

    def __init__(self, directory: Path, *, guard_port: int) -> None:
        super().__init__(directory)
        self.guard_port = guard_port

    def configure(self) -> Sequence[str]:
        path = self.directory / "homeserver.yaml"
        if not path.exists():
            path.write_text(yaml.safe_dump(self._configuration()))
            seed = b64encode(os.urandom(32)).decode().rstrip("=")
            (self.directory / "signing.key").write_text(f"ed25519 a_test {seed}")
            (self.directory / "log.yaml").write_text(yaml.safe_dump(_LOGGING))
        return [sys.executable, "-m", "synapse.app.homeserver", "-c", str(path)]

    def environment(self) -> dict[str, str]:
        """It loads the module under test."""
        return {**super().environment(), "PYTHONPATH": str(Path(lotusguard.__file__).parent.parent)}

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
            "database": {"name": "sqlite3", "args": {"database": str(self.directory / "homeserver.db")}},
            "log_config": str(self.directory / "log.yaml"),
            "media_store_path": str(self.directory / "media"),
            "signing_key_path": str(self.directory / "signing.key"),
            "registration_shared_secret": self.shared_secret,
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
            "rc_invites": {"per_room": plenty, "per_user": plenty, "per_issuer": plenty},
            "rc_admin_redaction": plenty,
            "modules": [
                {
                    "module": "lotusguard.synapse_module.PolicyPush",
                    "config": {"url": f"http://127.0.0.1:{self.guard_port}", "token": ADMIN_TOKEN},
                }
            ],
        }


class Guarded:
    """A guard with the real homeserver; everything else is the sandbox's."""

    def __init__(self, synapse: Homeserver, sandbox: Sandbox) -> None:
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


_LOGGING = {
    "version": 1,
    "formatters": {"plain": {"format": "%(asctime)s %(name)s %(levelname)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"level": "WARNING", "handlers": ["console"]},
    "disable_existing_loggers": False,
}
