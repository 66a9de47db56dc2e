# SPDX-License-Identifier: Apache-2.0
"""A participant's publish permission: revoked, restored, and never wider than their token granted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livekit.protocol.models import (
    ParticipantInfo,
    ParticipantPermission,
    SimulcastCodecInfo,
    TrackInfo,
    TrackSource,
    TrackType,
)

from lotusguard.rules.sources import (
    ALL_SOURCES,
    CAMERA,
    EVERY_SOURCE,
    MICROPHONE,
    SCREEN_SHARE,
    SCREEN_SHARE_AUDIO,
    Source,
    adjusted,
    disguised,
    permitted_sources,
    restored,
    revoked,
    within,
)
from lotusguard.sandbox.livekit.grants import VideoGrant

SCREEN = frozenset({SCREEN_SHARE, SCREEN_SHARE_AUDIO})
UNKNOWN = TrackSource.UNKNOWN


def permission(*sources: int, can_publish: bool = True, **flags: Any) -> ParticipantPermission:
    made = ParticipantPermission(can_publish=can_publish, **flags)
    made.can_publish_sources.extend(sources)  # type: ignore[arg-type]
    return made


def listed(of: ParticipantPermission | None) -> list[int]:
    assert of is not None
    return list(of.can_publish_sources)


# -- revoking ------------------------------------------------------------------------------------------


def test_empty_list_means_all_sources_and_becomes_the_ones_that_are_left() -> None:
    after = revoked(permission(), SCREEN)
    assert listed(after) == [MICROPHONE, CAMERA]
    assert after is not None
    assert after.can_publish


def test_order_of_what_is_left_is_kept() -> None:
    assert listed(revoked(permission(CAMERA, SCREEN_SHARE, MICROPHONE), SCREEN)) == [CAMERA, MICROPHONE]


def test_unknown_sources_are_dropped_when_something_is_revoked() -> None:
    assert listed(revoked(permission(UNKNOWN, CAMERA, 99, MICROPHONE), frozenset({CAMERA}))) == [MICROPHONE]


def test_unknown_source_alone_causes_no_update() -> None:
    assert revoked(permission(UNKNOWN, MICROPHONE), SCREEN) is None


def test_can_publish_becomes_false_when_no_source_is_left() -> None:
    after = revoked(permission(CAMERA, UNKNOWN), frozenset({CAMERA}))
    assert after is not None
    assert not after.can_publish
    assert listed(after) == []


@pytest.mark.parametrize("before", [permission(MICROPHONE), permission(can_publish=False), permission(MICROPHONE, 99)])
def test_permission_without_forbidden_sources_needs_no_update(before: ParticipantPermission) -> None:
    assert revoked(before, SCREEN | {CAMERA}) is None


def test_nothing_forbidden_needs_no_update() -> None:
    assert revoked(permission(), frozenset()) is None


FLAGS = (
    "can_subscribe", "can_publish_data", "hidden", "recorder", "agent", "can_update_metadata", "can_subscribe_metrics",
    "can_manage_agent_session",
)  # fmt: skip


@given(st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS}), st.sets(st.sampled_from(Source)))
def test_every_other_flag_stays(flags: dict[str, bool], forbidden: set[Source]) -> None:
    before = permission(**flags)
    after = revoked(before, frozenset(forbidden)) or before
    assert {flag: getattr(after, flag) for flag in FLAGS} == flags


def test_these_tests_know_every_flag_of_the_protocol() -> None:
    known = {field.name for field in ParticipantPermission.DESCRIPTOR.fields}
    assert known == {*FLAGS, "can_publish", "can_publish_sources"}


def test_fields_of_a_later_release_survive() -> None:
    later = b"\xf8\x06\x01" + b"\xfa\x06\x03new"  # fields 111 (varint) and 111 (text)
    before = ParticipantPermission.FromString(permission(can_subscribe=True).SerializeToString() + later)
    after = revoked(before, SCREEN)
    assert after is not None
    assert after.SerializeToString().endswith(later)
    back = restored(after, SCREEN)
    assert back is not None
    assert later in back.SerializeToString()


def test_the_given_message_is_not_modified() -> None:
    before = permission(CAMERA, SCREEN_SHARE)
    revoked(before, SCREEN)
    restored(before, frozenset({MICROPHONE}))
    assert listed(before) == [CAMERA, SCREEN_SHARE]


# -- checking ----------------------------------------------------------------------------------------


def test_answer_that_still_permits_a_revoked_source_is_detected() -> None:
    wanted = revoked(permission(), SCREEN)
    assert wanted is not None
    assert within(wanted, wanted)
    assert not within(permission(), wanted)
    assert not within(permission(MICROPHONE, CAMERA, SCREEN_SHARE), wanted)
    assert within(permission(can_publish=False), wanted)


def test_emptied_list_is_not_mistaken_for_no_source() -> None:
    wanted = revoked(permission(CAMERA), frozenset({CAMERA}))
    assert wanted is not None
    assert not within(permission(), wanted)


# -- restoring -------------------------------------------------------------------------------------


def test_exactly_what_is_owed_is_restored() -> None:
    assert listed(restored(permission(MICROPHONE), frozenset({CAMERA}))) == [MICROPHONE, CAMERA]


def test_restoring_from_can_publish_false_adds_only_what_is_owed() -> None:
    back = restored(permission(can_publish=False), frozenset({CAMERA}))
    assert back is not None
    assert back.can_publish
    assert listed(back) == [CAMERA]


def test_nothing_to_restore_needs_no_update() -> None:
    assert restored(permission(), SCREEN) is None
    assert restored(permission(MICROPHONE, CAMERA), frozenset({CAMERA})) is None
    assert restored(permission(MICROPHONE), frozenset()) is None


# -- both at once ------------------------------------------------------------------------------------


def test_one_update_revokes_and_restores() -> None:
    after = adjusted(permission(CAMERA, MICROPHONE), frozenset({MICROPHONE, SCREEN_SHARE}), SCREEN)
    assert listed(after) == [MICROPHONE, SCREEN_SHARE]


def test_owed_source_that_is_not_allowed_is_not_restored() -> None:
    assert adjusted(permission(MICROPHONE), frozenset({MICROPHONE}), frozenset({CAMERA})) is None
    assert adjusted(permission(can_publish=False), frozenset(), EVERY_SOURCE) is None


SOURCES = st.frozensets(st.sampled_from(Source))
PERMISSIONS = st.builds(
    lambda sources, can_publish: permission(*sources, can_publish=can_publish),
    st.lists(st.sampled_from([*Source, UNKNOWN, 99])),
    st.booleans(),
)


@given(PERMISSIONS, SOURCES, SOURCES)
def test_adjusted_permission_is_exactly_what_is_allowed_of_what_was_or_is_owed(
    before: ParticipantPermission, allowed: frozenset[Source], owed: frozenset[Source]
) -> None:
    wanted = adjusted(before, allowed, owed)
    had = frozenset(permitted_sources(before))
    assert frozenset(permitted_sources(wanted or before)) == (had | owed) & allowed
    assert (wanted is None) == (had == (had | owed) & allowed)
    if wanted is not None:
        assert adjusted(wanted, allowed, owed) is None
        assert wanted.can_publish == bool(wanted.can_publish_sources)


@given(PERMISSIONS, SOURCES, SOURCES)
def test_adjusting_keeps_the_order_of_what_stays(
    before: ParticipantPermission, allowed: frozenset[Source], owed: frozenset[Source]
) -> None:
    wanted = adjusted(before, allowed, owed)
    kept = [source for source in permitted_sources(before) if source in allowed]
    assert wanted is None or list(permitted_sources(wanted))[: len(kept)] == kept


# -- LiveKit's own reading of it, over any history --------------------------------------------------------

CLAIMS = st.lists(st.sampled_from(["unknown", *(source.claim for source in Source)]), max_size=5)
POLICIES = st.lists(
    st.sampled_from([frozenset[Source](), SCREEN, frozenset({CAMERA}), SCREEN | {CAMERA}]), min_size=1, max_size=12
)


def may(grant: VideoGrant) -> set[int]:
    """What LiveKit lets a participant publish, by its own reading of the grant."""
    return {number for number in range(5) if grant.may_publish(number)}


@given(CLAIMS, st.sampled_from([None, True, False]), POLICIES, st.data())
def test_no_history_of_policies_gives_more_than_the_token_granted(
    claims: list[str], can_publish: bool | None, policies: list[frozenset[Source]], data: st.DataObject
) -> None:
    token = VideoGrant(can_publish=can_publish, can_publish_sources=claims)
    grant, taken = token, frozenset[Source]()
    for forbidden in policies:
        now = grant.to_permission()
        wanted = revoked(now, forbidden)
        if wanted is not None:
            taken |= forbidden.intersection(permitted_sources(now))
            if data.draw(st.booleans(), label="the update arrives"):
                grant = grant.replaced_by(wanted)
                assert not may(grant) & forbidden
        else:
            back = restored(now, taken - forbidden)
            if back is not None:
                grant = grant.replaced_by(back)
            taken &= forbidden
        assert may(grant) <= may(token)


@given(CLAIMS, POLICIES)
def test_everything_granted_is_restored_once_all_is_allowed_again(
    claims: list[str], policies: list[frozenset[Source]]
) -> None:
    token = VideoGrant(can_publish_sources=claims)
    grant, taken = token, frozenset[Source]()
    for forbidden in (*policies, frozenset[Source]()):
        now = grant.to_permission()
        taken |= forbidden.intersection(permitted_sources(now))
        for wanted in (revoked(now, forbidden), restored(grant.to_permission(), taken - forbidden)):
            grant = grant if wanted is None else grant.replaced_by(wanted)
        taken &= forbidden
    known = set(map(int, Source))
    assert may(grant) & known == may(token) & known


# -- labels ------------------------------------------------------------------------------------------


def participant(*tracks: TrackInfo) -> ParticipantInfo:
    return ParticipantInfo(sid="PA_1", identity="somebody", tracks=list(tracks))


def track(source: int, type: Any = TrackType.AUDIO, **more: Any) -> TrackInfo:
    return TrackInfo(sid=f"TR_{source}", source=source, type=type, **more)  # type: ignore[arg-type]


DISGUISES: Iterable[TrackInfo] = (
    track(MICROPHONE, TrackType.VIDEO),
    track(SCREEN_SHARE_AUDIO, TrackType.VIDEO),
    track(MICROPHONE, mime_type="Video/H264"),
    track(MICROPHONE, codecs=[SimulcastCodecInfo(mime_type="video/VP8")]),
)


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("forbidden", [frozenset({CAMERA}), SCREEN])
def test_video_track_labelled_as_audio_is_found(disguise: TrackInfo, forbidden: frozenset[Source]) -> None:
    assert disguised(participant(track(MICROPHONE), disguise), EVERY_SOURCE - forbidden) == [disguise]
    assert disguised(participant(disguise), EVERY_SOURCE) == []


@pytest.mark.parametrize(
    "honest",
    [
        track(MICROPHONE, mime_type="audio/red"),
        track(CAMERA, TrackType.VIDEO),
        track(SCREEN_SHARE, TrackType.VIDEO),
        track(MICROPHONE, TrackType.VIDEO, muted=True),
    ],
)
def test_honest_or_muted_track_is_not_reported(honest: TrackInfo) -> None:
    assert disguised(participant(honest), frozenset({MICROPHONE})) == []


def test_source_names_match_livekits() -> None:
    assert {source.name: source.value for source in ALL_SOURCES} == {
        name: number for name, number in TrackSource.items() if number
    }
