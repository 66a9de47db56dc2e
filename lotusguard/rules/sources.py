# SPDX-License-Identifier: Apache-2.0
"""The SFU's track sources, and what becomes of publish permissions when a policy forbids some. Floor: rules.

Names and numbers are LiveKit's (``livekit_models.proto``, ``TrackSource``); its server treats an empty list
of sources as *all of them*, both in a token's grant and in a participant's permission.
"""

from __future__ import annotations

from enum import IntEnum
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
_NUMBERS = frozenset(map(int, Source))
_BY_CLAIM = {source.claim: source for source in Source}


def source_of_claim(name: object) -> Source | None:
    """The source that a token's ``canPublishSources`` names, or ``None`` for what the SFU does not know."""
    return _BY_CLAIM.get(name) if isinstance(name, str) else None


def permitted_sources(permission: ParticipantPermission) -> tuple[Source, ...]:
    """What a participant may publish now, in the order it stands there. UNKNOWN and numbers that
    this release does not know are no sources we could leave to anybody, so they are dropped."""
    if not permission.can_publish:
        return ()
    if not permission.can_publish_sources:
        return ALL_SOURCES
    return tuple(Source(number) for number in permission.can_publish_sources if number in _NUMBERS)


def revoked(permission: ParticipantPermission, forbidden: frozenset[Source]) -> ParticipantPermission | None:
    """The permission without the forbidden sources, every other flag (also those we do not know) as it was.

    UpdateParticipant replaces the whole message, so it is a copy of the participant's own. When nothing is
    left to publish, ``can_publish`` goes down, because an empty list would mean all sources.

    :return: ``None`` when nothing forbidden is permitted, so that there is nothing to do.
    """
    before = permitted_sources(permission)
    if not forbidden.intersection(before):
        return None
    left = [source for source in before if source not in forbidden]
    after = ParticipantPermission()
    after.CopyFrom(permission)
    del after.can_publish_sources[:]
    if left:
        after.can_publish_sources.extend(_number(source) for source in left)
    else:
        after.can_publish = False
    return after


def restored(permission: ParticipantPermission, owed: frozenset[Source]) -> ParticipantPermission | None:
    """The permission with sources back.

    :param owed: what the guard itself took from this participant and may give back; never more comes back.
    :return: ``None`` when they have it all.
    """
    before = permitted_sources(permission)
    back = owed.difference(before)
    if not back:
        return None
    after = ParticipantPermission()
    after.CopyFrom(permission)
    del after.can_publish_sources[:]
    after.can_publish = True
    keep = [*before, *(source for source in ALL_SOURCES if source in back)]
    after.can_publish_sources.extend(_number(source) for source in keep)
    return after


def _number(source: Source) -> Any:
    return TrackSource.Value(source.name)  # the stubs want the enum's type; on the wire it is the number


def within(permission: ParticipantPermission, allowed: ParticipantPermission) -> bool:
    """Whether ``permission`` publishes nothing that ``allowed`` does not: how an answer of the SFU is checked."""
    return set(permitted_sources(permission)) <= set(permitted_sources(allowed))


def disguised(participant: ParticipantInfo, forbidden: frozenset[Source]) -> list[TrackInfo]:
    """Unmuted tracks whose label hides what a policy forbids: video that calls itself a microphone (or
    screen-share audio) while camera or screen share, whichever it really is, may not be published.

    A label is the client's word; ``type`` and ``mime_type`` come from what is really negotiated.
    """
    if not forbidden.intersection((CAMERA, SCREEN_SHARE)):
        return []
    audible = (int(MICROPHONE), int(SCREEN_SHARE_AUDIO))
    return [track for track in participant.tracks if track.source in audible and not track.muted and _is_video(track)]


def _is_video(track: TrackInfo) -> bool:
    codecs = (track.mime_type, *(codec.mime_type for codec in track.codecs))
    return track.type == TrackType.VIDEO or any(codec.lower().startswith("video/") for codec in codecs)
