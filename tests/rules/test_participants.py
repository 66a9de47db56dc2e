# SPDX-License-Identifier: Apache-2.0
"""What a participant's record tells: whether they take a seat, when they joined, why they left."""

from __future__ import annotations

import pytest
from livekit.protocol.models import DisconnectReason, ParticipantInfo

from lotusguard.rules.participants import ENDED_BY_CHOICE, ended_by_choice, joined_at, takes_seat


@pytest.mark.parametrize("state", ["JOINING", "JOINED", "ACTIVE"])
@pytest.mark.parametrize("kind", ParticipantInfo.Kind.keys())
def test_everybody_but_recorders_and_agents_takes_a_seat(kind: str, state: str) -> None:
    participant = ParticipantInfo(kind=kind, state=state)
    assert takes_seat(participant) is (kind not in ("EGRESS", "AGENT"))


def test_disconnected_participant_takes_no_seat() -> None:
    assert not takes_seat(ParticipantInfo(state=ParticipantInfo.State.DISCONNECTED))


def test_time_of_joining_is_exact_where_livekit_gives_milliseconds() -> None:
    assert joined_at(ParticipantInfo(joined_at=1_800_000_001, joined_at_ms=1_800_000_001_250)) == 1_800_000_001.25


def test_time_of_joining_in_whole_seconds_is_the_latest_it_can_mean() -> None:
    assert joined_at(ParticipantInfo(joined_at=1_800_000_001)) == 1_800_000_002


def test_time_of_joining_may_be_unknown() -> None:
    assert joined_at(ParticipantInfo()) is None


def test_only_the_participant_and_moderators_end_a_session_by_choice() -> None:
    chosen = {name for name, reason in DisconnectReason.items() if ended_by_choice(reason)}
    assert chosen == {"CLIENT_INITIATED", "PARTICIPANT_REMOVED", "ROOM_DELETED"}


def test_every_reason_of_the_protocol_is_in_the_table() -> None:
    assert set(DisconnectReason.keys()) <= ENDED_BY_CHOICE.keys()


def test_reason_of_a_later_release_is_no_choice() -> None:
    assert not ended_by_choice(99)
