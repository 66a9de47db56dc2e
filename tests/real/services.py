# SPDX-License-Identifier: Apache-2.0
"""How the real services are configured: Synapse, livekit-server and lk-jwt-service. Tests."""

from __future__ import annotations

import base64
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from attrs import field, frozen

from tests.real.certificates import write_certificate
from tests.real.processes import Program, free_port

KEY, SECRET = "realkey", "a-real-secret-for-loopback-only-000"
OPERATORS = "operators-of-the-real-stack"
REGISTRATION = "registration-of-the-real-stack"
PUSHED, UNPUSHED = OPERATORS_PORTS = ("pushed", "unpushed")
"""Ports of the guard's operators' listener; the module inside Synapse reports to the first."""
CHECKOUT = Path(__file__).parents[2]


@frozen
class Addresses:
    """A free port of loopback for each listener.

    :ivar server_name: the homeserver's, with the port of its TLS listener.
    """

    ports: Mapping[str, int] = field(
        factory=lambda: {
            name: free_port() for name in ("client", "openid", "sfu", "upstream", "guard", *OPERATORS_PORTS)
        }
    )

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    @property
    def server_name(self) -> str:
        return f"127.0.0.1:{self.ports['openid']}"


def written(place: Path, name: str, content: Any) -> Path:
    """Write a configuration file."""
    path = place / name
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def synapse(place: Path, at: Addresses) -> Program:
    """A Synapse with SQLite, a TLS listener for OpenID, and the guard's module."""
    certificate, key = place / "tls.crt", place / "tls.key"
    write_certificate(certificate, key)
    seed = base64.b64encode(os.urandom(32)).decode().rstrip("=")
    (place / "signing.key").write_text(f"ed25519 a_real {seed}\n", encoding="ascii")
    log = written(place, "synapse-log.yaml", {"version": 1, "root": {"level": "WARNING"}})
    plenty = {"per_second": 10_000, "burst_count": 10_000}
    listener = {"type": "http", "bind_addresses": ["127.0.0.1"]}
    config = written(
        place,
        "homeserver.yaml",
        {
            "server_name": at.server_name,
            "report_stats": False,
            "pid_file": str(place / "synapse.pid"),
            "signing_key_path": str(place / "signing.key"),
            "media_store_path": str(place / "media"),
            "log_config": str(log),
            "database": {"name": "sqlite3", "args": {"database": str(place / "synapse.db")}},
            "tls_certificate_path": str(certificate),
            "tls_private_key_path": str(key),
            "listeners": [
                {**listener, "port": at.ports["client"], "resources": [{"names": ["client", "openid"]}]},
                {**listener, "port": at.ports["openid"], "tls": True, "resources": [{"names": ["openid"]}]},
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
            "rc_invites": {"per_room": plenty, "per_user": plenty, "per_issuer": plenty},
            "modules": [
                {
                    "module": "lotusguard.synapse_module.PolicyPush",
                    "config": {"url": at.url(PUSHED), "token": OPERATORS},
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
        f"{at.url('client')}/_matrix/client/versions",
    )


def livekit(place: Path, at: Addresses, executable: str, recorder_url: str) -> Program:
    """A LiveKit on loopback that sends its webhooks to the guard and to a recorder."""
    config = written(
        place,
        "livekit.yaml",
        {
            "port": at.ports["sfu"],
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
            "webhook": {"api_key": KEY, "urls": [f"{at.url('guard')}/sfu_webhook", recorder_url]},
        },
    )
    return Program("livekit-server", [executable, "--config", config], {}, place / "sfu.log", at.url("sfu"))


def lk_jwt_service(place: Path, at: Addresses, executable: str) -> Program:
    return Program(
        "lk-jwt-service",
        [executable],
        {
            "LIVEKIT_URL": at.url("sfu").replace("http", "ws"),
            "LIVEKIT_KEY": KEY,
            "LIVEKIT_SECRET": SECRET,
            "LIVEKIT_JWT_BIND": at.url("upstream").removeprefix("http://"),
            "LIVEKIT_FULL_ACCESS_HOMESERVERS": at.server_name,
            "LIVEKIT_CS_API_URL_OVERRIDES": f"{at.server_name}={at.url('client')}",
            "SSL_CERT_FILE": str(place / "tls.crt"),
        },
        place / "upstream.log",
        f"{at.url('upstream')}/healthz",
    )
