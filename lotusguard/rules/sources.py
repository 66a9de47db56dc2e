# SPDX-License-Identifier: Apache-2.0
"""The SFU's track sources, and how a participant's publish permission follows what they are allowed.

Names and numbers are LiveKit's (``livekit_models.proto``, ``TrackSource``). Its server treats an empty list
of sources as *all of them*, both in a token's grant and in a participant's permission.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum
from functools import lru_cache
from typing import Any

from livekit.protocol.models import ParticipantInfo, ParticipantPermission, TrackInfo, TrackSource, TrackType


class Source(IntEnum):
    """A track source; the value is its protobuf number."""

    CAMERA = 1
    MICROPHONE = 2
    SCREEN_SHARE = 3
    SCREEN_SHARE_AUDIO = 4

    @property
    def claim(self) -> str:
        """Its name in a token's ``canPublishSources``: exact and lower case."""
        return self.name.lower()


CAMERA, MICROPHONE, SCREEN_SHARE, SCREEN_SHARE_AUDIO = Source
ALL_SOURCES = (MICROPHONE, CAMERA, SCREEN_SHARE, SCREEN_SHARE_AUDIO)
EVERY_SOURCE = frozenset(ALL_SOURCES)
NO_SOURCE: frozenset[Source] = frozenset()
_NUMBERS = frozenset(map(int, Source))
_BY_CLAIM = {source.claim: source for source in Source}


def source_of_claim(name: object) -> Source | None:
    """The source that an entry of ``canPublishSources`` names; ``None`` if LiveKit does not know the name."""
    return _BY_CLAIM.get(name) if isinstance(name, str) else None


def mask_of(sources: Collection[Source]) -> int:
    """Sources as a bit mask of their numbers."""
    return sum(1 << source for source in sources)


@lru_cache(maxsize=64)
def sources_of(mask: int) -> frozenset[Source]:
    """The sources of a bit mask; bits that no source has are ignored."""
    return frozenset(source for source in Source if mask >> source & 1)


def permitted_sources(permission: ParticipantPermission) -> tuple[Source, ...]:
    """The sources that a participant may publish now, in the order of their permission.

    UNKNOWN and numbers of later releases are dropped: no policy says anything about them.
    """
    if not permission.can_publish:
        return ()
    if not permission.can_publish_sources:
        return ALL_SOURCES
    return tuple(Source(number) for number in permission.can_publish_sources if number in _NUMBERS)


def adjusted(
    permission: ParticipantPermission, allowed: frozenset[Source], owed: frozenset[Source] = NO_SOURCE
) -> ParticipantPermission | None:
    """The permission that a participant should have: without what is not allowed, with what is owed and allowed.

    UpdateParticipant replaces the whole message. So this is a copy of the participant's own permission, and every
    other flag, also one of a later release, stays as it was. When nothing is left, ``can_publish`` becomes false,
    because an empty list would mean all sources. The order of what stays is kept.

    :param allowed: what the room's policy lets this user publish.
    :param owed: what the guard withheld from this participant, or revoked; nothing else is given back.
    :return: ``None`` if there is nothing to change.
    """
    before = permitted_sources(permission)
    kept = [source for source in before if source in allowed]
    added = [source for source in ALL_SOURCES if source in owed and source in allowed and source not in before]
    if len(kept) == len(before) and not added:
        return None
    after = ParticipantPermission()
    after.CopyFrom(permission)
    del after.can_publish_sources[:]
    after.can_publish_sources.extend(_number(source) for source in (*kept, *added))
    after.can_publish = bool(kept or added)
    return after


def revoked(permission: ParticipantPermission, forbidden: frozenset[Source]) -> ParticipantPermission | None:
    """The permission without the forbidden sources; ``None`` if it holds none of them."""
    return adjusted(permission, EVERY_SOURCE - forbidden)


def restored(permission: ParticipantPermission, owed: frozenset[Source]) -> ParticipantPermission | None:
    """The permission with the sources that are owed; ``None`` if it holds all of them."""
    return adjusted(permission, EVERY_SOURCE, owed)


def _number(source: Source) -> Any:
    return TrackSource.Value(source.name)  # the stubs want the enum's type; on the wire it is the number


def within(permission: ParticipantPermission, allowed: ParticipantPermission) -> bool:
    """Whether ``permission`` publishes nothing that ``allowed`` does not: how an answer of the SFU is checked."""
    return set(permitted_sources(permission)) <= set(permitted_sources(allowed))


def disguised(participant: ParticipantInfo, allowed: frozenset[Source]) -> list[TrackInfo]:
    """Unmuted video tracks that are labelled as sound, if the participant may not publish all kinds of video.

    A label is the client's word; ``type`` and ``mime_type`` come from what is really negotiated. They do not tell
    a camera from a screen, so such a track is suspect as soon as one of the two is not allowed.
    """
    if allowed.issuperset((CAMERA, SCREEN_SHARE)):
        return []
    audible = (int(MICROPHONE), int(SCREEN_SHARE_AUDIO))
    return [track for track in participant.tracks if track.source in audible and not track.muted and _is_video(track)]


def _is_video(track: TrackInfo) -> bool:
    codecs = (track.mime_type, *(codec.mime_type for codec in track.codecs))
    return track.type == TrackType.VIDEO or any(codec.lower().startswith("video/") for codec in codecs)
