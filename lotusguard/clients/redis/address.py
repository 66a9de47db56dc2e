# SPDX-License-Identifier: Apache-2.0
"""Where a Redis server is: the URL of ``GUARD_REDIS_URL``, and the Twisted endpoints for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from attrs import field, frozen
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates

REDIS_PORT, SENTINEL_PORT = 6379, 26379


@frozen
class HostPort:
    host: str
    port: int


@frozen
class RedisAddress:
    """A Redis server, or the Sentinels that know where it is.

    :ivar servers: the server; with ``service``, the Sentinels. Empty for a UNIX socket.
    :ivar path: the UNIX socket, else "".
    :ivar service: the name of the master that Sentinel looks after, else "".
    :ivar user: the ACL user name, else "".
    :ivar authority: a file with the certificates that sign the server's; "" for the system's.
    """

    servers: tuple[HostPort, ...]
    path: str = ""
    tls: bool = False
    service: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)
    database: int = 0
    authority: str = ""

    @property
    def name(self) -> str:
        """For logs; it contains no password."""
        if self.path:
            return f"unix:{self.path}"
        servers = ",".join(f"{server.host}:{server.port}" for server in self.servers)
        return f"{servers}/{self.service}" if self.service else servers


def parse_address(url: str) -> RedisAddress:
    """Read a URL::

        redis://[user[:password]@]host[:port][/database]
        rediss://…[?ca=/file.pem]
        unix://[user[:password]@]/path[?db=0]
        redis+sentinel://[user[:password]@]host[:port][,host[:port]…]/service[?db=0&sentinel_password=…]

    :raises ValueError: it is not such a URL. The text does not contain the URL, which may hold a password.
    """
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if set(query) - {"db", "ca", "sentinel_password"}:
        raise ValueError("has an unknown parameter; db, ca and sentinel_password are known")
    database = query.get("db", "0")
    service = path = ""
    if parts.scheme == "unix":
        path = unquote(parts.path)
    elif parts.scheme == "redis+sentinel":
        service = unquote(parts.path.strip("/"))
        if not service:
            raise ValueError("names no service: redis+sentinel://host:port/service")
    else:
        database = parts.path.strip("/") or database
    if not database.isdecimal():
        raise ValueError("names a database that is not a number")
    default_port = SENTINEL_PORT if service else REDIS_PORT
    servers = () if path else tuple(_host_port(host, default_port) for host in hosts.split(",") if host)
    if not path and not servers:
        raise ValueError("names no host")
    return RedisAddress(
        servers, path, parts.scheme == "rediss", service, unquote(user), unquote(password),
        query.get("sentinel_password", ""), int(database), query.get("ca", ""),
    )  # fmt: skip


def _host_port(text: str, default_port: int) -> HostPort:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("names no host")
    return HostPort(parts.hostname, parts.port or default_port)


def endpoint_for(reactor: Any, address: RedisAddress, server: HostPort | None, timeout: float) -> IStreamClientEndpoint:
    """The endpoint of one server; over TLS, the server's certificate is verified for its name.

    :param server: ``None`` for a UNIX socket.
    """
    if server is None:
        return UNIXClientEndpoint(reactor, address.path, timeout=timeout)
    endpoint = HostnameEndpoint(reactor, server.host, server.port, timeout=timeout)
    if not address.tls:
        return endpoint
    trusted = None
    if address.authority:
        pem = Path(address.authority).read_bytes()
        end = b"-----END CERTIFICATE-----"
        trusted = trustRootFromCertificates([Certificate.loadPEM(part + end) for part in pem.split(end)[:-1]])
    return wrapClientTLS(optionsForClientTLS(server.host, trustRoot=trusted), endpoint)
