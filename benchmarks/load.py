# SPDX-License-Identifier: Apache-2.0
"""Callers: token requests over kept-alive or fresh connections, timed one by one, in their own process.

``python -m benchmarks.load`` reads one `Load` at a time as a JSON line from standard input, and answers with a
line with its `Outcome`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, cycle
from typing import Any

from attrs import asdict, define

from benchmarks.prepared_answers import DEVICE, NEW_USERS, SERVER_NAME, USERS_A_ROOM, stranger_id, user_id

PATIENCE = 90.0
"""Seconds after which all callers give up."""


@define
class Load:
    """What callers do.

    :ivar callers: how many ask at the same time. :ivar requests: how many requests they make altogether.
    :ivar rate: requests per second over all callers, sent whether or not answers came; 0 is as fast as answered.
    :ivar fresh: a connection for each request, as nginx does by default.
    :ivar room: the room IDs' part before their number. :ivar rooms: how many rooms, ``first`` the first's number.
    :ivar strangers: 0 for users who ask again and again; else each request is of a user who was never seen, and this is
        the first one's number.
    """

    port: int
    callers: int
    requests: int
    rate: float = 0.0
    fresh: bool = False
    room: str = "!room"
    first: int = 0
    rooms: int = 50
    strangers: int = 0

    def __iter__(self) -> Iterator[bytes]:
        """The requests: every room's users in turn and over and over, or users who were never seen, room by room."""
        if self.strangers:
            return (
                _request(f"{self.room}{number % self.rooms}:{SERVER_NAME}", stranger_id(number, number % self.rooms))
                for number in count(self.strangers)
            )
        return cycle(
            [
                _request(f"{self.room}{number}:{SERVER_NAME}", user_id(number * USERS_A_ROOM + NEW_USERS + user))
                for user in range(USERS_A_ROOM)
                for number in range(self.first, self.first + self.rooms)
            ]
        )


@define
class Outcome:
    """The result; times are in seconds."""

    latencies: list[float]
    statuses: dict[str, int]
    seconds: float
    sample: str


def _request(room: str, user: str) -> bytes:
    openid = {"access_token": user, "token_type": "Bearer", "matrix_server_name": SERVER_NAME, "expires_in": 3600}
    body = json.dumps({"room": room, "openid_token": openid, "device_id": DEVICE}).encode()
    head = (
        "POST /sfu/get HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nOrigin: https://call.bench\r\n"
        "Accept: */*\r\nAccept-Encoding: gzip, deflate, br\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n"
        f"Referer: https://call.bench/\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Caller(asyncio.Protocol):
    """One connection that asks, waits for the whole answer, and asks again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.buffer = b""
        self.began = time.perf_counter()  # a first answer's time includes the connecting
        self.transport: Any = None
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        request = self.run.next_request()
        if request is None:
            self.end()
        else:
            self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        lower = self.buffer[:end].lower()
        length = int(lower.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        body = self.buffer[end + 4 :]
        if len(body) < length:
            return
        self.run.answered(time.perf_counter() - self.began, self.buffer[9:12].decode(), body)
        self.buffer = b""
        if self.run.load.fresh and self.run.left > 0:
            self.ended = True
            self.transport.close()
            self.run.again()
            return
        self.began = time.perf_counter()
        self.ask()

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.transport.close()
            self.run.caller_left()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended:
            self.ended = True
            self.run.failed("cut")


class Run:
    """One load from its first request to its last answer."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.requests = iter(load)
        self.left = load.requests
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.sample = b""
        self.callers = load.callers
        self.calling: set[asyncio.Future[None]] = set()
        self.done: asyncio.Event = asyncio.Event()

    def next_request(self) -> bytes | None:
        if self.left <= 0:
            return None
        self.left -= 1
        return next(self.requests)

    def answered(self, seconds: float, status: str, body: bytes) -> None:
        self.latencies.append(seconds)
        self.statuses[status] += 1
        self.sample = body

    def failed(self, how: str) -> None:
        self.statuses[how] += 1
        self.caller_left()

    def caller_left(self) -> None:
        self.callers -= 1
        if self.callers <= 0:
            self.done.set()

    async def outcome(self) -> Outcome:
        began = time.perf_counter()
        if self.load.rate:
            await self._paced()
        else:
            await asyncio.gather(*(self._call() for _ in range(self.load.callers)))
            try:
                await asyncio.wait_for(self.done.wait(), PATIENCE)
            except TimeoutError:
                self.statuses["unanswered"] += self.callers
        return Outcome(self.latencies, dict(self.statuses), time.perf_counter() - began, self.sample.decode())

    def again(self) -> None:
        """The next request of a caller that opens a new connection each time."""
        calling = asyncio.ensure_future(self._call())
        self.calling.add(calling)
        calling.add_done_callback(self.calling.discard)

    async def _call(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Caller(self), "127.0.0.1", self.load.port)
        except OSError as error:
            self.failed(type(error).__name__)

    async def _paced(self) -> None:
        """Each caller makes one request at its moment; the callers' connections are kept for the next."""
        idle: list[_Paced] = []
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.callers = self.load.requests
        for number in range(self.load.requests):
            await asyncio.sleep(max(0.0, began + number / self.load.rate - loop.time()))
            if idle:
                caller = idle.pop()
                caller.began = time.perf_counter()
                caller.ask()
            else:
                await loop.create_connection(lambda: _Paced(self, idle), "127.0.0.1", self.load.port)
        await asyncio.wait_for(self.done.wait(), PATIENCE)
        for caller in idle:
            caller.ended = True
            caller.transport.close()


class _Paced(Caller):
    """A caller that waits for its next turn."""

    def __init__(self, run: Run, idle: list[_Paced]) -> None:
        super().__init__(run)
        self.idle = idle
        self.asked = False

    def ask(self) -> None:
        if self.asked:
            self.asked = False
            self.idle.append(self)
            self.run.caller_left()
        else:
            self.asked = True
            super().ask()


async def serve() -> None:
    commands = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print("{}", flush=True)  # noqa: T201
    while line := await commands.readline():
        outcome = await Run(Load(**json.loads(line))).outcome()
        print(json.dumps(asdict(outcome)), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(serve())
