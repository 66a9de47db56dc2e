# SPDX-License-Identifier: Apache-2.0
"""Settings: read once from the environment and an optional YAML file, then frozen.

A setting has one name everywhere: ``GUARD_SEAT_TTL`` in the environment is ``guard_seat_ttl`` in the file and here.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from lotusguard.rules.tokens import SfuKey


class ConfigurationError(Exception):
    """A setting is wrong. The text is one line: the name, the fault, what is expected; never a secret."""


def _base_url(url: str) -> str:
    url = url.strip()
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("is no URL") from None
    plain = parts.scheme in ("http", "https") and parts.hostname and url.isascii() and url.isprintable()
    if not plain or parts.query or parts.fragment or parts.username or " " in url:
        raise ValueError("is no http(s) URL of a service")
    return url.rstrip("/")


def _level(value: object) -> object:
    value = str(value).strip().lower()
    return {"warning": "warn", "fatal": "critical"}.get(value, value)


BaseUrl = Annotated[str, AfterValidator(_base_url)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
LogLevel = Annotated[Literal["debug", "info", "warn", "error", "critical"], BeforeValidator(_level)]
LowerCase = BeforeValidator(lambda value: str(value).strip().lower())

_EXPECTED = {
    "port": "a port number from 0 to 65535",
    "url": "a URL such as http://127.0.0.1:8071",
    "seconds": "a number of seconds greater than 0",
}


class Settings(BaseSettings):
    """Everything that can be set. The names, defaults and meanings are a contract with operators."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, env_ignore_empty=False)

    guard_bind_host: str = "0.0.0.0"
    guard_bind_port: Port = 8070
    guard_upstream: BaseUrl = "http://127.0.0.1:8071"
    livekit_api: BaseUrl = "http://127.0.0.1:7880"
    livekit_key: str = ""
    livekit_secret: SecretStr = SecretStr("")
    livekit_key_from_file: Path | None = None
    livekit_secret_from_file: Path | None = None
    livekit_key_file: Path | None = None
    synapse_api: BaseUrl = "http://127.0.0.1:8008"
    matrix_token: SecretStr = SecretStr("")
    matrix_token_from_file: Path | None = None
    guard_server_name: Annotated[str, AfterValidator(str.strip)] = ""
    guard_appservice_host: str = "127.0.0.1"
    guard_appservice_port: Annotated[Port | None, BeforeValidator(lambda v: None if v == "" else v)] = None
    guard_appservice_token: SecretStr = SecretStr("")
    guard_appservice_token_from_file: Path | None = None
    guard_admin_host: str = "127.0.0.1"
    guard_admin_port: Annotated[Port | None, BeforeValidator(lambda v: None if v == "" else v)] = 8072
    guard_admin_token: SecretStr = SecretStr("")
    guard_admin_token_from_file: Path | None = None
    guard_state_dir: Path | None = None
    guard_policy_ttl: Seconds = 10.0
    guard_policy_stale: Seconds = 3600.0
    guard_lookup_timeout: Seconds = 1.5
    guard_upstream_timeout: Seconds = 15.0
    guard_upstream_grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    guard_seat_ttl: Seconds = 30.0
    guard_token_ttl: Seconds = 120.0
    guard_reconcile_interval: Seconds = 3.0
    guard_overflow: Annotated[Literal["eject", "allow"], LowerCase] = "eject"
    guard_restore: bool = True
    guard_max_body: Annotated[int, Field(ge=1024)] = 1048576
    guard_members_only: Literal["on", "log", "off"] = "on"
    guard_homeservers: tuple[str, ...] = ("*",)
    guard_start_homeservers: tuple[str, ...] = ("*",)
    guard_default_max_users: int | None = None
    guard_tokens: Literal["all", "policy"] = "all"
    guard_membership_interval: Seconds = 30.0
    guard_dry_run: bool = False
    guard_log_level: LogLevel = "info"
    guard_log_format: Annotated[Literal["text", "json"], LowerCase] = "text"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = os.environ.get("GUARD_CONFIG")
        if path and not Path(path).is_file():
            raise _WrongSetting("guard_config", f"{path!r} is no file", "a YAML file of `name: value` lines")
        file = (YamlConfigSettingsSource(settings_cls, Path(path)),) if path else ()
        return (init_settings, env_settings, *file)

    @model_validator(mode="before")
    @classmethod
    def _secrets_from_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Read ``…_FROM_FILE`` and ``LIVEKIT_KEY_FILE``, in the order of precedence that lk-jwt-service has."""
        values = dict(values)
        for name in ("livekit_key", "livekit_secret", "matrix_token", "guard_admin_token", "guard_appservice_token"):
            path = values.get(f"{name}_from_file")
            if path:
                values[name] = _contents(f"{name}_from_file", path)
            elif isinstance(values.get(name), str):
                values[name] = values[name].strip(" \r\n")
        if values.get("livekit_key_file"):
            parts = _contents("livekit_key_file", values["livekit_key_file"]).split(":")
            if len(parts) != 2:
                raise _WrongSetting("livekit_key_file", "does not hold one key and one secret", "a line `key: secret`")
            values["livekit_key"], values["livekit_secret"] = (part.strip(" \r\n") for part in parts)
        for name in [n for n in values if n.endswith(("_file", "_dir")) and values[n] == ""]:
            del values[name]
        return values

    @model_validator(mode="after")
    def _whole_address(self) -> Self:
        if not self.guard_bind_host.strip():
            raise _WrongSetting("guard_bind_host", "is empty", "an address such as 0.0.0.0")
        return self

    @property
    def sfu_key(self) -> SfuKey | None:
        """Key and secret shared with lk-jwt-service and LiveKit; ``None`` when either is missing."""
        secret = self.livekit_secret.get_secret_value()
        return SfuKey(self.livekit_key, secret) if self.livekit_key and secret else None

    @property
    def state_dir(self) -> Path | None:
        """Where what must survive a restart is kept: the setting, else systemd's ``StateDirectory=``."""
        if self.guard_state_dir is not None:
            return self.guard_state_dir
        given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        return Path(given) if given else None


