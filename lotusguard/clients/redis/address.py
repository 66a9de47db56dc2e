# SPDX-License-Identifier: Apache-2.0
"""Twisted endpoints for a Redis server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.ssl import Certificate, optionsForClientTLS, trustRootFromCertificates

from lotusguard.rules.redis_address import HostPort, RedisAddress


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
