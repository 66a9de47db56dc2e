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
import socket
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from lotusguard.rules.identity import ROOM_SLOT, room_alias
from lotusguard.rules.tokens import SfuKey
from tests.real.callers import Call, MediaClients
from tests.real.certificates import write_certificate
from tests.real.processes import HttpAnswer, Program, free_port, http
from tests.real.recorder import Recorder

KEY, SECRET = "realkey", "a-real-secret-for-loopback-only-000"
OPERATORS = "operators-of-the-real-stack"
REGISTRATION = "registration-of-the-real-stack"
PUSHED, UNPUSHED = OPERATORS_PORTS = ("pushed", "unpushed")
"""Ports of the guard's operators' listener; the module inside Synapse reports to the first."""
CHECKOUT = Path(__file__).parents[2]
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

    def __init__(self, place: Path, livekit_server: str, lk_jwt_service: str) -> None:
        self.place = place
        self._ports = {name: free_port() for name in ("client", "openid", "sfu", "upstream", "guard", *OPERATORS_PORTS)}
        self.server_name = f"127.0.0.1:{self._ports['openid']}"
        self.homeserver_url = self._url("client")
        self.sfu_url = self._url("sfu")
        self.upstream_url = self._url("upstream")
        self.guard_url = self._url("guard")
        self.operators_url = self._url(UNPUSHED)
        self.recorder = Recorder()
        self.synapse = self._synapse()
        self.sfu = self._sfu(livekit_server)
        self.upstream = self._upstream(lk_jwt_service)
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

    def _url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    def _written(self, name: str, content: Any) -> Path:
        path = self.place / name
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def _synapse(self) -> Program:
        place = self.place
        certificate, key = place / "tls.crt", place / "tls.key"
        write_certificate(certificate, key)
        seed = base64.b64encode(os.urandom(32)).decode().rstrip("=")
        (place / "signing.key").write_text(f"ed25519 a_real {seed}\n", encoding="ascii")
        log = self._written("synapse-log.yaml", {"version": 1, "root": {"level": "WARNING"}})
        plenty = {"per_second": 10_000, "burst_count": 10_000}
        listener = {"type": "http", "bind_addresses": ["127.0.0.1"]}
        config = self._written(
            "homeserver.yaml",
            {
                "server_name": self.server_name,
                "report_stats": False,
                "pid_file": str(place / "synapse.pid"),
                "signing_key_path": str(place / "signing.key"),
                "media_store_path": str(place / "media"),
                "log_config": str(log),
                "database": {"name": "sqlite3", "args": {"database": str(place / "synapse.db")}},
                "tls_certificate_path": str(certificate),
                "tls_private_key_path": str(key),
                "listeners": [
                    {**listener, "port": self._ports["client"], "resources": [{"names": ["client", "openid"]}]},
                    {**listener, "port": self._ports["openid"], "tls": True, "resources": [{"names": ["openid"]}]},
                ],
                "bcrypt_rounds": 4,
                "registration_shared_secret": REGISTRATION,
                "macaroon_secret_key": REGISTRATION,
                "form_secret": REGISTRATION,
                "trusted_key_servers": [],
                "suppress_key_server_warning": True,
                "max_event_delay_duration": "24h",
                "experimental_features": {"msc4140_enabled": True},
                "rc_message": plenty,
                "rc_registration": plenty,
                "rc_room_creation": plenty,
                "rc_joins": {"local": plenty, "remote": plenty},
                "rc_joins_per_room": plenty,
                "modules": [
                    {
                        "module": "lotusguard.synapse_module.PolicyPush",
                        "config": {"url": self._url(PUSHED), "token": OPERATORS},
                    }
                ],
                "rc_login": {"address": plenty, "account": plenty, "failed_attempts": plenty},
            },
        )
        return Program(
            "synapse",
            [sys.executable, "-m", "synapse.app.homeserver", "-c", config],
            {"PYTHONPATH": str(CHECKOUT)},
            place / "synapse.log",
            f"{self.homeserver_url}/_matrix/client/versions",
        )

    def _sfu(self, livekit_server: str) -> Program:
        config = self._written(
            "livekit.yaml",
            {
                "port": self._ports["sfu"],
                "bind_addresses": ["127.0.0.1"],
                "logging": {"level": "info", "json": False},
                "rtc": {
                    "node_ip": "127.0.0.1",
                    "use_external_ip": False,
                    "enable_loopback_candidate": True,
                    "interfaces": {"includes": ["lo"]},
                    "ips": {"includes": ["127.0.0.0/8"]},
                    "udp_port": free_port(socket.SOCK_DGRAM),
                    "tcp_port": 0,
                    "stun_servers": [],
                },
                "turn": {"enabled": False},
                "room": {"auto_create": False},
                "keys": {KEY: SECRET},
                "webhook": {"api_key": KEY, "urls": [f"{self.guard_url}/sfu_webhook", self.recorder.url]},
            },
        )
        return Program("livekit-server", [livekit_server, "--config", config], {}, self.place / "sfu.log", self.sfu_url)

    def _upstream(self, lk_jwt_service: str) -> Program:
        return Program(
            "lk-jwt-service",
            [lk_jwt_service],
            {
                "LIVEKIT_URL": self.sfu_url.replace("http", "ws"),
                "LIVEKIT_KEY": KEY,
                "LIVEKIT_SECRET": SECRET,
                "LIVEKIT_JWT_BIND": self.upstream_url.removeprefix("http://"),
                "LIVEKIT_FULL_ACCESS_HOMESERVERS": self.server_name,
                "LIVEKIT_CS_API_URL_OVERRIDES": f"{self.server_name}={self.homeserver_url}",
                "SSL_CERT_FILE": str(self.place / "tls.crt"),
            },
            self.place / "upstream.log",
            f"{self.upstream_url}/healthz",
        )

    def run_guard(self, *, pushed: bool = False, **settings: object) -> None:
        """Run the guard with these settings (by lower-case name). Its state directory stays from one run to the next.

        :param pushed: the module inside Synapse reports changes to it.
        """
        port = self._ports[PUSHED if pushed else UNPUSHED]
        settings = {"guard_admin_port": port, **settings}
        if self.guard is not None and self.guard.process is not None and settings == self._guard_settings:
            return
        if self.guard is not None:
            self.guard.stop()
        state = self.place / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        given = {
            "guard_bind_host": "127.0.0.1",
            "guard_bind_port": self._ports["guard"],
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
