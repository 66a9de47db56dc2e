# SPDX-License-Identifier: Apache-2.0
"""Where a Redis server is: the URL of ``GUARD_REDIS_URL``."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

from attrs import field, frozen

REDIS_PORT, SENTINEL_PORT = 6379, 26379
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel")


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
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in SCHEMES or not url.isprintable() or " " in url:
        raise ValueError("is not the URL of a Redis server")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if set(query) - {"db", "ca", "sentinel_password"}:
        raise ValueError("has an unknown parameter; db, ca and sentinel_password are known")
    database = query.get("db", "0")
    service = path = ""
    if parts.scheme == "unix":
        path = unquote(parts.path)
        if not path:
            raise ValueError("names no socket: unix:///path")
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
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        raise ValueError("has a host or a port that cannot be read") from None
    if not parts.hostname:
        raise ValueError("names no host")
    if port == 0:
        raise ValueError("names port 0")
    return HostPort(parts.hostname, port or default_port)
