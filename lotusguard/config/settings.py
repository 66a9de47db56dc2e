# SPDX-License-Identifier: Apache-2.0
"""Everything that can be set: names, kinds and defaults. ``docs/configuration.md`` says what each one means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, model_validator

from lotusguard.config import kinds
from lotusguard.config.errors import WrongSettingError
from lotusguard.config.kinds import Seconds
from lotusguard.rules.jwt import SfuKey

NO_SECRET = SecretStr("")
FROM_FILE = (
    "livekit_key", "livekit_secret", "matrix_token", "guard_admin_token", "guard_redis_url", "guard_appservice_token",
)  # fmt: skip
"""Settings that may also be read from the file that ``…_FROM_FILE`` names."""


class Settings(BaseModel):
    """The settings. The names, defaults and meanings are a contract with operators."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    guard_bind_host: kinds.Host = "0.0.0.0"
    guard_bind_port: kinds.Port = 8070
    guard_upstream: kinds.BaseUrl = "http://127.0.0.1:8071"
    livekit_api: kinds.BaseUrl = "http://127.0.0.1:7880"
    livekit_key: str = ""
    livekit_secret: SecretStr = NO_SECRET
    livekit_key_from_file: Path | None = None
    livekit_secret_from_file: Path | None = None
    livekit_key_file: Path | None = None
    synapse_api: kinds.BaseUrl = "http://127.0.0.1:8008"
    matrix_token: SecretStr = NO_SECRET
    matrix_token_from_file: Path | None = None
    guard_server_name: kinds.ServerName = ""
    guard_members_only: kinds.MembersOnly = "on"
    guard_homeservers: kinds.ServerNames = ("*",)
    guard_start_homeservers: kinds.ServerNames = ("*",)
    guard_default_max_users: kinds.OptionalCount = None
    guard_tokens: Annotated[Literal["all", "policy"], kinds.Word] = "all"
    guard_membership_interval: Seconds = 30.0
    guard_invites: kinds.Invites = None
    guard_lobby_wait: Seconds = 600.0
    guard_redis_url: kinds.RedisUrl = NO_SECRET
    guard_redis_url_from_file: Path | None = None
    guard_appservice_host: kinds.Host = "127.0.0.1"
    guard_appservice_port: kinds.OptionalPort = None
    guard_appservice_token: SecretStr = NO_SECRET
    guard_appservice_token_from_file: Path | None = None
    guard_admin_host: kinds.Host = "127.0.0.1"
    guard_admin_port: kinds.OptionalPort = 8072
    guard_admin_token: SecretStr = NO_SECRET
    guard_admin_token_from_file: Path | None = None
    guard_state_dir: Path | None = None
    guard_policy_ttl: Seconds = 10.0
    guard_policy_stale: Seconds = 3600.0
    guard_lookup_timeout: Seconds = 1.5
    guard_upstream_timeout: Seconds = 15.0
    guard_upstream_grace: kinds.SecondsOrZero = 5.0
    guard_seat_ttl: Seconds = 30.0
    guard_token_ttl: Seconds = 120.0
    guard_reconcile_interval: Seconds = 3.0
    guard_overflow: Annotated[Literal["eject", "allow"], kinds.Word] = "eject"
    guard_restore: bool = True
    guard_max_body: kinds.Bytes = 65536
    guard_dry_run: bool = False
    guard_log_level: kinds.LogLevel = "info"
    guard_log_format: Annotated[Literal["text", "json"], kinds.Word] = "text"

    @model_validator(mode="before")
    @classmethod
    def _secrets_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read ``…_FROM_FILE`` and ``LIVEKIT_KEY_FILE`` in lk-jwt-service's order of precedence."""
        values = dict(values)
        for name in FROM_FILE:
            path = values.get(f"{name}_from_file")
            if path:
                values[name] = _contents(f"{name}_from_file", path)
                if not values[name]:  # it was truncated: an empty token would turn a check off
                    problem = f"{str(path)!r} is empty"
                    raise WrongSettingError(f"{name}_from_file", problem, f"a file with {name.upper()}")
            elif isinstance(values.get(name), str):
                values[name] = values[name].strip(" \r\n")
        if values.get("livekit_key_file"):
            content = _contents("livekit_key_file", values["livekit_key_file"])
            parts = [part.strip(" \r\n") for part in content.split(":")]
            if len(parts) != 2 or not all(parts):
                problem = "does not hold one key and one secret"
                raise WrongSettingError("livekit_key_file", problem, "a line `key: secret`")
            values["livekit_key"], values["livekit_secret"] = parts
        for name in [name for name in values if name.endswith(("_file", "_dir")) and values[name] == ""]:
            del values[name]
        return values

    @property
    def sfu_key(self) -> SfuKey | None:
        """Key and secret shared with lk-jwt-service and LiveKit; ``None`` when either is missing."""
        secret = self.livekit_secret.get_secret_value()
        return SfuKey(self.livekit_key, secret) if self.livekit_key and secret else None

    @property
    def state_dir(self) -> Path | None:
        """The state directory: the setting, else systemd's ``StateDirectory=``."""
        if self.guard_state_dir is not None:
            return self.guard_state_dir
        given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        return Path(given) if given else None


def _contents(name: str, path: object) -> str:
    try:
        return Path(str(path)).read_text(encoding="utf-8").strip(" \r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise WrongSettingError(name, f"{str(path)!r} cannot be read ({reason})", "a file we may read") from None
