# SPDX-License-Identifier: Apache-2.0
"""What a room's admins wrote into room state, as a policy. Floor: rules."""

from __future__ import annotations

import math
from collections.abc import Mapping

from attrs import frozen

from lotusguard.rules.sources import CAMERA, SCREEN_SHARE, SCREEN_SHARE_AUDIO, Source

VOICE_LIMIT = "io.lotus.voice_limit"
ROOM_QUALITY = "io.lotus.room_quality"


@frozen
class Policy:
    """What one Matrix room allows in its calls.

    :ivar max_users: how many distinct users may be in the room's call; ``None`` is no limit.
    :ivar forbidden: the sources nobody may publish. The microphone is never among them.
    """

    max_users: int | None = None
    forbidden: frozenset[Source] = frozenset()

    def __bool__(self) -> bool:
        """Whether there is anything to enforce."""
        return self.max_users is not None or bool(self.forbidden)


NO_POLICY = Policy()


def max_users(content: object) -> tuple[int | None, bool]:
    """Read the content of an ``io.lotus.voice_limit`` event.

    :return: the limit (``None``: no limit), and whether what stands there is no number at all, which
        somebody should be told about.
    """
    if not isinstance(content, Mapping):
        return None, True
    value = content.get("max_users")
    if value is None:
        return None, False
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, True
    if isinstance(value, float) and not math.isfinite(value):
        return None, True
    limit = int(value)
    return (limit if limit > 0 else None), False


def forbidden_sources(content: object) -> tuple[frozenset[Source], bool]:
    """Read the content of an ``io.lotus.room_quality`` event.

    Only JSON ``false`` forbids. A forbidden screen share takes its audio along.

    :return: the forbidden sources, and whether something that is no boolean stands where one belongs.
    """
    if not isinstance(content, Mapping):
        return frozenset(), True
    forbidden: set[Source] = set()
    if content.get("allow_screenshare") is False:
        forbidden |= {SCREEN_SHARE, SCREEN_SHARE_AUDIO}
    if content.get("allow_camera") is False:
        forbidden.add(CAMERA)
    malformed = any(not isinstance(content.get(key, True), bool) for key in ("allow_screenshare", "allow_camera"))
    return frozenset(forbidden), malformed
