# SPDX-License-Identifier: Apache-2.0
"""What becomes of people in lobbies: one line in the log and one count each."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define
from twisted.logger import Logger

from lotusguard.metrics import Metrics
from lotusguard.rules.lobby import LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import Change

log = Logger()

_DECISIONS: Mapping[LobbyEvent, str] = {
    LobbyEvent.ADMIT: "admitted",
    LobbyEvent.DENY: "denied",
    LobbyEvent.REMOVE: "removed",
    LobbyEvent.TIME_OUT: "timed_out",
}
_ENDS: Mapping[LobbyEvent, str] = {LobbyEvent.SWITCH_OFF: "switched_off", LobbyEvent.LET_IN: "needs_no_decision"}
"""How waiting ends without a decision; in any other way the user has left."""


@define(eq=False)
class LobbyLog:
    """Logs and counts changes of lobby entries."""

    _metrics: Metrics

    def tell(self, change: Change, by: str) -> None:
        """An entry has changed. :param by: who decided, if somebody did."""
        user, room_id = change.entry.user, change.room_id
        if change.event is LobbyEvent.ASK:
            log.info("{user} waits in the lobby of {room_id}", user=user, room_id=room_id, event_name="lobby_waiting")
            return
        decision = _DECISIONS.get(change.event) if change.event is not None else None
        if decision is None and change.before is LobbyState.WAITING:
            decision = _ENDS.get(change.event, "left") if change.event is not None else None
        if decision is None:
            return
        self._metrics.lobby_decisions.labels(decision).inc()
        match decision:
            case "admitted":
                log.info(
                    "{by} admitted {user} to the call of {room_id}",
                    by=by, user=user, room_id=room_id, event_name="lobby_admitted",
                )  # fmt: skip
            case "denied":
                log.info(
                    "{by} denied {user} entry to the call of {room_id}",
                    by=by, user=user, room_id=room_id, event_name="lobby_denied",
                )  # fmt: skip
            case "removed":
                log.info(
                    "{by} removed {user} from the call of {room_id}; they are refused for ten minutes",
                    by=by, user=user, room_id=room_id, event_name="lobby_removed",
                )  # fmt: skip
            case "timed_out":
                log.info(
                    "nobody admitted {user} to the call of {room_id} in time",
                    user=user, room_id=room_id, event_name="lobby_timed_out",
                )  # fmt: skip
            case _:
                log.info(
                    "{user} stopped waiting in the lobby of {room_id}: {reason}",
                    user=user, room_id=room_id, reason=decision, event_name="lobby_left",
                )  # fmt: skip
