# SPDX-License-Identifier: Apache-2.0
"""Join tokens: who may join which SFU room, and how the guard rebuilds them.

LiveKit matches claim keys without case and reads an absent or empty ``canPublishSources`` as *all sources*.
So a grant is rebuilt from the keys we know instead of patched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from lotusguard.rules.requests import folded
from lotusguard.rules.sources import ALL_SOURCES, EVERY_SOURCE, Source, source_of_claim

LONGEST_UPSTREAM_LIFE = 86_400
"""Seconds. ``iat`` or ``nbf`` further than that before ``exp`` is not taken for the time of issue."""


@frozen
class Issued:
    """The user and the SFU room of a token."""

    alias: str
    identity: str


def issued_to(claims: Mapping[str, Any]) -> Issued | None:
    """Alias and identity of a join token; ``None`` if it lacks one of them.

    These two claims are the truth, whatever upstream's release derives them from. ``sub`` falls back to ``jti``,
    as in LiveKit.
    """
    video = claims.get("video")
    alias = video.get("room") if isinstance(video, dict) else None
    identity = claims.get("sub") or claims.get("jti") or claims.get("identity")
    if not (isinstance(alias, str) and alias and isinstance(identity, str) and identity):
        return None
    return Issued(alias, identity)


_OTHER_GRANTS = ("sip", "agent", "inference", "observability", "kind", "kindDetails")
"""Top-level grants for services other than calls, and the claims that make something else than a person of somebody."""
_TOP_CLAIMS = (
    "identity", "name", "video", "roomConfig", "roomPreset", "sha256", "metadata", "attributes",
    "iss", "sub", "aud", "exp", "nbf", "iat", "jti", *_OTHER_GRANTS,
)  # fmt: skip
_VIDEO_GRANTS = (
    "roomJoin", "room", "canPublish", "canSubscribe", "canPublishData", "canPublishSources", "canUpdateOwnMetadata",
    "canSubscribeMetrics",
)  # fmt: skip
"""The grants that are kept; all others are dropped. Some of those are over other people's calls or hide a participant:
``roomCreate`` (which deletes any room on the SFU), ``roomList``, ``roomAdmin``, ``roomRecord``, ``ingressAdmin``,
``hidden``, ``recorder``. Some are for agents and for calls that are forwarded: ``agent``, ``canManageAgentSession``,
``destinationRoom``; LiveKit takes their owner for no person, who takes a seat."""


_TOP_EXACT, _VIDEO_EXACT = (
    {written: name for name in names for written in (name, folded(name))} for names in (_TOP_CLAIMS, _VIDEO_GRANTS)
)


def _known(claims: Mapping[str, Any], exact: Mapping[str, str], *, others: bool) -> dict[str, Any]:
    """The claims under their exact names, read as Go does: without case, the last one wins."""
    known: dict[str, Any] = {}
    for key, value in claims.items():
        name = exact.get(key) or exact.get(folded(key))
        if name is not None:
            known[name] = value
        elif others:
            known[key] = value
    return known


def granted_sources(video: Mapping[str, Any]) -> tuple[Source, ...]:
    """The sources that a video grant lets its user publish, in its order."""
    if video.get("canPublish") is False:
        return ()
    listed = video.get("canPublishSources")
    if not listed:
        return ALL_SOURCES
    if not isinstance(listed, list):
        return ()
    return tuple(source for source in map(source_of_claim, listed) if source is not None)


def ceiling_of(claims: Mapping[str, Any]) -> frozenset[Source]:
    """The sources that a join token lets its user publish."""
    video = _known(claims, _TOP_EXACT, others=False).get("video")
    return frozenset(granted_sources(_known(video, _VIDEO_EXACT, others=False) if isinstance(video, dict) else {}))


@frozen
class Rebuilt:
    """A token's claims as the guard will sign them.

    :ivar granted: the ceiling: the sources that upstream granted.
    :ivar withheld: those of them that this user is not allowed now. The guard may give them back later.
    """

    claims: dict[str, Any]
    granted: frozenset[Source]
    withheld: frozenset[Source]


def rebuilt(claims: Mapping[str, Any], allowed: frozenset[Source], longest_life: float, now: float) -> Rebuilt:
    """The claims with known grants only, none of them administrative, the allowed sources only, and a short life.

    They are never wider than they came.

    :param allowed: what the room's policy lets this user publish.
    :param longest_life: seconds between issue and expiry.
    :param now: seconds since the epoch; used only if upstream's token does not tell when it was issued.
    """
    kept = _known(claims, _TOP_EXACT, others=True)
    given = kept.get("video")
    video = _known(given, _VIDEO_EXACT, others=False) if isinstance(given, dict) else {}
    for grant in _OTHER_GRANTS:
        kept.pop(grant, None)
    sources = granted_sources(video)
    if not allowed.issuperset(EVERY_SOURCE):
        _withhold(video, [source for source in sources if source in allowed])
    kept["video"] = video
    kept["exp"] = _expiry(kept, longest_life, now)
    granted = frozenset(sources)
    return Rebuilt(kept, granted, granted - allowed)


def _withhold(video: dict[str, Any], left: list[Source]) -> None:
    """Let a grant publish only what is left."""
    if left:
        video["canPublishSources"] = [source.claim for source in left]
        return
    # An empty list would be all sources. canPublishData follows canPublish when it is absent.
    if video.get("canPublishData") is None:
        video["canPublishData"] = video.get("canPublish") is not False
    video.pop("canPublishSources", None)
    video["canPublish"] = False


def _expiry(claims: Mapping[str, Any], longest_life: float, now: float) -> int:
    """The earlier of upstream's ``exp`` and the time of issue plus the longest life.

    The time of issue is upstream's own ``iat`` or ``nbf``, so that a guard whose clock is wrong issues tokens that
    work. A value far before ``exp`` is not a time of issue (``nbf: 0`` means "always valid"); ``now`` counts then.
    """
    expiry = _time(claims.get("exp"))
    latest = _issued_at(claims, expiry, now) + longest_life
    return int(latest if expiry is None else min(expiry, latest))


def _issued_at(claims: Mapping[str, Any], expiry: float | None, now: float) -> float:
    for name in ("iat", "nbf"):
        issued = _time(claims.get(name))
        if issued is None or issued <= 0:
            continue
        if expiry is None or 0 <= expiry - issued <= LONGEST_UPSTREAM_LIFE:
            return issued
    return now


def _time(value: object) -> float | None:
    """A time in seconds since the epoch; ``None`` for what is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 2**53 else None  # which NaN and Infinity are not
