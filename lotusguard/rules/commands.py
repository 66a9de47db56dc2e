# SPDX-License-Identifier: Apache-2.0
"""The commands that moderators write into a room: ``!call``, ``!call limit 10``, ``!call remove @user:server``, …"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import Enum

from attrs import frozen

from lotusguard.rules.permissions import Action, CallPermissions, read_permissions
from lotusguard.rules.power_levels import DEFAULT_KICK, CreatorLevel, Level, PowerLevels, read_power_levels
from lotusguard.rules.state import CALL_PERMISSIONS, CREATE, POWER_LEVELS, StateEvent

PREFIX = "!call"
USAGE = (
    "Commands: !call (status), !call limit N (0: no limit), !call remove @user, !call mute @user, "
    "!call admit @user or all, !call deny @user or all, !call end, !call leave"
)
HIGHEST_LIMIT = 100_000
_USER = re.compile(r"@[^\s:]{0,254}:[^\s]{1,254}")


class Verb(Enum):
    """The second word of a command."""

    STATUS = "status"
    LIMIT = "limit"
    REMOVE = "remove"
    MUTE = "mute"
    ADMIT = "admit"
    DENY = "deny"
    END = "end"
    LEAVE = "leave"
    HELP = "help"


WITH_USER = (Verb.REMOVE, Verb.MUTE, Verb.ADMIT, Verb.DENY)
WITH_ALL = (Verb.ADMIT, Verb.DENY)


class NotACommand(ValueError):
    """A message begins with ``!call`` and cannot be understood. The text says what is expected."""


@frozen
class Command:
    """A command.

    :ivar user: whom it is about; ``""`` for everybody who waits, or if it is about nobody.
    :ivar limit: the number after ``limit``; 0 for no limit.
    """

    verb: Verb
    user: str = ""
    limit: int = 0


def is_command(body: str) -> bool:
    """Whether a message is meant for the guard."""
    return body[:64].strip().partition(" ")[0] == PREFIX


def read_command(body: str, mentioned: Collection[str] = ()) -> Command:
    """:param mentioned: the users whom the message mentions: clients write their display names into the text.

    :raises NotACommand: it cannot be understood.
    """
    words = body.split()[1:]
    if not words:
        return Command(Verb.STATUS)
    try:
        verb = Verb(words[0].lower())
    except ValueError:
        raise NotACommand(USAGE) from None
    if verb is Verb.LIMIT:
        if len(words) != 2 or not words[1].isascii() or not words[1].isdecimal() or len(words[1]) > 6:
            raise NotACommand("Expected a number: !call limit 10, or !call limit 0 for no limit")
        return Command(verb, limit=min(int(words[1]), HIGHEST_LIMIT))
    if verb not in WITH_USER:
        return Command(verb)
    if verb in WITH_ALL and words[1:] == ["all"]:
        return Command(verb)
    if len(words) == 2 and _USER.fullmatch(words[1]):
        return Command(verb, words[1])
    if len(words) > 1 and len(mentioned) == 1:
        return Command(verb, next(iter(mentioned)))
    raise NotACommand(f"Expected one user ID: !call {verb.value} @user:example.org")


@frozen
class Authority:
    """Who may do what by commands, read from a room's state at the moment of a command."""

    permissions: CallPermissions
    levels: PowerLevels | None
    power_levels: StateEvent | None

    @classmethod
    def of_state(cls, events: Mapping[str, StateEvent]) -> Authority:
        """:param events: the room's state events with the state key ``""``, by type."""
        permissions = events.get(CALL_PERMISSIONS)
        return cls(
            read_permissions(permissions.content)[0] if permissions is not None else CallPermissions(),
            read_power_levels(events.get(POWER_LEVELS), events.get(CREATE)),
            events.get(POWER_LEVELS),
        )

    def may_moderate(self, user: str) -> bool:
        return self.permissions.allows(Action.MODERATE, user, self.levels)

    @property
    def moderate_level(self) -> int:
        """The power level that commands need."""
        kick = self.levels.kick if self.levels is not None else DEFAULT_KICK
        return self.permissions.needed.get(Action.MODERATE, kick)

    def may_send_state(self, user: str, kind: str) -> bool:
        """Whether a user may write a state event of this type."""
        return self.levels is not None and self.levels.level_of(user) >= self.level_to_send(kind)

    def level_of(self, user: str) -> str:
        """A user's power level, for people."""
        level: Level = self.levels.level_of(user) if self.levels is not None else 0
        return "a creator's" if isinstance(level, CreatorLevel) else str(level)

    def level_to_send(self, kind: str) -> int:
        """The power level that a state event of this type needs."""
        content = self.power_levels.mapping if self.power_levels is not None else {}
        events = content.get("events")
        for value in (events.get(kind) if isinstance(events, Mapping) else None, content.get("state_default")):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return 50 if self.power_levels is not None else 0
