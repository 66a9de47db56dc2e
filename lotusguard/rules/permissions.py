# SPDX-License-Identifier: Apache-2.0
"""Who may do what in a room's calls (``io.lotus.call_permissions``), and the room's lobby (``io.lotus.lobby``)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Any

from attrs import field, frozen

from lotusguard.rules.power_levels import Level, PowerLevels
from lotusguard.rules.sources import CAMERA, MICROPHONE, SCREEN_SHARE, SCREEN_SHARE_AUDIO, Source

LONGEST_MESSAGE = 500
"""Characters of a lobby's message that are kept."""


class Action(StrEnum):
    """What a user may be permitted to do; the value is its key in the event."""

    JOIN = "join"
    START = "start"
    MICROPHONE = "microphone"
    CAMERA = "camera"
    SCREEN_SHARE = "screen_share"
    BYPASS_LIMIT = "bypass_limit"
    BYPASS_LOBBY = "bypass_lobby"
    MODERATE = "moderate"


SOURCES_OF: Mapping[Action, frozenset[Source]] = {
    Action.MICROPHONE: frozenset({MICROPHONE}),
    Action.CAMERA: frozenset({CAMERA}),
    Action.SCREEN_SHARE: frozenset({SCREEN_SHARE, SCREEN_SHARE_AUDIO}),
}
"""The sources that an action lets a user publish."""


class Default(Enum):
    """Who may do an action that the event does not name."""

    EVERYBODY = "everybody"
    NOBODY = "nobody"
    KICK_LEVEL = "kick_level"
    """Users whose level reaches the room's ``kick`` level."""


_RULES: Mapping[Action, tuple[Default, bool]] = {
    # action: (who may do it if the event does not say, whether a user may do it while levels are unknown)
    Action.JOIN: (Default.EVERYBODY, True),
    Action.START: (Default.EVERYBODY, True),
    Action.MICROPHONE: (Default.EVERYBODY, True),
    Action.CAMERA: (Default.EVERYBODY, True),
    Action.SCREEN_SHARE: (Default.EVERYBODY, True),
    Action.BYPASS_LIMIT: (Default.NOBODY, False),
    Action.BYPASS_LOBBY: (Default.KICK_LEVEL, True),
    Action.MODERATE: (Default.KICK_LEVEL, False),
}
"""Unknown levels refuse nobody and keep nobody waiting. But they give nobody power over others, and lift no limit."""


@frozen
class CallPermissions:
    """The content of ``io.lotus.call_permissions``, without what cannot be used.

    :ivar needed: the power level that each action needs; actions that the event does not name are absent.
    :ivar users: exceptions by Matrix user; they win over levels in both directions.
    """

    needed: Mapping[Action, int] = field(factory=dict)
    users: Mapping[str, Mapping[Action, bool]] = field(factory=dict)

    def __bool__(self) -> bool:
        """Whether the event says anything at all."""
        return bool(self.needed or self.users)

    def names(self, action: Action) -> bool:
        """Whether the event says who may do something, by level or by an exception."""
        return action in self.needed or any(action in exceptions for exceptions in self.users.values())

    def allows(self, action: Action, user: str, levels: PowerLevels | None) -> bool:
        """Whether a user may do something.

        :param levels: the room's power levels, ``None`` if they are unknown.
        """
        exception = self.users.get(user, {}).get(action)
        if exception is not None:
            return exception
        default, while_unknown = _RULES[action]
        needed = self.needed.get(action)
        if needed is None and default is not Default.KICK_LEVEL:
            return default is Default.EVERYBODY
        if levels is None:
            return while_unknown
        level: Level = levels.level_of(user)
        return level >= (levels.kick if needed is None else needed)


@frozen
class Lobby:
    """A lobby that is switched on.

    :ivar message: a text for people who wait, at most 500 characters.
    """

    message: str = ""


def read_permissions(content: object) -> tuple[CallPermissions, frozenset[str]]:
    """Read ``io.lotus.call_permissions``, key by key: one that cannot be used takes no other with it.

    A level is a JSON integer, an exception a JSON boolean. Unknown keys are left alone.

    :return: the permissions, and the names of the keys that cannot be used (``camera``, ``users.@a:example.org.join``).
        The name ``""`` stands for the whole content.
    """
    if not isinstance(content, Mapping):
        return CallPermissions(), frozenset({""})
    needed: dict[Action, int] = {}
    malformed: set[str] = set()
    for action in Action:
        if action in content:
            level = content[action]
            if isinstance(level, int) and not isinstance(level, bool):
                needed[action] = level
            else:
                malformed.add(action)
    users, malformed_users = _read_exceptions(content.get("users", {}))
    return CallPermissions(needed, users), frozenset(malformed) | malformed_users


def _read_exceptions(content: object) -> tuple[dict[str, dict[Action, bool]], set[str]]:
    if not isinstance(content, Mapping):
        return {}, {"users"}
    users: dict[str, dict[Action, bool]] = {}
    malformed: set[str] = set()
    for user, entry in content.items():
        if not isinstance(entry, Mapping):
            malformed.add(f"users.{user}")
            continue
        exceptions: dict[Action, bool] = {}
        for action in Action:
            value = entry.get(action, _ABSENT)
            if isinstance(value, bool):
                exceptions[action] = value
            elif value is not _ABSENT:
                malformed.add(f"users.{user}.{action}")
        if exceptions:
            users[user] = exceptions
    return users, malformed


_ABSENT = object()


def permissions_as_json(permissions: CallPermissions | None) -> dict[str, Any]:
    """The permissions as the event writes them, without what cannot be used."""
    if permissions is None:
        return {}
    users = {
        user: {str(action): allowed for action, allowed in exceptions.items()}
        for user, exceptions in permissions.users.items()
    }
    needed = {str(action): level for action, level in permissions.needed.items()}
    return {**needed, "users": users} if users else needed


def read_lobby(content: object) -> tuple[Lobby | None, frozenset[str]]:
    """Read ``io.lotus.lobby``. Only JSON ``true`` switches the lobby on.

    :return: the lobby, ``None`` if it is off; and the names of the keys that cannot be used.
    """
    if not isinstance(content, Mapping):
        return None, frozenset({""})
    enabled, message = content.get("enabled", False), content.get("message", "")
    usable = {"enabled": isinstance(enabled, bool), "message": isinstance(message, str)}
    malformed = frozenset(key for key, is_usable in usable.items() if not is_usable)
    lobby = Lobby(message[:LONGEST_MESSAGE] if isinstance(message, str) else "") if enabled is True else None
    return lobby, malformed
