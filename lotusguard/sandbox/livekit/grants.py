# SPDX-License-Identifier: Apache-2.0
"""The video grant of a token and the permission it results in, as in livekit/protocol's ``grants.go``. Sandbox."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from livekit.protocol.models import ParticipantPermission, TrackSource

from lotusguard.sandbox.go.lax_json import Pointer

VIDEO = {
    "roomCreate": bool,
    "roomList": bool,
    "roomRecord": bool,
    "roomAdmin": bool,
    "roomJoin": bool,
    "room": str,
    "canPublish": Pointer(bool),
    "canSubscribe": Pointer(bool),
    "canPublishData": Pointer(bool),
    "canPublishSources": [str],
    "canUpdateOwnMetadata": Pointer(bool),
    "ingressAdmin": bool,
    "hidden": bool,
    "recorder": bool,
    "agent": bool,
    "canSubscribeMetrics": Pointer(bool),
    "canManageAgentSession": Pointer(bool),
    "destinationRoom": str,
}
"""The JSON shape of the ``video`` claim."""

SOURCES = {name: number for name, number in TrackSource.items()}  # noqa: C416 - items() is no mapping


def source_number(source: int | str) -> int:
    """A track source by number or by name, in any case; unknown names are UNKNOWN (``sourceToProto``)."""
    return SOURCES.get(source.upper(), 0) if isinstance(source, str) else int(source)


def source_name(source: int) -> str:
    """A source's name in a grant; Go prints a number that its enum does not know as that number."""
    names = {number: name for name, number in SOURCES.items()}
    return names.get(source, str(source)).lower()


@dataclass
class VideoGrant:
    """The ``video`` claim of a token. ``None`` means absent, which differs from ``False``.

    :ivar can_publish_sources: names as they stood in the token: only exact lower-case ones permit anything.
    """

    room: str = ""
    room_join: bool = False
    room_admin: bool = False
    room_list: bool = False
    room_create: bool = False
    can_publish: bool | None = None
    can_subscribe: bool | None = None
    can_publish_data: bool | None = None
    can_publish_sources: list[str] = field(default_factory=list)
    can_update_own_metadata: bool | None = None
    hidden: bool = False
    recorder: bool = False
    agent: bool = False
    can_subscribe_metrics: bool | None = None
    can_manage_agent_session: bool | None = None

    @classmethod
    def of_claim(cls, claim: Mapping[str, Any]) -> VideoGrant:
        """The grant in a decoded ``video`` claim."""
        return cls(**{name: claim[_camel(name)] for name in cls.__dataclass_fields__})

    def to_claim(self) -> dict[str, Any]:
        """The ``video`` claim as Go writes it: without false and empty values."""
        values = {_camel(name): getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: value
            for name, value in values.items()
            if (value is not None if isinstance(VIDEO[name], Pointer) else value)
        }

    def may_publish(self, source: int) -> bool:
        """Whether a track that the client labels so is accepted (``GetCanPublishSource``)."""
        if self.can_publish is False:
            return False
        return not self.can_publish_sources or source_name(source) in self.can_publish_sources

    def may_publish_data(self) -> bool:
        """Whether data may be published; the same as ``can_publish`` if the grant does not say."""
        return self.can_publish is not False if self.can_publish_data is None else self.can_publish_data

    def to_permission(self) -> ParticipantPermission:
        """The permission as participants are listed with it."""
        return ParticipantPermission(
            can_subscribe=self.can_subscribe is not False,
            can_publish=self.can_publish is not False,
            can_publish_data=self.may_publish_data(),
            can_publish_sources=_numbers(self.can_publish_sources),
            hidden=self.hidden,
            recorder=self.recorder,
            agent=self.agent,
            can_update_metadata=bool(self.can_update_own_metadata),
            can_subscribe_metrics=bool(self.can_subscribe_metrics),
            can_manage_agent_session=bool(self.can_manage_agent_session),
        )

    def replaced_by(self, permission: ParticipantPermission) -> VideoGrant:
        """The grant after UpdateParticipant, which replaces the whole permission: missing fields become false."""
        grant = copy.deepcopy(self)
        grant.can_publish = permission.can_publish
        grant.can_publish_data = permission.can_publish_data
        grant.can_publish_sources = [source_name(source) for source in permission.can_publish_sources]
        grant.can_subscribe = permission.can_subscribe
        grant.can_update_own_metadata = permission.can_update_metadata
        grant.hidden = permission.hidden
        grant.recorder = permission.recorder
        grant.agent = permission.agent
        grant.can_subscribe_metrics = permission.can_subscribe_metrics
        grant.can_manage_agent_session = permission.can_manage_agent_session
        return grant


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(part.capitalize() for part in others)


def _numbers(names: Iterable[str]) -> list[Any]:
    return [source_number(name) for name in names]
