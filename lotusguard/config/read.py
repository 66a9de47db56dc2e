# SPDX-License-Identifier: Apache-2.0
"""Reads the settings and explains what is wrong with them, in one line that shows no secret."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from lotusguard.config.errors import ConfigurationError, WrongSettingError
from lotusguard.config.settings import Settings

_NAMES = "comma-separated names or globs of homeservers, such as example.org,*.example.org"
_EXPECTED = {
    "guard_server_name": "a name such as example.org, as it is in user IDs, or nothing to ask the homeserver",
    "guard_admin_port": "a port number from 0 to 65535, or nothing for no listener",
    "guard_appservice_port": "a port number from 0 to 65535, or nothing for no listener",
    "guard_max_body": "a number of bytes, at least 1024",
    "guard_upstream_grace": "a number of seconds, 0 or more",
    "guard_default_max_users": "a number of users, 0 or more, or nothing for no limit",
    "guard_invites": "local, any or off",
    "guard_homeservers": _NAMES,
    "guard_start_homeservers": _NAMES,
    "guard_redis_url": "a URL that begins with redis://, rediss://, unix:// or redis+sentinel://",
}
_URLS = ("guard_upstream", "livekit_api", "synapse_api")


def read_settings(**given: object) -> Settings:
    """The settings of this process.

    :param given: settings that override environment and file (the sandbox, tests).
    :raises ConfigurationError: one line about the first wrong setting.
    """
    try:
        return Settings.model_validate({**_from_file(), **_from_environment(), **given})
    except ValidationError as error:
        raise ConfigurationError(_explained(error)) from None
    except WrongSettingError as error:
        raise ConfigurationError(str(error)) from None


def _from_environment() -> dict[str, str]:
    """Empty variables are settings too: an empty port is no listener."""
    environment = {name.lower(): value for name, value in os.environ.items()}
    return {name: environment[name] for name in Settings.model_fields if name in environment}


def _from_file() -> dict[str, Any]:
    """The settings in the file that ``GUARD_CONFIG`` names; none without one.

    :raises ConfigurationError: it cannot be read, or is empty.
    """
    path = os.environ.get("GUARD_CONFIG")
    if not path:
        return {}
    import yaml  # only here: most guards have no such file

    expected = "a YAML file of `name: value` lines"
    if not Path(path).is_file():
        raise ConfigurationError(str(WrongSettingError("guard_config", f"{path!r} is not a file", expected)))
    try:
        content = yaml.safe_load(Path(path).read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"GUARD_CONFIG: {path!r} is not YAML{where}; expected `name: value` lines") from None
    except OSError:
        content = path
    if content is None:  # it was truncated, perhaps while it is written: defaults are not meant
        raise ConfigurationError(
            f"GUARD_CONFIG: {path!r} holds no setting; expected `name: value` lines, or {{}} for none"
        )
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigurationError(f"GUARD_CONFIG: {path!r} cannot be read; expected a file of `name: value` lines")
    return content


def suspicions(settings: Settings) -> list[str]:
    """Settings that are allowed but probably not meant: unknown ``GUARD_…`` variables, secrets that others can read."""
    known = {*Settings.model_fields, "guard_config"}
    found = []
    for name in os.environ:
        if name.startswith("GUARD_") and name.lower() not in known:
            near = _nearest(name.lower(), known)
            found.append(f"{name} is not a setting" + (f"; did you mean {near.upper()}?" if near else ""))
    for name, path in _files_with_secrets(settings):
        if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            found.append(f"{name}: {str(path)!r} can be read by everybody on this machine (chmod o= it)")
    exposed = exposed_appservice(settings)
    return [*found, exposed] if exposed else found


def exposed_appservice(settings: Settings) -> str:
    """Why the app-service listener may believe anybody; "" if it does not."""
    if settings.guard_appservice_port is None or settings.guard_appservice_token.get_secret_value():
        return ""
    host = settings.guard_appservice_host.strip("[]")
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if is_loopback:
        return ""
    return (
        f"GUARD_APPSERVICE_TOKEN is not set, and GUARD_APPSERVICE_HOST is {host}: anybody who reaches the app-service "
        "listener gets tokens as any user"
    )


def _explained(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=True)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, WrongSettingError):
        return str(cause)
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if first["type"] == "extra_forbidden":
        near = _nearest(name, Settings.model_fields)
        hint = f"; did you mean {near}?" if near else ""
        return f"{name}: no setting has this name{hint} (expected the names of docs/configuration.md, in lower case)"
    # A URL may hold a password.
    hidden = _is_secret(name) or "@" in str(first["input"]) or len(str(first["input"])) > 200
    given = "" if hidden else f"{first['input']!r} "
    return f"{name.upper()}: {given}{_problem(first, cause)}; expected {_expectation(name)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like this one; "" if none does."""
    import difflib  # only for mistakes

    return next(iter(difflib.get_close_matches(name, list(known), 1)), "")


def _is_secret(name: str) -> bool:
    return Settings.model_fields[name].annotation is SecretStr if name in Settings.model_fields else True


def _problem(first: Mapping[str, Any], cause: object) -> str:
    return str(cause) if cause is not None else "is not valid (" + str(first["msg"]).lower() + ")"


def _expectation(name: str) -> str:
    if name in _EXPECTED:
        return _EXPECTED[name]
    if name.endswith("_host"):
        return "an address, one such as 0.0.0.0 or 127.0.0.1"
    if name.endswith("_port"):
        return "a port number from 0 to 65535"
    if name in _URLS:
        return "a URL such as http://127.0.0.1:8071"
    annotation = Settings.model_fields[name].annotation
    if annotation is float:
        return "a number of seconds greater than 0"
    if annotation is bool:
        return "on or off"
    choices = getattr(annotation, "__args__", ())
    return " or ".join(str(choice) for choice in choices) if choices else "a text"


def _files_with_secrets(settings: Settings) -> list[tuple[str, Path]]:
    files = [(name, getattr(settings, name)) for name in Settings.model_fields if name.endswith("_file")]
    config = os.environ.get("GUARD_CONFIG")
    if config and any(_is_secret(name) for name in _from_file()):
        files.append(("guard_config", Path(config)))
    return [(name.upper(), path) for name, path in files if path is not None]
