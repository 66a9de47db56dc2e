# SPDX-License-Identifier: Apache-2.0
"""Power levels by the Matrix specification."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lotusguard.rules.power_levels import CREATOR, CreatorLevel, Level, PowerLevels, read_power_levels
from lotusguard.rules.state import CREATE, POWER_LEVELS, StateEvent

ALICE, BOB, EVE = "@alice:example.org", "@bob:example.org", "@eve:example.org"


def create(version: Any = "11", sender: str = ALICE, **content: Any) -> StateEvent:
    return StateEvent(CREATE, ({} if version is None else {"room_version": version}) | content, sender)


def levels(content: Any, version: Any = "11", **create_content: Any) -> PowerLevels:
    read = read_power_levels(StateEvent(POWER_LEVELS, content, ALICE), create(version, **create_content))
    assert read is not None
    return read


def test_listed_users_have_their_level_and_all_others_the_default() -> None:
    read = levels({"users": {ALICE: 100, BOB: -5}, "users_default": 10, "kick": 60})
    assert (read.level_of(ALICE), read.level_of(BOB), read.level_of(EVE), read.kick) == (100, -5, 10, 60)


def test_defaults_of_the_specification() -> None:
    read = levels({})
    assert (read.level_of(ALICE), read.kick) == (0, 50)


@pytest.mark.parametrize("version", [None, "1", "9", "10", "11"])
def test_creator_has_100_without_power_levels(version: str | None) -> None:
    read = read_power_levels(None, create(version))
    assert read is not None
    assert (read.level_of(ALICE), read.level_of(BOB), read.kick) == (100, 0, 50)


def test_creator_is_named_in_the_content_before_version_11() -> None:
    for version, expected in (("1", BOB), ("10", BOB), ("11", ALICE)):
        read = read_power_levels(None, create(version, creator=BOB))
        assert read is not None
        assert read.users == {expected: 100}


@pytest.mark.parametrize("version", ["12", "13", "999", "org.example.newer", "", 12, None.__class__, "²", "1" * 5000])
def test_creators_stand_above_every_level_from_version_12_on(version: Any) -> None:
    event = StateEvent(POWER_LEVELS, {"users": {BOB: 10**30}, "kick": 10**40}, ALICE)
    for power_levels in (event, None):
        read = read_power_levels(power_levels, create(version, additional_creators=[EVE, 5, None, "", {"a": 1}, [EVE]]))
        assert read is not None
        assert read.level_of(ALICE) is CREATOR
        assert read.level_of(EVE) is CREATOR
        assert read.level_of(ALICE) >= read.kick
        assert read.level_of(BOB) == (10**30 if power_levels else 0)


def test_creators_are_not_listed_from_version_12_on_and_a_room_without_one_lists_nobody() -> None:
    assert read_power_levels(None, create("12")) == PowerLevels(creators=frozenset({ALICE}))
    assert read_power_levels(None, create("11")) == PowerLevels(users={ALICE: 100})
    assert read_power_levels(None, create("11", sender="")) == PowerLevels()


def test_additional_creators_mean_nothing_before_version_12() -> None:
    assert levels({}, "11", additional_creators=[EVE]).level_of(EVE) == 0


@pytest.mark.parametrize("additional", [None, "@eve:example.org", {EVE: 1}, 5])
def test_additional_creators_that_are_no_list_are_ignored(additional: Any) -> None:
    assert levels({}, "12", additional_creators=additional).creators == {ALICE}


@pytest.mark.parametrize(
    ("written", "level"),
    [
        ("100", 100),
        (" 100 ", 100),
        ("-5", -5),
        ("+5", 5),
        ("007", 7),
        ("1_0", 0),
        ("٣", 0),
        ("5.0", 0),
        ("", 0),
        ("9" * 5000, 0),
    ],
)
def test_levels_written_as_strings_count_below_version_10_only(written: str, level: int) -> None:
    content = {"users": {BOB: written}, "users_default": "0"}
    assert levels(content, "9").level_of(BOB) == level
    assert levels(content, "10").level_of(BOB) == 0


@pytest.mark.parametrize("version", ["1", "9", "10", "12"])
@pytest.mark.parametrize("value", [True, False, None, 60.0, [60], {}, float("nan")])
def test_what_is_not_a_level_counts_as_absent(value: Any, version: str) -> None:
    read = levels({"users": {BOB: value}, "users_default": value, "kick": value}, version)
    assert (read.level_of(BOB), read.kick) == (0, 50)


@pytest.mark.parametrize("content", [[], None, "x", {"users": []}, {"users": "x"}, {"users": None}])
def test_content_of_another_shape_gives_the_defaults(content: Any) -> None:
    read = levels(content)
    assert (read.level_of(BOB), read.kick) == (0, 50)


def test_levels_are_unknown_without_the_create_event() -> None:
    assert read_power_levels(StateEvent(POWER_LEVELS, {"users": {ALICE: 100}}, ALICE), None) is None


@given(st.integers())
def test_creator_level_is_greater_than_every_integer(number: int) -> None:
    level: Level = number
    creator: Level = CREATOR
    assert sorted([creator, level, creator]) == [level, creator, creator]
    assert (creator > level, creator >= level, creator < level, creator <= level) == (True, True, False, False)
    assert (level > creator, level >= creator, level < creator, level <= creator) == (False, False, True, True)
    assert creator != level


def test_creators_are_equal_to_each_other() -> None:
    first, second = CreatorLevel(), CreatorLevel()
    assert first == second
    assert first >= second
    assert not first > second
