# SPDX-License-Identifier: Apache-2.0
"""The callers of a stampede: each asks a guard for a token, over a connection that is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from attrs import define, field

from benchmarks.prepared_answers import DEVICE, SERVER_NAME

PATIENCE = 120.0


@define
class Answered:
    """:ivar code: 0 if the connection was lost."""

    code: int
    token: str = ""


@define(eq=False)
class Caller:
    """One kept connection to each guard that it asks."""

    _connections: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(init=False, factory=dict)

    async def ask(self, port: int, room: str, user: str) -> Answered:
        openid = {"access_token": user, "token_type": "Bearer", "matrix_server_name": SERVER_NAME, "expires_in": 3600}
        body = json.dumps({"room": room, "openid_token": openid, "device_id": DEVICE}).encode()
        code, answer = await self.post(port, "/sfu/get", body, {"Content-Type": "application/json"})
        return Answered(code, json.loads(answer)["jwt"] if code == 200 else "")

    async def post(self, port: int, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """:return: the status, 0 if the connection is lost, and the body."""
        for kept in (port in self._connections, False):
            try:
                async with asyncio.timeout(PATIENCE):
                    return await self._post(port, path, body, headers)
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                self._drop(port)
                if not kept:  # else the guard may have closed it as unused
                    break
        return 0, b""

    async def _post(self, port: int, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if port not in self._connections:
            self._connections[port] = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = self._connections[port]
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {path} HTTP/1.1\r\nHost: stampede\r\n{lines}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        content = await reader.readexactly(length)
        if b"\r\nconnection: close" in answer:
            self._drop(port)
        return int(answer[9:12]), content

    def _drop(self, port: int) -> None:
        connection = self._connections.pop(port, None)
        if connection is not None:
            connection[1].close()

    def close(self) -> None:
        for port in list(self._connections):
            self._drop(port)


async def in_turns(callers: Sequence[Caller], joins: Sequence[Any], join: Any) -> list[Any]:
    """Let each join be made by the next caller who has nothing to do. :return: the outcomes."""
    waiting, outcomes = iter(joins), []

    async def work(caller: Caller) -> None:
        for what in waiting:
            outcomes.append(await join(caller, what))

    await asyncio.gather(*(work(caller) for caller in callers))
    return outcomes
