# SPDX-License-Identifier: Apache-2.0
"""Power levels of the users of a room, by the Matrix specification."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import total_ordering

from attrs import field, frozen

from lotusguard.rules.state import StateEvent

LEVELS_ARE_INTEGERS = 10
"""From this room version on, a level that is written as a string is not a level."""
CREATOR_IS_SENDER = 11
"""From this room version on, the creator is the sender of ``m.room.create``; earlier ones name it in the content."""
CREATORS_STAND_ABOVE = 12
"""From this room version on, creators stand above every level and are not listed."""
NEWEST = 1_000
"""What an unknown room version is treated as."""

DEFAULT_KICK = 50
CREATOR_WITHOUT_EVENT = 100
"""The creator's level in a room without ``m.room.power_levels``, before room version 12."""

_WRITTEN_LEVEL = re.compile(r"\s*[+-]?[0-9]{1,20}\s*", re.ASCII)


@total_ordering
@frozen(order=False)
class CreatorLevel:
    """The level of a creator in room version 12 and later: greater than every integer."""

    def __lt__(self, other: int | CreatorLevel) -> bool:
        return False


CREATOR = CreatorLevel()
Level = int | CreatorLevel


@frozen
class PowerLevels:
    """The power levels of one room.

    :ivar users: the levels of the users who are listed.
    :ivar users_default: the level of everybody else.
    :ivar kick: the level that removing somebody from the room needs.
    :ivar creators: users who stand above every level; empty before room version 12.
    """

    users: Mapping[str, int] = field(factory=dict)
    users_default: int = 0
    kick: int = DEFAULT_KICK
    creators: frozenset[str] = frozenset()

    def level_of(self, user: str) -> Level:
        """The power level of a Matrix user, whether or not they are in the room."""
        if user in self.creators:
            return CREATOR
        return self.users.get(user, self.users_default)


def read_power_levels(power_levels: StateEvent | None, create: StateEvent | None) -> PowerLevels | None:
    """Read the levels from a room's state. Values that are not levels count as absent.

    :param power_levels: ``m.room.power_levels``; ``None`` if the room has none.
    :param create: ``m.room.create``. Every room has one: a state without it is not the room's state.
    :return: ``None`` without ``create``, because the levels are unknown then.
    """
    if create is None:
        return None
    version = _version(create.mapping.get("room_version", "1"))
    creators = _creators(create) if version >= CREATORS_STAND_ABOVE else frozenset[str]()
    if power_levels is None:
        creator = _creator(create, version)
        users = {} if creators or not creator else {creator: CREATOR_WITHOUT_EVENT}
        return PowerLevels(users=users, creators=creators)
    content = power_levels.mapping
    listed = content.get("users")
    levels = {user: _level(value, version) for user, value in listed.items()} if isinstance(listed, Mapping) else {}
    users_default = _level(content.get("users_default"), version)
    kick = _level(content.get("kick"), version)
    return PowerLevels(
        users={user: level for user, level in levels.items() if level is not None},
        users_default=0 if users_default is None else users_default,
        kick=DEFAULT_KICK if kick is None else kick,
        creators=creators,
    )


def _version(value: object) -> int:
    """The room version as a number. An unknown one is treated as the newest."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 4:
        return int(value)
    return NEWEST


def _creators(create: StateEvent) -> frozenset[str]:
    additional = create.mapping.get("additional_creators")
    others = additional if isinstance(additional, list) else []
    return frozenset(user for user in (create.sender, *others) if isinstance(user, str) and user)


def _creator(create: StateEvent, version: int) -> str:
    named = create.mapping.get("creator")
    return named if version < CREATOR_IS_SENDER and isinstance(named, str) else create.sender


def _level(value: object, version: int) -> int | None:
    """A level, or ``None`` if the value is not one: booleans and floats never are."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if version < LEVELS_ARE_INTEGERS and isinstance(value, str) and _WRITTEN_LEVEL.fullmatch(value):
        return int(value)
    return None
