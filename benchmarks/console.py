# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.console``: what an open console costs the guard with 300 live calls. Takes three minutes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from attrs import define
from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN
from lotusguard.sandbox.livekit.participant import Participant
from tests.calls import ALICE, BOB, CAROL, room_of
from tests.guardprocess import ProcessSandbox
from tests.raw_http import connect

ROOMS = 300
SECONDS = 60.0
"""Of each measurement."""
JOIN_EVERY = 1.0
TICK = os.sysconf("SC_CLK_TCK")


@define
class Figures:
    """:ivar cpu: of the guard, in percent of a core. :ivar received: bytes that the console was sent."""

    cpu: float
    received: int = 0


async def main(reactor: Any) -> None:
    sandbox = ProcessSandbox(reactor)
    await sandbox.start()
    try:
        rooms = [room_of(sandbox, 4) for _ in range(ROOMS)]
        for room_id in rooms:
            await sandbox.enter(ALICE, room_id)
            await sandbox.enter(BOB, room_id)
        await task.deferLater(reactor, 30.0)  # its first rounds are over
        without = await measured(reactor, sandbox, rooms, cookie="")
        cookie = await sign_in(sandbox)
        shown = await measured(reactor, sandbox, rooms, cookie)
        sys.stdout.write(
            f"{ROOMS} calls of two, a join every {JOIN_EVERY:g} s: the guard uses {without.cpu:.1f} % of a core; "
            f"with an open console {shown.cpu:.1f} %, so {shown.cpu - without.cpu:.1f} % more; "
            f"{shown.received / SECONDS / 1000:.0f} kB/s\n"
        )
    finally:
        await sandbox.stop()


async def sign_in(sandbox: ProcessSandbox) -> str:
    """:return: the session's cookie."""
    form = urlencode({"token": ADMIN_TOKEN}).encode()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = await sandbox.request("POST", f"{sandbox.admin_url}/console/sign-in", form, headers)
    (cookie,) = answer.headers.getRawHeaders("set-cookie") or []
    return cookie.partition(";")[0]


async def measured(reactor: IReactorTime, sandbox: ProcessSandbox, rooms: list[str], cookie: str) -> Figures:
    """What the guard uses while people join and leave. :param cookie: of the open console; "" for none."""
    wire = None
    if cookie:
        wire = await connect(sandbox.admin_url)
        wire.send(f"GET /console/events HTTP/1.1\r\nHost: x\r\nCookie: {cookie}\r\n\r\n".encode())
        await task.deferLater(reactor, 10.0)  # names of rooms have been read
    received = len(wire.received) if wire is not None else 0
    before, began, number = cpu(sandbox), reactor.seconds(), 0
    while reactor.seconds() - began < SECONDS:
        joined: Participant = await sandbox.enter(CAROL, rooms[number % ROOMS])
        await task.deferLater(reactor, JOIN_EVERY)
        sandbox.livekit.disconnect(joined.room.name, joined.identity)
        number += 1
    share = (cpu(sandbox) - before) / (reactor.seconds() - began)
    figures = Figures(100 * share, len(wire.received) - received if wire is not None else 0)
    if wire is not None:
        wire.drop()
    return figures


def cpu(sandbox: ProcessSandbox) -> float:
    """Seconds of processor time that the guard has used."""
    assert sandbox.process.transport is not None
    fields = Path(f"/proc/{sandbox.process.transport.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


if __name__ == "__main__":
    task.react(lambda reactor: Deferred.fromCoroutine(main(reactor)))
