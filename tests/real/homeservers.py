# SPDX-License-Identifier: Apache-2.0
"""Homeservers of other makes than Synapse, for tests. An environment variable names the executable of each.

``DENDRITE`` is Dendrite's. ``TUWUNEL`` and ``CONTINUWUITY`` are written after their documentation and untried.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

import yaml

from tests.homeserver import CLIENT, Homeserver, User


class OtherHomeserver(Homeserver):
    """:param executable: the path of the program."""

    def __init__(self, directory: Path, executable: str) -> None:
        super().__init__(directory)
        self.executable = executable


class Dendrite(OtherHomeserver):
    """Dendrite, with one SQLite file per component."""

    def configure(self) -> Sequence[str]:
        path = self.directory / "dendrite.yaml"
        if not path.exists():
            seed = b64encode(os.urandom(32)).decode()
            kind = "MATRIX PRIVATE KEY"
            key = f"-----BEGIN {kind}-----\nKey-ID: ed25519:test\n\n{seed}\n-----END {kind}-----\n"
            (self.directory / "matrix_key.pem").write_text(key)
            path.write_text(yaml.safe_dump(self._configuration()))
        listeners = ["-http-bind-address", f"127.0.0.1:{self.port}", "-https-bind-address", "127.0.0.1:0"]
        return [self.executable, "-config", str(path), *listeners]

    def _configuration(self) -> dict[str, Any]:
        def stored(name: str) -> dict[str, object]:
            return {"connection_string": f"file:{self.directory / name}.db", "max_open_conns": 1, "max_idle_conns": 1}

        components = ("key_server", "mscs", "room_server", "relay_api")
        return {
            "version": 2,
            "global": {
                "server_name": self.server_name,
                "private_key": str(self.directory / "matrix_key.pem"),
                "jetstream": {"storage_path": str(self.directory), "topic_prefix": "Dendrite"},
                "cache": {"max_size_estimated": "64mb", "max_age": "1h"},
            },
            "client_api": {
                "registration_disabled": True,
                "registration_shared_secret": self.shared_secret,
                "rate_limiting": {"enabled": False},
            },
            # OpenID tokens are verified by the federation API; it connects to no other homeserver
            "federation_api": {
                "database": stored("federation_api"),
                "key_perspectives": [],
                "allow_networks": [],
                "deny_networks": ["0.0.0.0/0", "::/0"],
            },
            "user_api": {"bcrypt_cost": 4, "account_database": stored("user_api")},
            "media_api": {"base_path": str(self.directory / "media"), "database": stored("media_api")},
            "sync_api": {"database": stored("sync_api"), "search": {"enabled": False}},
            "logging": [{"type": "std", "level": "warn"}],
            **{name: {"database": stored(name)} for name in components},
        }


class RocksDbHomeserver(OtherHomeserver):
    """The descendants of Conduit. They register users with a registration token."""

    def configure(self) -> Sequence[str]:
        path = self.directory / "homeserver.toml"
        options: Mapping[str, object] = {
            "server_name": self.server_name,
            "database_path": str(self.directory / "database"),
            "address": "127.0.0.1",
            "port": self.port,
            "allow_registration": True,
            "registration_token": self.shared_secret,
            "allow_federation": False,
            "trusted_servers": [],
        }
        path.write_text("[global]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in options.items()))
        return [self.executable, "--config", str(path)]

    def start(self) -> None:
        fresh = not (self.directory / "database").exists()
        super().start()
        self._needs_first_user = fresh

    async def register(self, name: str, *, admin: bool = False) -> User:
        if self._needs_first_user:  # it becomes the homeserver's admin
            self._needs_first_user = False
            await self.register("first")
        content = {"username": f"{name}{next(self._numbers)}", "password": token_hex(8)}
        path = f"{CLIENT}/register"
        _, challenge = await self.ask("POST", path, content=content)
        auth = {"type": "m.login.registration_token", "token": self.shared_secret, "session": challenge["session"]}
        registered = await self.done("POST", path, content={**content, "auth": auth})
        return User(registered["user_id"], registered["access_token"])


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case int():
            return str(value)
    return f'"{value}"'


MAKES: Mapping[str, type[OtherHomeserver]] = {
    "DENDRITE": Dendrite,
    "TUWUNEL": RocksDbHomeserver,
    "CONTINUWUITY": RocksDbHomeserver,
}
"""By the environment variable that names the executable."""
