# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that settings have."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from lotusguard.rules.identity import LONGEST_NAME
from lotusguard.rules.redis_address import parse_address


def _base_url(url: str) -> str:
    url = url.strip()
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    plain = parts.scheme in ("http", "https") and parts.hostname and url.isascii() and url.isprintable()
    if not plain or parts.query or parts.fragment or parts.username or " " in url:
        raise ValueError("is not an http(s) URL of a service")
    return url.rstrip("/")


_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")


def _host(host: str) -> str:
    host = host.strip()
    if not host:
        raise ValueError("is empty, which would be all addresses")
    if not _HOST_NAME.fullmatch(host):
        try:
            ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            raise ValueError("is not an address") from None
    return host


_SERVER_NAME = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
"""As Matrix' appendices define it."""


def _server_name(name: str) -> str:
    name = name.strip()
    if name and not (_SERVER_NAME.fullmatch(name) and len(name) <= LONGEST_NAME):
        raise ValueError("is not the name of a homeserver")
    return name


def _redis_url(secret: SecretStr) -> SecretStr:
    if url := secret.get_secret_value():
        parse_address(url)
    return secret


_SERVER_GLOB = re.compile(r"[A-Za-z0-9.\-*?]+|\[[0-9A-Fa-f:.*?]+\]")


def _names(value: object) -> object:
    """Comma-separated names and globs of homeservers, in lower case; a list in the YAML file is taken too."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError("is not a list of names")
    names = tuple(name.strip().lower() for name in value if name.strip())
    for name in names:
        host = re.sub(r":[0-9*?]+$", "", name)
        if not _SERVER_GLOB.fullmatch(host) or len(name) > 255:
            raise ValueError(f"holds {name[:60]!r}, which is not a server name")
    if not names:
        raise ValueError("names no homeserver")
    return names


def _level(value: object) -> object:
    value = str(value).strip().lower()
    return {"warning": "warn", "fatal": "critical"}.get(value, value)


def _switch_or_word(value: object) -> object:
    """YAML reads ``on`` and ``off`` as booleans."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).strip().lower()


def _optional_word(value: object) -> object:
    return None if value is None or value == "" else _switch_or_word(value)


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


Host = Annotated[str, AfterValidator(_host)]
ServerName = Annotated[str, AfterValidator(_server_name)]
BaseUrl = Annotated[str, AfterValidator(_base_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
OptionalPort = Annotated[Port | None, BeforeValidator(_none_if_empty)]
OptionalCount = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_none_if_empty)]
Bytes = Annotated[int, Field(ge=1024)]
ServerNames = Annotated[tuple[str, ...], BeforeValidator(_names)]
Word = BeforeValidator(_switch_or_word)
LogLevel = Annotated[Literal["debug", "info", "warn", "error", "critical"], BeforeValidator(_level)]
MembersOnly = Annotated[Literal["on", "log", "off"], Word]
Invites = Annotated[Literal["local", "any", "off"] | None, BeforeValidator(_optional_word)]
