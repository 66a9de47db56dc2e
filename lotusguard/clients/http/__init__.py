# SPDX-License-Identifier: Apache-2.0
"""Calls to dependencies over HTTP/1.1: `fetch` makes one call and returns the whole answer, in bounded memory."""

from lotusguard.clients.http.agent import FixedAgent
from lotusguard.clients.http.answer import Answer
from lotusguard.clients.http.connection import StaleConnection
from lotusguard.clients.http.fetching import Agent, BodyTooLarge, fetch, json_object, whole
from lotusguard.clients.http.headers import connection_options, keep_end_to_end
from lotusguard.clients.http.pool import IDLE_CONNECTIONS, ConnectionPool

__all__ = [
    "IDLE_CONNECTIONS",
    "Agent",
    "Answer",
    "BodyTooLarge",
    "ConnectionPool",
    "FixedAgent",
    "StaleConnection",
    "connection_options",
    "fetch",
    "json_object",
    "keep_end_to_end",
    "whole",
]
