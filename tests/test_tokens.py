# SPDX-License-Identifier: Apache-2.0
"""Join tokens: rebuilt with known grants, allowed sources and a short life, and never wider than they came."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.rules.sources import CAMERA, EVERY_SOURCE, MICROPHONE, SCREEN_SHARE, SCREEN_SHARE_AUDIO, Source
from lotusguard.rules.tokens import LONGEST_UPSTREAM_LIFE, Rebuilt, granted_sources, issued_to, rebuilt

NOW = 1_800_000_000.0
LIFE = 120
NO_SCREEN = frozenset({MICROPHONE, CAMERA})


def join_claims(**video: Any) -> dict[str, Any]:
    grant = {"roomJoin": True, "room": "alias", "canPublish": True, "canSubscribe": True, **video}
    return {"iss": "key", "sub": "@alice:a:DEV", "exp": int(NOW) + 3600, "nbf": int(NOW), "video": grant}


def rebuild(claims: dict[str, Any], allowed: frozenset[Source] = EVERY_SOURCE, now: float = NOW) -> Rebuilt:
    return rebuilt(claims, allowed, LIFE, now)


@pytest.mark.parametrize(
    ("video", "sources"),
    [
        ({}, ["microphone", "camera"]),
        ({"canPublishSources": None}, ["microphone", "camera"]),
        ({"canPublishSources": []}, ["microphone", "camera"]),
        ({"canPublishSources": ["camera", "screen_share", "microphone"]}, ["camera", "microphone"]),
        ({"canPublishSources": ["microphone"]}, ["microphone"]),
        ({"canPublishSources": ["microphone", "SCREEN_SHARE", "nonsense"]}, ["microphone"]),
        ({"CANPUBLISHSOURCES": ["camera", "screen_share"]}, ["camera"]),
        ({"canPublishſources": ["camera", "screen_share"]}, ["camera"]),
    ],
)
def test_sources_that_are_not_allowed_are_withheld(video: dict[str, Any], sources: list[str]) -> None:
    kept = rebuild(join_claims(**video), NO_SCREEN).claims
    assert kept["video"] == {
        "roomJoin": True, "room": "alias", "canPublish": True, "canSubscribe": True, "canPublishSources": sources,
    }  # fmt: skip


@pytest.mark.parametrize("data", [None, True, False])
def test_data_grant_is_kept_when_no_source_is_left(data: bool | None) -> None:
    video = {"canPublishSources": ["camera"]} | ({} if data is None else {"canPublishData": data})
    kept = rebuild(join_claims(**video), frozenset({MICROPHONE})).claims["video"]
    assert kept["canPublish"] is False
    assert "canPublishSources" not in kept
    assert kept["canPublishData"] is (data is not False)


def test_token_that_may_not_publish_stays_so() -> None:
    kept = rebuild(join_claims(canPublish=False), NO_SCREEN).claims["video"]
    assert kept["canPublish"] is False
    assert kept["canPublishData"] is False


def test_sources_stay_as_they_came_when_all_are_allowed() -> None:
    videos: list[dict[str, Any]] = [
        {},
        {"canPublishSources": []},
        {"canPublishSources": ["camera"]},
        {"canPublish": False},
    ]
    for video in videos:
        assert rebuild(join_claims(**video)).claims["video"] == join_claims(**video)["video"]


@pytest.mark.parametrize(
    ("video", "allowed", "granted", "withheld"),
    [
        ({}, EVERY_SOURCE, EVERY_SOURCE, set()),
        ({}, NO_SCREEN, EVERY_SOURCE, {SCREEN_SHARE, SCREEN_SHARE_AUDIO}),
        ({"canPublishSources": ["camera", "microphone"]}, frozenset({CAMERA}), {CAMERA, MICROPHONE}, {MICROPHONE}),
        ({"canPublishSources": ["camera"]}, frozenset(), {CAMERA}, {CAMERA}),
        ({"canPublish": False}, frozenset(), set(), set()),
    ],
)
def test_ceiling_and_withheld_sources_are_told(
    video: dict[str, Any], allowed: frozenset[Source], granted: set[Source], withheld: set[Source]
) -> None:
    token = rebuild(join_claims(**video), allowed)
    assert (token.granted, token.withheld) == (frozenset(granted), frozenset(withheld))


ADMINISTRATIVE = ("roomCreate", "roomList", "roomAdmin", "roomRecord", "ingressAdmin", "hidden", "recorder")


@pytest.mark.parametrize("grant", [*ADMINISTRATIVE, "ROOMADMIN", "roomCREATE", "notAGrant"])
def test_administrative_and_unknown_grants_are_dropped(grant: str) -> None:
    assert rebuild(join_claims(**{grant: True})).claims["video"] == join_claims()["video"]


@pytest.mark.parametrize("grant", ["sip", "agent", "inference", "observability", "SIP"])
def test_grants_for_other_services_are_dropped(grant: str) -> None:
    assert rebuild(join_claims() | {grant: {"admin": True}}).claims == rebuild(join_claims()).claims


def issued(**times: Any) -> int:
    claims = {key: value for key, value in (join_claims() | times).items() if value != "absent"}
    expiry = rebuild(claims).claims["exp"]
    assert isinstance(expiry, int)
    return expiry


def test_lifetime_is_shortened_and_never_extended() -> None:
    assert issued() == NOW + LIFE
    assert issued(exp=int(NOW) + 5) == NOW + 5
    assert issued(exp=NOW + 5.9) == NOW + 5
    assert issued(EXP=int(NOW) + 9999) == NOW + LIFE
    assert issued(exp="absent") == NOW + LIFE


@pytest.mark.parametrize("expiry", ["absent", None, "soon", True, float("inf"), float("nan"), 10**400, [5], {}])
def test_token_without_a_usable_expiry_gets_one(expiry: Any) -> None:
    assert issued(exp=expiry) == NOW + LIFE


@pytest.mark.parametrize("error", [-3e8, -86_400, -3600, 3600, 3e8])
@pytest.mark.parametrize("name", ["iat", "nbf"])
def test_lifetime_begins_when_upstream_issued_the_token_whatever_our_clock_says(error: float, name: str) -> None:
    claims = join_claims()
    del claims["nbf"]
    assert rebuild(claims | {name: int(NOW)}, now=NOW + error).claims["exp"] == NOW + LIFE


def test_iat_is_preferred_to_nbf() -> None:
    assert issued(iat=int(NOW), nbf=int(NOW) - 10) == NOW + LIFE
    assert issued(nbf=int(NOW) - 10) == NOW - 10 + LIFE


@pytest.mark.parametrize(
    "value", [0, -5, None, True, "now", float("nan"), float("inf"), 10**400, NOW - 10**7, NOW + 10**7]
)
def test_value_that_is_not_a_time_of_issue_is_ignored(value: Any) -> None:
    assert issued(iat=value, nbf=value) == NOW + LIFE
    assert issued(iat=value) == NOW + LIFE


def test_times_of_issue_without_an_expiry() -> None:
    assert issued(exp="absent", nbf=0) == NOW + LIFE
    assert issued(exp="absent", nbf=-1) == NOW + LIFE
    assert issued(exp="absent", nbf=1) == 1 + LIFE
    assert issued(exp="absent", nbf=int(NOW) - 50) == NOW - 50 + LIFE


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (0, NOW + 10_000),
        (-1, NOW + LIFE),
        (LONGEST_UPSTREAM_LIFE, NOW + 10_000 - LONGEST_UPSTREAM_LIFE + LIFE),
        (LONGEST_UPSTREAM_LIFE + 1, NOW + LIFE),
    ],
)
def test_a_time_of_issue_is_not_after_the_expiry_nor_more_than_a_day_before(before: int, expected: float) -> None:
    expiry = int(NOW) + 10_000
    assert issued(exp=expiry, iat=expiry - before, nbf="absent") == expected


@pytest.mark.parametrize(("expiry", "expected"), [(-(2**53) + 1, -(2**53) + 1), (-(2**53), NOW + LIFE)])
def test_numbers_that_a_float_cannot_hold_are_no_times(expiry: int, expected: float) -> None:
    assert issued(exp=expiry, iat="absent", nbf="absent") == expected


def test_all_other_claims_are_kept() -> None:
    claims = join_claims(canUpdateOwnMetadata=True) | {"name": "A", "metadata": "m", "x-other": [1], "identity": "i"}
    kept = rebuild(claims, NO_SCREEN).claims
    names = ("name", "metadata", "x-other", "identity", "sub", "iss", "nbf")
    assert {name: kept[name] for name in names} == {name: claims[name] for name in names}
    assert kept["video"]["canUpdateOwnMetadata"] is True


def test_given_claims_are_not_modified() -> None:
    claims = join_claims(roomAdmin=True, canPublishSources=["camera"])
    rebuild(claims, frozenset())
    assert claims == join_claims(roomAdmin=True, canPublishSources=["camera"])


@pytest.mark.parametrize("video", [None, [], "x", 5])
def test_claims_without_a_grant_get_no_right_to_join(video: Any) -> None:
    assert "roomJoin" not in rebuild(join_claims() | {"video": video}, NO_SCREEN).claims["video"]


SOURCE_NAMES = st.sampled_from([source.claim for source in Source] + ["CAMERA", "unknown", ""])
GRANTS = st.fixed_dictionaries(
    {"roomJoin": st.booleans(), "room": st.text()},
    optional={
        "canPublish": st.sampled_from([True, False, None]),
        "canPublishData": st.sampled_from([True, False, None]),
        "canPublishSources": st.none() | st.lists(SOURCE_NAMES),
        "canSubscribe": st.booleans(),
    },
)
ALLOWED = st.frozensets(st.sampled_from(list(Source)))


@given(GRANTS, ALLOWED)
def test_rebuilt_token_never_grants_more_than_the_original(video: dict[str, Any], allowed: frozenset[Source]) -> None:
    token = rebuild({"iss": "key", "sub": "x", "video": video}, allowed)
    kept = token.claims["video"]
    before, after = set(granted_sources(video)), set(granted_sources(kept))
    assert after == before & allowed
    assert token.granted == before
    assert token.withheld == before - after
    data_before = video.get("canPublishData")
    data_before = video.get("canPublish") is not False if data_before is None else data_before
    data_after = kept.get("canPublishData")
    data_after = kept.get("canPublish") is not False if data_after is None else data_after
    assert data_after == data_before


def test_issued_token_names_alias_and_identity() -> None:
    issued = issued_to(join_claims())
    assert issued is not None
    assert (issued.alias, issued.identity) == ("alias", "@alice:a:DEV")
    fallback = issued_to({"jti": "id", "video": {"room": "r"}})
    assert fallback is not None
    assert fallback.identity == "id"
    assert issued_to({"sub": "x"}) is None
    assert issued_to({"video": {"room": "r"}}) is None
