# SPDX-License-Identifier: Apache-2.0
"""Where the commands read decisions: from the running guard, or from its JSON log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from lotusguard.check.asking import Service, json_of
from lotusguard.guard.joins.decision_store import Question, Record, RecordKind

TOKEN = (
    "set GUARD_ADMIN_TOKEN (and GUARD_ADMIN_HOST, GUARD_ADMIN_PORT) as the guard has them; --env-file reads its file"
)
_KINDS = {"join": RecordKind.JOIN, "removed": RecordKind.REMOVAL}
"""The log's events that are decisions."""


class NotKnown(Exception):
    """The source does not tell. The text says why and what to do."""


async def from_guard(operators: Service, token: str, question: Question) -> list[Record]:
    """Ask the running guard. :raises NotKnown: :raises NoAnswer:"""
    asked = {
        "since": repr(question.since), "until": repr(question.until), "user": question.user, "room": question.room_id,
        "kind": question.kind.value if question.kind is not None else "",
    }  # fmt: skip
    target = "/decisions?" + urlencode({name: value for name, value in asked.items() if value}, errors="replace")
    answer = await operators.ask("GET", target, headers={"Authorization": f"Bearer {token}"})
    if answer.code in (401, 403):
        raise NotKnown(f"the guard at {operators.base} does not accept the operators' token: {TOKEN}")
    found = json_of(answer).get("decisions")
    if answer.code != 200 or not isinstance(found, list):
        raise NotKnown(f"{operators.base} answers {answer.code}, not as a guard of this version")
    return [record for one in found if (record := _record(one)) is not None]


def from_journal(lines: Iterable[str], question: Question) -> list[Record]:
    """Read JSON lines of the guard's log (``journalctl -o cat`` or ``-o json``).

    :raises NotKnown: none of the lines is JSON of ours.
    """
    found, seen = [], 0
    for event in _events(lines):
        seen += 1
        kind = _KINDS.get(str(event.get("event")))
        if kind is None:
            continue
        try:
            at = datetime.fromisoformat(str(event.get("time"))).timestamp()
        except ValueError:
            continue
        verdict = "removed" if kind is RecordKind.REMOVAL else event.get("verdict")
        record = _record(event | {"at": at, "kind": kind.value, "verdict": verdict})
        if record is not None and question.wants(record):
            found.append(record)
    if not seen:
        raise NotKnown("no line of the log is JSON: the guard writes such lines with GUARD_LOG_FORMAT=json")
    return found[-question.limit :]


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        event = _object(line)
        if event is not None and "event" not in event and isinstance(event.get("MESSAGE"), str):
            event = _object(event["MESSAGE"])  # a line of `journalctl -o json`
        if event is not None and "event" in event:
            yield event


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _record(given: dict[str, Any]) -> Record | None:
    """A decision as the guard or its log writes it; ``None`` for one that lacks something."""
    try:
        return Record(
            at=float(given["at"]), kind=RecordKind(given["kind"]), user=str(given.get("user") or ""),
            room_id=str(given.get("room_id") or ""), verdict=str(given["verdict"]), reason=str(given["reason"]),
            seats=str(given.get("seats") or ""), holders=_texts(given.get("holders")),
            unenforced=_texts(given.get("unenforced")), route=str(given.get("route") or ""),
            request_id=str(given.get("request_id") or ""),
        )  # fmt: skip
    except (KeyError, ValueError, TypeError):
        return None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()
