# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with Redis: a name for each fault, and what to do about it."""

from __future__ import annotations

import txredisapi
from twisted.internet.defer import TimeoutError

from lotusguard.clients.failures import DependencyFailed

NAME = "redis"
NOT_CONNECTED = "not_connected"
"""The fault of a link that has not tried yet."""
_ERRORS = {
    "WRONGPASS": "wrong_password",
    "NOAUTH": "no_password",
    "NOPERM": "no_permission",
    "DENIED": "protected_mode",
    "READONLY": "read_only",
    "OOM": "out_of_memory",
    "LOADING": "loading",
    "BUSY": "busy",
    "MASTERDOWN": "master_down",
    "MISCONF": "cannot_save",
    "NOREPLICAS": "no_replicas",
    "CLUSTERDOWN": "cluster_down",
    "MOVED": "cluster",
    "CROSSSLOT": "cluster",
}
ADVICE = {
    "wrong_password": "Correct the user name or the password in GUARD_REDIS_URL.",
    "no_password": "The server wants a password: put it into GUARD_REDIS_URL.",
    "no_permission": "Allow the user ~lotusguard:* &lotusguard:* +@read +@write +@scripting +@pubsub +info +time +ping",
    "protected_mode": "The server accepts its own machine only: set a password there, or `protected-mode no`.",
    "read_only": "The server is a replica: name the master, or use redis+sentinel://.",
    "out_of_memory": "Raise maxmemory of the server; a guard needs a few kilobytes for each room with a call.",
    "not_redis": "Another program answers there, not Redis: correct GUARD_REDIS_URL (rediss:// if it wants TLS).",
    "wrong_version": "Valkey, or Redis 6.2 or later, is needed.",
    "no_master": "No Sentinel names a master of that service.",
    "cannot_save": "The server cannot write its snapshot: look at its log and its disk.",
    "no_replicas": "Too few replicas are connected: see min-replicas-to-write of the server.",
    "cluster": "Redis Cluster is not supported: name a single server, or use redis+sentinel://.",
    "bad_certificate": "The server's certificate is not valid for its name; ?ca= names a file with its authority.",
}


def reason_of(error: Exception) -> str:
    """A name for what went wrong."""
    if isinstance(error, DependencyFailed):
        return error.reason
    if isinstance(error, TimeoutError | txredisapi.TimeoutError):
        return "timeout"
    if isinstance(error, txredisapi.ResponseError):
        words = str(error).split() or [""]
        if "without any password" in str(error) or "invalid password" in str(error):
            return "wrong_password"
        return _ERRORS.get(words[0].lstrip("-"), "error")
    return "unreachable"