class _WrongSetting(ValueError):
    def __init__(self, name: str, fault: str, expected: str) -> None:
        super().__init__(f"{name.upper()}: {fault}; expected {expected}")


def _contents(name: str, path: object) -> str:
    try:
        return Path(str(path)).read_text(encoding="utf-8").strip(" \r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise _WrongSetting(name, f"{str(path)!r} cannot be read ({reason})", "a file we may read") from None


def read_settings(**given: object) -> Settings:
    """The settings of this process.

    :param given: settings that override environment and file (the sandbox, tests).
    :raises ConfigurationError: one line about the first wrong setting.
    """
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError(_explained(error)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigurationError(
            f"GUARD_CONFIG: {os.environ['GUARD_CONFIG']!r} is no YAML{where}; expected `name: value` lines"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, _WrongSetting):
            raise ConfigurationError(str(error)) from None
        raise ConfigurationError(
            f"GUARD_CONFIG: {os.environ.get('GUARD_CONFIG')!r} cannot be read; expected a file of `name: value` lines"
        ) from None


def _explained(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=True)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _WrongSetting):
        return str(cause)
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Settings.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}: no setting has this name{hint} (expected the names of the README, in lower case)"
    hidden = _is_secret(name) or "@" in str(first["input"])  # a URL may hold a password
    given = "" if hidden else f"{first['input']!r} "
    return f"{name.upper()}: {given}{_fault(first, cause)}; expected {_expectation(name)}"


def _is_secret(name: str) -> bool:
    return Settings.model_fields[name].annotation is SecretStr if name in Settings.model_fields else True


def _fault(first: Mapping[str, Any], cause: object) -> str:
    return str(cause) if cause is not None else "is not valid (" + str(first["msg"]).lower() + ")"


def _expectation(name: str) -> str:
    field = Settings.model_fields[name]
    if name.endswith("_port"):
        return _EXPECTED["port"] + (
            ", or nothing for no listener" if name in ("guard_admin_port", "guard_appservice_port") else ""
        )
    if name in ("guard_upstream", "livekit_api", "synapse_api"):
        return _EXPECTED["url"]
    if name == "guard_max_body":
        return "a number of bytes, at least 1024"
    if name == "guard_upstream_grace":
        return "a number of seconds, 0 or more"
    if field.annotation is float:
        return _EXPECTED["seconds"]
    if field.annotation is bool:
        return "on or off"
    choices = getattr(field.annotation, "__args__", ())
    return " or ".join(str(choice) for choice in choices) if choices else "a text"


def suspicions(settings: Settings) -> list[str]:
    """What is allowed but probably not meant: unknown ``GUARD_…`` variables, secrets that others can read."""
    known = {*Settings.model_fields, "guard_config"}
    found = []
    for name in os.environ:
        if name.startswith("GUARD_") and name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, 1)
            found.append(f"{name} is no setting" + (f"; did you mean {near[0].upper()}?" if near else ""))
    for name, path in _files_with_secrets(settings):
        if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            found.append(f"{name}: {str(path)!r} can be read by everybody on this machine (chmod o= it)")
    return found


def _files_with_secrets(settings: Settings) -> list[tuple[str, Path]]:
    files = [(name, getattr(settings, name)) for name in Settings.model_fields if name.endswith("_file")]
    config = os.environ.get("GUARD_CONFIG")
    content = yaml.safe_load(Path(config).read_bytes()) if config else None
    if config and isinstance(content, dict) and any(_is_secret(name) for name in content):
        files.append(("guard_config", Path(config)))
    return [(name.upper(), path) for name, path in files if path is not None]
