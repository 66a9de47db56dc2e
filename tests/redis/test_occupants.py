# SPDX-License-Identifier: Apache-2.0
"""What a guard keeps about who is where."""

from __future__ import annotations

from lotusguard.guard.seats.redis.occupants import NAMES_KEPT, ROOMS_KEPT, KnownOccupants


def test_changes_are_added_to_what_was_told_before() -> None:
    known = KnownOccupants()
    assert known.number("!r") is None
    assert known.update("!r", ["7", ["a", "b"], {}]) == {"a", "b"}
    assert known.update("!r", ["9", False, [["a", False], ["c", True]]]) == {"b", "c"}
    assert (known.number("!r"), known.names("!r")) == ("9", {"b", "c"})
    known.clear()
    assert known.number("!r") is None


def test_what_was_told_is_not_changed_by_what_is_told_later() -> None:
    known = KnownOccupants()
    before = known.update("!r", ["7", ["a"], {}])
    known.update("!r", ["8", False, [["b", True]]])
    assert before == {"a"}


def test_changes_of_a_room_that_was_forgotten_say_nothing() -> None:
    assert KnownOccupants().update("!r", ["7", False, [["a", True]]]) is None


def test_no_more_rooms_and_names_are_kept_than_fit() -> None:
    known = KnownOccupants()
    for room in range(ROOMS_KEPT + 1):
        known.update(f"!{room}", ["1", ["a"], {}])
    assert known.number("!0") is None
    assert known.number("!1") == "1"
    known.update("!large", ["1", [str(name) for name in range(NAMES_KEPT)], {}])
    assert known.number(f"!{ROOMS_KEPT}") is None
    assert known.number("!large") == "1"
    known.update("!large", ["2", ["a"], {}])
    known.update("!other", ["1", ["a"], {}])
    assert known.number("!large") == "2"
