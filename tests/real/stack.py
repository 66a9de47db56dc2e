# SPDX-License-Identifier: Apache-2.0
"""The real services on loopback and the guard between them: Synapse, lk-jwt-service, livekit-server. Tests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from lotusguard.rules.identity import ROOM_SLOT, room_alias
from lotusguard.rules.tokens import SfuKey
from tests.real.callers import Call, MediaClients
from tests.real.processes import HttpAnswer, Program, http
from tests.real.recorder import Recorder
from tests.real.services import (
    CHECKOUT,
    KEY,
    OPERATORS,
    PUSHED,
    REGISTRATION,
    SECRET,
    UNPUSHED,
    Addresses,
    livekit,
    lk_jwt_service,
    synapse,
)

TWISTD = (sys.executable, "-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", "lotusguard")


def executable(variable: str, name: str) -> str | None:
    """The path of a service's program: the value of the variable, or what is on PATH."""
    given = os.environ.get(variable)
    return given if given and os.access(given, os.X_OK) else None if given else shutil.which(name)


class Stack:
    """All services, each on free ports of loopback.

    Synapse runs the guard's module. It reports to a port where the guard listens only if a test asks for that: other
    tests need a guard that learns of changes in another way.

    :param place: a directory for configurations, databases and output.
    """

    def __init__(self, place: Path, livekit_server: str, lk_jwt_service_path: str) -> None:
        self.place = place
        self.addresses = Addresses()
        self.server_name = self.addresses.server_name
        self.homeserver_url = self.addresses.url("client")
        self.sfu_url = self.addresses.url("sfu")
        self.upstream_url = self.addresses.url("upstream")
        self.guard_url = self.addresses.url("guard")
        self.operators_url = self.addresses.url(UNPUSHED)
        self.recorder = Recorder()
        self.synapse = synapse(place, self.addresses)
        self.sfu = livekit(place, self.addresses, livekit_server, self.recorder.url)
        self.upstream = lk_jwt_service(place, self.addresses, lk_jwt_service_path)
        self.guard: Program | None = None
        self._guard_settings: dict[str, object] | None = None
        self.tokens: dict[str, str] = {}
        """Access tokens by user ID."""
        self._joined: set[tuple[str, str]] = set()
        """Users and rooms that they were made members of."""
        self.clients: MediaClients

    def start(self) -> None:
        """Start all but the guard: each test chooses its settings."""
        for program in (self.synapse, self.sfu, self.upstream):
            program.start(wait=False)
        for program in (self.sfu, self.upstream, self.synapse):
            program.wait_until_ready()
        self.server_admin = self.register("server_admin", admin=True)
        self.moderator = self.register("moderator")
        self.clients = MediaClients(self.place / "clients.log")
        self.delegates = http("OPTIONS", f"{self.upstream_url}/delegate_delayed_leave").status == 200
        """Whether this lk-jwt-service takes delegated leaves: its main branch does, 0.5.0 does not."""

    def stop(self) -> None:
        if hasattr(self, "clients"):
            self.clients.close()
        for program in (self.guard, self.upstream, self.sfu, self.synapse):
            if program is not None:
                program.stop()
        self.recorder.close()

    # -- programs ----------------------------------------------------------------------------------------

    def run_guard(self, *, pushed: bool = False, **settings: object) -> None:
        """Run the guard with these settings (by lower-case name). Its state directory stays from one run to the next.

        :param pushed: the module inside Synapse reports changes to it.
        """
        port = self.addresses.ports[PUSHED if pushed else UNPUSHED]
        settings = {"guard_admin_port": port, **settings}
        if self.guard is not None and self.guard.process is not None and settings == self._guard_settings:
            return
        if self.guard is not None:
            self.guard.stop()
        state = self.place / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        given = {
            "guard_bind_host": "127.0.0.1",
            "guard_bind_port": self.addresses.ports["guard"],
            "guard_upstream": self.upstream_url,
            "livekit_api": self.sfu_url,
            "livekit_key": KEY,
            "livekit_secret": SECRET,
            "synapse_api": self.homeserver_url,
            "matrix_token": self.tokens[self.server_admin],
            "guard_admin_token": OPERATORS,
            "guard_state_dir": state,
            **settings,
        }
        environment = {"PYTHONPATH": str(CHECKOUT), **{name.upper(): str(value) for name, value in given.items()}}
        log = self.place / "guard.log"
        self.guard = Program("lotusguard", TWISTD, environment, log, f"{self.guard_url}/healthz")
        self._guard_settings = settings
        self.operators_url = f"http://127.0.0.1:{port}"
        self.guard.start()

    def kill_guard(self) -> None:
        assert self.guard is not None
        self.guard.stop(signal.SIGKILL)

    # -- what users do ----------------------------------------------------------------------------------

    def matrix(self, method: str, path: str, content: Any = None, *, user: str = "") -> Any:
        """A request to the homeserver that must succeed."""
        answer = http(method, self.homeserver_url + path, content, bearer=self.tokens.get(user, ""))
        assert answer.status == 200, (method, path, answer.status, answer.body)
        return answer.content

    def register(self, name: str, *, admin: bool = False) -> str:
        """A new user; their ID."""
        nonce = self.matrix("GET", "/_synapse/admin/v1/register")["nonce"]
        signed = "\0".join((nonce, name, "password", "admin" if admin else "notadmin"))
        content = {
            "nonce": nonce,
            "username": name,
            "password": "password",
            "admin": admin,
            "mac": hmac.new(REGISTRATION.encode(), signed.encode(), hashlib.sha1).hexdigest(),
        }
        user = self.matrix("POST", "/_synapse/admin/v1/register", content)
        self.tokens[user["user_id"]] = user["access_token"]
        return str(user["user_id"])

    def users(self, *names: str) -> list[str]:
        """New users whose names begin with these."""
        return [self.register(f"{name}-{uuid4().hex[:8]}") for name in names]

    def room(self, max_users: int | None = None, **quality: bool) -> str:
        """A new room, created by the moderator, that everybody may join; with its policy."""
        content = {"preset": "public_chat"}
        created = self.matrix("POST", "/_matrix/client/v3/createRoom", content, user=self.moderator)
        room_id = str(created["room_id"])
        if max_users is not None:
            self.set_state(room_id, "io.lotus.voice_limit", {"max_users": max_users})
        if quality:
            self.set_state(room_id, "io.lotus.room_quality", quality)
        return room_id

    def set_state(self, room_id: str, kind: str, content: dict[str, Any]) -> None:
        self.matrix("PUT", f"/_matrix/client/v3/rooms/{room_id}/state/{kind}", content, user=self.moderator)

    def set_level(self, room_id: str, user: str, level: int) -> None:
        """Give a user a power level."""
        path = f"/_matrix/client/v3/rooms/{room_id}/state/m.room.power_levels"
        levels = self.matrix("GET", path, user=self.moderator)
        levels.setdefault("users", {})[user] = level
        self.set_state(room_id, "m.room.power_levels", levels)

    def join(self, user: str, room_id: str) -> None:
        """Make a user a member of the room, unless this was done before."""
        if user != self.moderator and (user, room_id) not in self._joined:
            self.matrix("POST", f"/_matrix/client/v3/rooms/{room_id}/join", {}, user=user)
            self._joined.add((user, room_id))

    def leave(self, user: str, room_id: str) -> None:
        self.matrix("POST", f"/_matrix/client/v3/rooms/{room_id}/leave", {}, user=user)

    def moderate(self, action: str, user: str, room_id: str) -> None:
        """``ban``, ``unban`` or ``kick`` a user, as the moderator."""
        self.matrix("POST", f"/_matrix/client/v3/rooms/{room_id}/{action}", {"user_id": user}, user=self.moderator)
        if action == "unban":
            self._joined.discard((user, room_id))

    def openid_token(self, user: str) -> dict[str, Any]:
        path = f"/_matrix/client/v3/user/{user}/openid/request_token"
        token: dict[str, Any] = self.matrix("POST", path, {}, user=user)
        return token

    def ask_token(
        self,
        user: str,
        room_id: str,
        *,
        device: str = "PHONE",
        new: bool = False,
        at: str = "",
        member: bool = True,
        **extra: Any,
    ) -> HttpAnswer:
        """Ask for a token as Element Call does, with a fresh OpenID token from the homeserver.

        :param new: at ``/get_token`` instead of ``/sfu/get``.
        :param at: another base URL than the guard's.
        :param member: first make the user a member of the room, unless this was done before.
        """
        if member:
            self.join(user, room_id)
        content: dict[str, Any] = {"openid_token": self.openid_token(user), **extra}
        if new:
            device_of = {"id": str(uuid4()), "claimed_user_id": user, "claimed_device_id": device}
            content = {"room_id": room_id, "slot_id": "m.call#ROOM", "member": device_of} | content
        else:
            content = {"room": room_id, "device_id": device} | content
        return http("POST", (at or self.guard_url) + ("/get_token" if new else "/sfu/get"), content)

    def enter(self, user: str, room_id: str, *, listen: bool = False, **how: Any) -> Call:
        """Ask for a token and join the call with it."""
        answer = self.ask_token(user, room_id, **how)
        assert answer.status == 200, answer.body
        return self.connect(user, answer.content["jwt"], listen=listen)

    def connect(self, user: str, token: str, *, listen: bool = False, clients: MediaClients | None = None) -> Call:
        """Join a call with a token.

        :param clients: another process than the common one.
        :raises Refused: LiveKit refuses it.
        """
        clients = clients or self.clients
        who = f"{user} {uuid4().hex[:8]}"
        joined = clients.tell("join", who=who, url=self.sfu_url.replace("http", "ws"), token=token, listen=listen)
        return Call(clients, who, joined["connected_at"])

    def sfu_call(self, method: str, content: dict[str, Any]) -> HttpAnswer:
        """A RoomService call as JSON, with every right in the room that it names."""
        token = self.sfu_token(roomAdmin=True, roomList=True, roomCreate=True, room=content.get("room", ""))
        return http("POST", f"{self.sfu_url}/twirp/livekit.RoomService/{method}", content, bearer=token)

    def sfu_token(self, claims: dict[str, Any] | None = None, **video: object) -> str:
        """A token for LiveKit with any content; claims that are ``None`` are left out."""
        said: dict[str, Any] = {"iss": KEY, "sub": "somebody", "exp": int(time.time()) + 600, "video": video}
        said.update(claims or {})
        return SfuKey(KEY, SECRET).sign({name: value for name, value in said.items() if value is not None})

    def participants(self, room_id: str) -> list[dict[str, Any]]:
        """Who is in the call, as LiveKit lists them."""
        answer = self.sfu_call("ListParticipants", {"room": room_alias(room_id, ROOM_SLOT)})
        assert answer.status == 200, answer.body
        return list(answer.content["participants"])

    def policy_changed(self, room_id: str) -> None:
        """Tell the guard that a policy changed, as the module inside Synapse does."""
        answer = http("POST", f"{self.operators_url}/policy-changed", {"room_id": room_id}, bearer=OPERATORS)
        assert answer.status == 202

    def metrics(self) -> dict[str, float]:
        """The guard's metrics, by name with labels."""
        text = http("GET", f"{self.operators_url}/metrics").body.decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


def claims_of(answer: HttpAnswer) -> dict[str, Any]:
    """The claims of the token in an answer."""
    return claims_in(answer.content["jwt"])


def claims_in(token: str) -> dict[str, Any]:
    """The claims of a token, unverified."""
    body = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims
