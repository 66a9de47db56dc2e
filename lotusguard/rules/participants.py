# SPDX-License-Identifier: Apache-2.0
"""How a ``ParticipantInfo`` is read, from a listing or from a webhook."""

from __future__ import annotations

from collections.abc import Mapping

from livekit.protocol.models import DisconnectReason, ParticipantInfo

_NO_SEAT = (ParticipantInfo.Kind.EGRESS, ParticipantInfo.Kind.AGENT)


def takes_seat(participant: ParticipantInfo) -> bool:
    """Whether a participant is an occupant: everybody but recorders and agents, as soon as they are joining."""
    return participant.kind not in _NO_SEAT and participant.state != ParticipantInfo.State.DISCONNECTED


def joined_at(participant: ParticipantInfo) -> float | None:
    """The latest time at which a participant can have joined, in seconds since the epoch by LiveKit's clock.

    LiveKit gives milliseconds; older releases give whole seconds.

    :return: ``None`` if LiveKit does not say.
    """
    if participant.joined_at_ms > 0:
        return participant.joined_at_ms / 1000
    if participant.joined_at > 0:
        return participant.joined_at + 1.0
    return None


ENDED_BY_CHOICE: Mapping[str, bool] = {
    "UNKNOWN_REASON": False,
    "CLIENT_INITIATED": True,
    "DUPLICATE_IDENTITY": False,
    "SERVER_SHUTDOWN": False,
    "PARTICIPANT_REMOVED": True,
    "ROOM_DELETED": True,
    "STATE_MISMATCH": False,
    "JOIN_FAILURE": False,
    "MIGRATION": False,
    "SIGNAL_CLOSE": False,
    "ROOM_CLOSED": False,
    "USER_UNAVAILABLE": False,
    "USER_REJECTED": False,
    "SIP_TRUNK_FAILURE": False,
    "CONNECTION_TIMEOUT": False,
    "MEDIA_FAILURE": False,
    "AGENT_ERROR": False,
}
"""For each reason of LiveKit: did the participant, or a moderator, end the session?"""


def ended_by_choice(reason: int) -> bool:
    """Whether the participant or a moderator ended the session. After any other departure they may come right back.

    :param reason: a ``DisconnectReason``. An unknown reason does not count as the client's choice.
    """
    if reason not in DisconnectReason.values():
        return False
    return ENDED_BY_CHOICE.get(DisconnectReason.Name(reason), False)
