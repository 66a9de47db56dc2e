# SPDX-License-Identifier: Apache-2.0
"""Where the seat rules run."""

from __future__ import annotations

import pytest

from lotusguard.rules.room_seats import RoomSeats
from tests.redis.rooms import ComparedSeats
from tests.rules import seat_rooms


@pytest.fixture(params=[RoomSeats, ComparedSeats], ids=["memory", "valkey"])
def rules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that uses this runs twice: with the rules in memory, and with these and the Lua rules side by side."""
    monkeypatch.setattr(seat_rooms, "make", request.param)
