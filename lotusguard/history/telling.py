# SPDX-License-Identifier: Apache-2.0
"""Decisions in words that answer "why was I not let in?"."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from lotusguard.guard.joins.decision_store import Record, RecordKind
from lotusguard.rules.refusals import Refusal
from lotusguard.terminal import Terminal

REFUSED = {
    Refusal.FULL: "All seats of the room were taken. The room's io.lotus.voice_limit, or GUARD_DEFAULT_MAX_USERS, "
    "sets their number.",
    Refusal.NOT_A_MEMBER: "They were not joined to the Matrix room (GUARD_MEMBERS_ONLY).",
    Refusal.HOMESERVER_NOT_ALLOWED: "Users of their homeserver may not join calls here (GUARD_HOMESERVERS).",
    Refusal.JOIN_LEVEL: "Their power level is below `join` of the room's io.lotus.call_permissions.",
    Refusal.NOT_STARTED: "Nobody was in the call, and they may not start one (`start` of io.lotus.call_permissions, or "
    "GUARD_START_HOMESERVERS).",
    Refusal.REMOVED: "A moderator had removed them from the call less than ten minutes before.",
    Refusal.NOT_ADMITTED: "A moderator denied them entry from the lobby.",
    Refusal.NOBODY_ADMITTED: "They waited in the lobby, and nobody admitted them in time (GUARD_LOBBY_WAIT).",
    Refusal.TOO_MANY_SLOTS: "The room had too many calls at once (different slot IDs).",
    Refusal.TOO_MANY_LOOKUPS: "They asked for tokens of too many rooms at once.",
    Refusal.LOBBY_FULL: "Too many people were waiting in the lobby.",
    Refusal.SEAT_PENDING: "The last seat was being given to somebody else, and that took too long. They may try again.",
}
OTHER = {
    "internal_error": "The guard's own code failed; the join went on without what failed. The log has a traceback: "
    "please report it.",
    "caller_disconnected": "The client closed the connection before there was an answer.",
    "no_policy": "The room has no policy.",
    "policy": "The room's policy allowed it.",
    "stale_policy": "The last known policy allowed it; the homeserver did not tell the current one in time.",
    "other_sfu": "The token is for another SFU; the guard passed it on unchanged.",
    "upstream_timeout": "lk-jwt-service did not answer in time.",
    "upstream_unreachable": "lk-jwt-service could not be reached.",
    "upstream_status_401": "lk-jwt-service could not verify the user's OpenID token.",
}


def explained(record: Record) -> str:
    """One or two sentences on why."""
    reasons = {refusal.value: text for refusal, text in REFUSED.items()} | OTHER
    text = reasons.get(record.reason)
    if text is None and record.reason.startswith("upstream_status_"):
        text = f"lk-jwt-service answered {record.reason.removeprefix('upstream_status_')}: see its log."
    return text or f"Reason: {record.reason}."


def tell(records: Sequence[Record], terminal: Terminal, nothing: str) -> None:
    """Write the records, oldest first. :param nothing: what to say if there are none."""
    if not records:
        terminal.line(nothing)
        return
    for record in records:
        at = datetime.fromtimestamp(record.at).astimezone()
        colour = {"refused": "yellow", "removed": "yellow", "error": "red", "failed": "red"}.get(
            record.verdict, "green"
        )
        what = terminal.paint(record.verdict.replace("_", " "), colour, "bold")
        where = "from the call of" if record.kind is RecordKind.REMOVAL else "in"
        who = _plain(record.user) or "an unnamed user"
        terminal.line(f"{at:%Y-%m-%d %H:%M:%S}  {what}  {who} {where} {_plain(record.room_id) or 'an unnamed room'}")
        for line in _details(record):
            terminal.line(f"    {line}")


def _details(record: Record) -> list[str]:
    details = [explained(record)]
    if record.seats:
        details.append(_plain(record.seats))
    if record.holders:
        details.append("seats: " + _plain(", ".join(record.holders)))
    if record.unenforced:
        details.append("not enforced: " + _plain(", ".join(record.unenforced)))
    if record.request_id:
        details.append(f"request {_plain(record.request_id)}")
    return details


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
