# SPDX-License-Identifier: Apache-2.0
"""A room's policy: everything that its moderators ask of its calls, read from room state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

from attrs import evolve, frozen

from lotusguard.rules.permissions import SOURCES_OF, Action, CallPermissions, Lobby, read_lobby, read_permissions
from lotusguard.rules.power_levels import PowerLevels, read_power_levels
from lotusguard.rules.sources import CAMERA, EVERY_SOURCE, SCREEN_SHARE, SCREEN_SHARE_AUDIO, Source
from lotusguard.rules.state import CALL_PERMISSIONS, CREATE, LOBBY, POWER_LEVELS, ROOM_QUALITY, VOICE_LIMIT, StateEvent

_NO_PERMISSIONS = CallPermissions()


class LimitOrigin(Enum):
    """Who decided a policy's ``max_users``."""

    UNSET = "unset"
    """Nobody: the room has no limit event, or one that cannot be used. A server-wide default may apply."""
    ROOM = "room"
    """The room's own event, which may also say that there is no limit."""
    DEFAULT = "default"
    """The operator's default for rooms that set none."""


@frozen
class Policy:
    """The policy of one Matrix room.

    :ivar max_users: how many distinct users may be in the room's call; ``None`` is no limit.
    :ivar forbidden: the sources that nobody may publish. The microphone is never among them.
    :ivar permissions: who may do what; ``None`` if the room does not say.
    :ivar lobby: the lobby, ``None`` if it is off.
    :ivar levels: the users' power levels; ``None`` if they are not needed, or unknown.
    """

    max_users: int | None = None
    forbidden: frozenset[Source] = frozenset()
    permissions: CallPermissions | None = None
    lobby: Lobby | None = None
    levels: PowerLevels | None = None
    limit_origin: LimitOrigin = LimitOrigin.UNSET

    def __bool__(self) -> bool:
        """Whether there is anything to enforce."""
        return self.max_users is not None or bool(self.forbidden) or bool(self.permissions) or self.lobby is not None

    def allows(self, action: Action, user: str) -> bool:
        """Whether a user may do something, as far as permissions and power levels decide it.

        While the levels are unknown nothing is refused or withheld because of them; nor does anybody get past a
        limit, or power over others, because of them.
        """
        permissions = _NO_PERMISSIONS if self.permissions is None else self.permissions
        return permissions.allows(action, user, self.levels)

    def allowed_sources(self, user: str) -> frozenset[Source]:
        """The sources that a user may publish: what their permissions allow and nobody is forbidden."""
        if self.permissions is None:
            return EVERY_SOURCE - self.forbidden
        withheld = (sources for action, sources in SOURCES_OF.items() if not self.allows(action, user))
        return EVERY_SOURCE.difference(self.forbidden, *withheld)

    def may_join(self, user: str) -> bool:
        """Whether a user may join the call."""
        return self.allows(Action.JOIN, user)

    def may_start(self, user: str) -> bool:
        """Whether a user may join while nobody is in the call."""
        return self.allows(Action.START, user)

    @property
    def has_bypass(self) -> bool:
        """Whether the room says who may join although all seats are taken."""
        return self.permissions is not None and self.permissions.names(Action.BYPASS_LIMIT)

    def bypasses_limit(self, user: str) -> bool:
        """Whether a user may join although all seats are taken."""
        return self.allows(Action.BYPASS_LIMIT, user)

    def bypasses_lobby(self, user: str) -> bool:
        """Whether a user may join without waiting in the lobby, if there is one."""
        return self.allows(Action.BYPASS_LOBBY, user)

    def may_moderate(self, user: str) -> bool:
        """Whether a user may admit, deny, mute and remove others through the guard.

        Without permissions and without a lobby the levels are not read; nobody may moderate then.
        """
        return self.allows(Action.MODERATE, user)


NO_POLICY = Policy()


@frozen(order=True)
class Malformed:
    """A key of a policy event that cannot be used and is ignored.

    :ivar key: the key's name, dotted (``users.@a:example.org.join``); ``""`` for the whole content.
    """

    event_type: str
    key: str


def read_policy(events: Mapping[str, StateEvent]) -> tuple[Policy, frozenset[Malformed]]:
    """Read a room's policy, key by key: a value that cannot be used is ignored, the rest holds.

    :param events: the room's state events with the state key ``""``, by type. Types that are missing count as absent;
        power levels and the create event are read only if `needs_levels`.
    :return: the policy, and what in it cannot be used.
    """
    malformed: set[Malformed] = set()

    def content_of(event_type: str) -> object:
        return events[event_type].content if event_type in events else {}

    def ignore(event_type: str, keys: frozenset[str]) -> None:
        malformed.update(Malformed(event_type, key) for key in keys)

    limit, origin, bad_limit = _read_limit(content_of(VOICE_LIMIT))
    forbidden, bad_quality = _read_quality(content_of(ROOM_QUALITY))
    permissions, bad_permissions = read_permissions(content_of(CALL_PERMISSIONS))
    lobby, bad_lobby = read_lobby(content_of(LOBBY))
    ignore(VOICE_LIMIT, bad_limit)
    ignore(ROOM_QUALITY, bad_quality)
    ignore(CALL_PERMISSIONS, bad_permissions)
    ignore(LOBBY, bad_lobby)
    needed = bool(permissions) or lobby is not None
    levels = read_power_levels(events.get(POWER_LEVELS), events.get(CREATE)) if needed else None
    return Policy(limit, forbidden, permissions or None, lobby, levels, origin), frozenset(malformed)


def needs_levels(events: Mapping[str, StateEvent]) -> bool:
    """Whether a room's policy depends on power levels: ``m.room.power_levels`` and ``m.room.create`` are read then."""
    policy, _ = read_policy(events)
    return policy.permissions is not None or policy.lobby is not None


def with_default_limit(policy: Policy, default: int | None) -> Policy:
    """The policy with the operator's limit, if the room's own event sets none.

    A room's explicit 0 means no limit, and stands. A value that cannot be used counts as absent.
    """
    if default is None or policy.max_users is not None or policy.limit_origin is LimitOrigin.ROOM:
        return policy
    return evolve(policy, max_users=default, limit_origin=LimitOrigin.DEFAULT)


def _read_limit(content: object) -> tuple[int | None, LimitOrigin, frozenset[str]]:
    if not isinstance(content, Mapping):
        return None, LimitOrigin.UNSET, frozenset({""})
    value = content.get("max_users")
    if value is None:
        return None, LimitOrigin.UNSET, frozenset()
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        return None, LimitOrigin.UNSET, frozenset({"max_users"})
    limit = int(value)
    return (limit if limit > 0 else None), LimitOrigin.ROOM, frozenset()


def _is_finite(value: int | float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _read_quality(content: object) -> tuple[frozenset[Source], frozenset[str]]:
    """Only JSON ``false`` forbids. A forbidden screen share includes its audio."""
    if not isinstance(content, Mapping):
        return frozenset(), frozenset({""})
    forbidden: set[Source] = set()
    if content.get("allow_screenshare") is False:
        forbidden |= {SCREEN_SHARE, SCREEN_SHARE_AUDIO}
    if content.get("allow_camera") is False:
        forbidden.add(CAMERA)
    keys = ("allow_screenshare", "allow_camera")
    return frozenset(forbidden), frozenset(key for key in keys if not isinstance(content.get(key, True), bool))
