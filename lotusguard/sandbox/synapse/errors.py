# SPDX-License-Identifier: Apache-2.0
"""How the stand-in homeserver reads requests and writes answers and errors. Sandbox."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

from lotusguard.sandbox.wire import Asked, Refusal, Reply

HEADERS = (
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-cache, no-store, must-revalidate"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, DELETE, OPTIONS"),
    ("Access-Control-Allow-Headers", "X-Requested-With, Content-Type, Authorization, Date"),
    ("Server", "Synapse/1.163.2"),
)
PREFLIGHT_HEADERS = HEADERS[2:]


def ok(answer: Any) -> Reply:
    """200 with a JSON body."""
    return Reply(200, json.dumps(answer, separators=(",", ":")).encode(), HEADERS)


def error(status: int, errcode: str, text: str, **more: Any) -> Refusal:
    """A Matrix error, to be raised."""
    body = json.dumps({"errcode": errcode, "error": text} | more).encode()
    return Refusal(Reply(status, body, HEADERS))


def forbidden(text: str) -> Refusal:
    return error(403, "M_FORBIDDEN", text)


def query(asked: Asked) -> dict[str, str]:
    """The query parameters; of repeated ones the first."""
    return {key: values[0] for key, values in parse_qs(asked.query, keep_blank_values=True).items()}


def json_object(asked: Asked, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The body. :raises Refusal: 400 if it is not a JSON object."""
    if may_be_empty and not asked.body:
        return {}
    try:
        value = asked.json()
    except ValueError:
        raise error(400, "M_NOT_JSON", "Content not JSON.") from None
    if not isinstance(value, dict):
        raise error(400, "M_BAD_JSON", "Content must be a JSON object.")
    return value
