# SPDX-License-Identifier: Apache-2.0
"""What is remembered of policies that were read."""

from __future__ import annotations

import pytest

from lotusguard.guard.rooms.remembered import RememberedPolicies
from lotusguard.guard.rooms.source import PushedState
from lotusguard.metrics import Metrics
from lotusguard.rules.state import VOICE_LIMIT, StateEvent

ROOM = "!room:x"


def limit(max_users: int) -> dict[str, StateEvent]:
    return {VOICE_LIMIT: StateEvent(VOICE_LIMIT, {"max_users": max_users}, "@alice:x")}


@pytest.fixture
def remembered() -> RememberedPolicies:
    return RememberedPolicies(Metrics(), default_limit=10)


def test_pushed_state_is_read_once(remembered: RememberedPolicies) -> None:
    events = limit(5)
    first = remembered.read_pushed(ROOM, PushedState(events, 100.0, True))
    assert remembered.read_pushed(ROOM, PushedState(events, 100.5, True)) is first


def test_a_changed_default_limit_counts_for_state_that_was_pushed_before(remembered: RememberedPolicies) -> None:
    pushed = PushedState({}, 100.0, True)
    assert remembered.read_pushed(ROOM, pushed).policy.max_users == 10
    remembered.default_limit = 4
    assert remembered.read_pushed(ROOM, pushed).policy.max_users == 4


def test_a_late_answer_to_an_earlier_lookup_is_not_remembered(remembered: RememberedPolicies) -> None:
    remembered.read(ROOM, limit(5), began=2.0)
    assert remembered.read(ROOM, limit(9), began=1.0).policy.max_users == 9
    entry = remembered.get(ROOM)
    assert entry is not None
    assert entry.policy.max_users == 5
