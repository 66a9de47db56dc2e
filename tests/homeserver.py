# SPDX-License-Identifier: Apache-2.0
"""A real homeserver for the tests, whatever its make: one process on loopback, and what its users do."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import os
import random
import secrets
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import treq
from attrs import field, frozen
from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.web.client import Agent, FileBodyProducer
from twisted.web.http_headers import Headers

from lotusguard.clients.json_answers import parse_json

SERVER_NAME = "real.test"
START_WITHIN = 60.0
STOP_WITHIN = 10.0
CLIENT = "/_matrix/client/v3"


@frozen
class User:
    """:ivar token: the access token."""

    user_id: str
    token: str = field(repr=False)


class Failed(Exception):
    """The homeserver refused something that a test needs."""


class Homeserver:
    """One homeserver process.

    :param directory: an empty directory.
    """

    ready_path = "/_matrix/client/versions"
    """Answers 200 when it serves."""

    def __init__(self, directory: Path) -> None:
        self.server_name = SERVER_NAME
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.directory = directory
        self.shared_secret = secrets.token_hex(16)
        self._log = directory / "homeserver.log"
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._agent: Any = None
        self._users: dict[str, User] = {}

    # -- the process -------------------------------------------------------------------------------------

    def configure(self) -> Sequence[str]:
        """Write its configuration into the directory. :return: the command that starts it."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Its environment: ours, without the tests' warning filters."""
        return {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}

    def start(self) -> None:
        """Start it and wait until it serves."""
        command = self.configure()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.directory, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_serves(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_WITHIN
        while not self._serves():
            if self._process.poll() is not None or time.monotonic() > end:
                raise Failed(f"the homeserver did not start:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{self.ready_path}", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """Stop the process that `start` started."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    async def stopped(self) -> None:
        """`stop`, while the reactor goes on."""
        await deferToThread(self.stop)

    async def started(self) -> None:
        """`start`, while the reactor goes on."""
        await deferToThread(self.start)

    def log(self) -> str:
        """Its log so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    # -- what its users do -------------------------------------------------------------------------------

    async def ask(self, method: str, path: str, token: str = "", content: object = None) -> tuple[int, Any]:
        """Make one request. :return: the status and the JSON of the answer."""
        body = None if content is None else json.dumps(content).encode()
        code, answered = await self._exchange(method, path, token, body)
        return code, parse_json(answered)

    async def send_bytes(self, method: str, path: str, token: str, body: bytes) -> int:
        """Make one request with any body. :return: the status."""
        return (await self._exchange(method, path, token, body))[0]

    async def _exchange(self, method: str, path: str, token: str, body: bytes | None) -> tuple[int, bytes]:
        if self._agent is None:
            self._agent = Agent(reactor, connectTimeout=5)
        headers = Headers({"Authorization": [f"Bearer {token}"]} if token else {})
        producer = None if body is None else FileBodyProducer(BytesIO(body))
        answer = await self._agent.request(method.encode(), f"{self.url}{path}".encode(), headers, producer)
        return answer.code, await treq.content(answer)

    async def done(self, method: str, path: str, token: str = "", content: object = None) -> Any:
        """Make one request that must succeed. :return: the JSON of the answer."""
        code, answered = await self.ask(method, path, token, content)
        if code != 200:
            raise Failed(f"{method} {path}: {code} {answered}")
        return answered

    async def register(self, name: str, *, admin: bool = False) -> User:
        """A new user, registered by the shared secret; a number is appended to the name.

        :param admin: of the homeserver.
        """
        path = "/_synapse/admin/v1/register"
        nonce = (await self.done("GET", path))["nonce"]
        username, password = f"{name}{next(self._numbers)}", secrets.token_hex(8)
        signed = "\0".join([nonce, username, password, "admin" if admin else "notadmin"])
        mac = hmac.new(self.shared_secret.encode(), signed.encode(), hashlib.sha1).hexdigest()
        content = {"nonce": nonce, "username": username, "password": password, "admin": admin, "mac": mac}
        registered = await self.done("POST", path, content=content)
        return User(registered["user_id"], registered["access_token"])

    async def user(self, name: str, *, admin: bool = False) -> User:
        """The user of that name, registered at the first call."""
        if name not in self._users:
            self._users[name] = await self.register(name, admin=admin)
        return self._users[name]

    async def create_room(self, creator: User, **how: object) -> str:
        """:param how: keys of the request. :return: the room ID."""
        room_id: str = (await self.done("POST", f"{CLIENT}/createRoom", creator.token, how))["room_id"]
        return room_id

    async def room_of(self, creator: User, *members: User, **how: object) -> str:
        """A room that these users have joined. :param how: keys of the request. :return: the room ID."""
        room_id = await self.create_room(creator, preset="public_chat", **how)
        for member in members:
            await self.change_membership(member, room_id, "join")
        return room_id

    async def upgrade(self, by: User, room_id: str, version: str) -> str:
        """Upgrade a room. :return: the ID of the new one."""
        new: str = (await self.done("POST", f"{_room(room_id)}/upgrade", by.token, {"new_version": version}))[
            "replacement_room"
        ]
        return new

    async def state(self, by: User, room_id: str, kind: str) -> dict[str, Any]:
        """The content of the state event with the empty key."""
        found: dict[str, Any] = await self.done("GET", f"{_room(room_id)}/state/{kind}", by.token)
        return found

    async def set_state(self, by: User, room_id: str, kind: str, content: dict[str, Any]) -> str:
        """Put a state event with the empty key, as a client does. :return: the event ID."""
        event_id: str = (await self.done("PUT", f"{_room(room_id)}/state/{kind}", by.token, content))["event_id"]
        return event_id

    async def set_level(self, by: User, room_id: str, of: User, level: int) -> None:
        """Give a user a power level."""
        levels = await self.state(by, room_id, "m.room.power_levels")
        users = {**levels.get("users", {}), of.user_id: level}
        await self.set_state(by, room_id, "m.room.power_levels", {**levels, "users": users})

    async def send(self, by: User, room_id: str, kind: str, content: dict[str, Any]) -> str:
        """Send an event that is not state. :return: the event ID."""
        path = f"{_room(room_id)}/send/{kind}/{secrets.token_hex(8)}"
        event_id: str = (await self.done("PUT", path, by.token, content))["event_id"]
        return event_id

    async def say(self, by: User, room_id: str, text: str) -> str:
        """Write a message. :return: the event ID."""
        return await self.send(by, room_id, "m.room.message", {"msgtype": "m.text", "body": text})

    async def react(self, by: User, room_id: str, event_id: str, key: str) -> str:
        """React to an event. :return: the ID of the reaction."""
        relation = {"rel_type": "m.annotation", "event_id": event_id, "key": key}
        return await self.send(by, room_id, "m.reaction", {"m.relates_to": relation})

    async def notices(self, by: User, room_id: str, sender: User) -> list[dict[str, Any]]:
        """The notices of a user in the last 100 events of a room, oldest first."""
        page = await self.done("GET", f"{_room(room_id)}/messages?dir=b&limit=100", by.token)
        return [
            event
            for event in reversed(page["chunk"])
            if event["sender"] == sender.user_id and event["content"].get("msgtype") == "m.notice"
        ]

    async def change_membership(self, by: User, room_id: str, action: str, of: User | None = None) -> None:
        """:param action: ``join``, ``leave``, ``invite``, ``kick``, ``ban``, ``unban`` or ``knock``."""
        room = quote(room_id, safe="")
        path = f"{CLIENT}/knock/{room}" if action == "knock" else f"{CLIENT}/rooms/{room}/{action}"
        await self.done("POST", path, by.token, {"user_id": of.user_id} if of is not None else {})

    async def redact(self, by: User, room_id: str, event_id: str) -> None:
        path = f"{_room(room_id)}/redact/{quote(event_id, safe='')}/{secrets.token_hex(4)}"
        await self.done("PUT", path, by.token, {})

    async def saw(self, user: User, what: str = "", since: str = "") -> str:
        """Wait until /sync shows something to a user.

        :param what: an event's ID or type. :return: the token for the next /sync.
        """
        while True:
            query = f"?since={since}&timeout=30000" if since else ""
            new = await self.done("GET", f"{CLIENT}/sync{query}", user.token)
            since = new["next_batch"]
            if what in json.dumps(new):
                return since

    async def openid_token(self, user: User) -> dict[str, Any]:
        path = f"{CLIENT}/user/{quote(user.user_id, safe='')}/openid/request_token"
        openid: dict[str, Any] = await self.done("POST", path, user.token, {})
        return openid


def free_port() -> int:
    """A free port of loopback, outside the range of outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _room(room_id: str) -> str:
    return f"{CLIENT}/rooms/{quote(room_id, safe='')}"
