# SPDX-License-Identifier: Apache-2.0
"""What operators read says nothing odd: no "None", no "-0 s ago", and every time is in seconds and named so."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.logger import globalLogPublisher

from lotusguard.check.everything import check
from lotusguard.config import read_settings
from lotusguard.guard.joins.decision_store import Record, RecordKind
from lotusguard.history.telling import tell
from lotusguard.logs import observer_for
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.faults import Fault
from lotusguard.terminal import Terminal
from tests.calls import ALICE, BOB, CAROL, room_of
from tests.conftest import StartSandbox

ODD = re.compile(r"\bNone\b|(?<![\w.:-])-0(?:\.0+)?(?![\w.:-])|\bnan\b|\binf\b|<[a-z_.]+ object at|Undefined")
PAGES = ("/readyz", "/rooms", "/decisions", "/lobby")


@pytest.mark.parametrize("odd", ["for None", "-0 s ago", "-0.0 s", '"skew": -0.0}', "nan", "inf s"])
def test_odd_texts_are_recognised(odd: str) -> None:
    assert ODD.search(odd)


@pytest.mark.parametrize("fine", ["0 s ago", "2026-07-04", "room-0", "null", "infinite", "-0.5 s", "Nonesuch"])
def test_ordinary_texts_are_not_taken_for_odd_ones(fine: str) -> None:
    assert not ODD.search(fine)


async def some_joins(sandbox: Sandbox) -> None:
    """Joins of every kind: allowed, refused, unnamed, unreadable, and with dependencies that fail."""
    room = room_of(sandbox, 1)
    await sandbox.ask_token(ALICE, room)
    await sandbox.ask_token(BOB, room)
    token_route = f"{sandbox.url}/sfu/get"
    for body in (b"{}", b"[1]", b"not json", b'{"room": "!a:b"}', b'{"room": null, "openid_token": null}'):
        await sandbox.request("POST", token_route, body, {"Content-Type": "application/json"})
    sandbox.homeserver.faults["state"] = Fault.status(500)
    await sandbox.ask_token(CAROL, room_of(sandbox))
    sandbox.upstream.faults["sfu_get"] = Fault.status(500)
    await sandbox.ask_token(ALICE, room)


async def report_of(sandbox: Sandbox, ahead: float) -> str:
    """What ``lotusguard check`` prints while our clock is ahead of the services'."""
    given = {name: getattr(sandbox.settings, name) for name in sandbox.settings.model_fields_set}
    for name, listener in (("guard_bind_port", sandbox.guard.public), ("guard_admin_port", sandbox.guard.admin)):
        assert listener is not None
        assert listener.port is not None
        given[name] = listener.port.getHost().port  # type: ignore[attr-defined]
    report = await check(read_settings(**given), reactor, patience=2.0, now=lambda: time.time() + ahead)
    text = io.StringIO()
    report.tell(Terminal(text, {}))
    return text.getvalue() + json.dumps(report.as_json())


@pytest_twisted.ensureDeferred
async def test_neither_logs_nor_reports_say_anything_odd(start_sandbox: StartSandbox) -> None:
    log = io.StringIO()
    observers = [observer_for(format_, "debug", log) for format_ in ("text", "json")]
    for observer in observers:
        globalLogPublisher.addObserver(observer)
    try:
        sandbox = await start_sandbox(guard_reconcile_interval=0.2)
        texts = {"before any join": await report_of(sandbox, 0.0)}
        for page in PAGES:
            texts[f"{page} of a new guard"] = (await sandbox.operator("GET", page)).body.decode()
        await some_joins(sandbox)
        texts["check, clock ahead"] = await report_of(sandbox, 0.4)
        texts["check, clock behind"] = await report_of(sandbox, -0.4)
        for page in PAGES:
            texts[page] = (await sandbox.operator("GET", page)).body.decode()
    finally:
        for observer in observers:
            globalLogPublisher.removeObserver(observer)
    texts |= {f"log line {number}": line for number, line in enumerate(log.getvalue().splitlines())}
    assert len(texts) > 30
    assert [(where, text) for where, text in texts.items() if ODD.search(text)] == []


def test_a_decision_that_lacks_everything_is_told_without_gaps() -> None:
    text = io.StringIO()
    nameless = Record(0.0, RecordKind.JOIN, "", "", "failed", "upstream_timeout")
    tell([nameless, Record(0.0, RecordKind.REMOVAL, "", "", "removed", "full")], Terminal(text, {}), "")
    assert not ODD.search(text.getvalue())
    assert "an unnamed user in an unnamed room" in text.getvalue()
    assert "an unnamed user from the call of an unnamed room" in text.getvalue()


# -- times ---------------------------------------------------------------------------------------------------


def keys_of(value: Any) -> Iterator[str]:
    """Every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


@pytest_twisted.ensureDeferred
async def test_every_time_that_operators_read_is_in_seconds(start_sandbox: StartSandbox) -> None:
    log = io.StringIO()
    observer = observer_for("json", "debug", log)
    globalLogPublisher.addObserver(observer)
    try:
        sandbox = await start_sandbox(guard_reconcile_interval=0.2)
        await some_joins(sandbox)
        pages = [json.loads((await sandbox.operator("GET", page)).body) for page in PAGES]
    finally:
        globalLogPublisher.removeObserver(observer)
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    joins = [event for event in events if event["event"] == "join"]
    assert joins
    for join in joins:
        assert sum(seconds for name, seconds in join["stages"].items() if name != "total") <= join["seconds"] + 0.01
        assert f", {join['seconds']:.3f} s [" in join["message"]
    found = {key for value in (*pages, *events) for key in keys_of(value)}
    assert not {key for key in found if re.search(r"milli|(^|_)ms$", key)}
