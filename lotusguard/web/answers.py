# SPDX-License-Identifier: Apache-2.0
"""The guard's own answers: always JSON, and on token routes with the headers that upstream gives. Floor: web."""

from __future__ import annotations

import json
from typing import Any

from twisted.web.http import Request

CORS = {
    b"Access-Control-Allow-Origin": b"*",
    b"Access-Control-Allow-Methods": b"POST",
    b"Access-Control-Allow-Headers": b"Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token",
}
"""What lk-jwt-service puts on every answer of its JSON routes. Without them a browser shows its user a network
error, and Element Call tries again for half a minute."""


def answer_json(request: Request, code: int, content: Any, *, cors: bool = False) -> None:
    """Answer with JSON and be done."""
    body = json.dumps(content).encode() + b"\n"
    request.setResponseCode(code)
    request.setHeader(b"Content-Type", b"application/json")
    request.setHeader(b"Content-Length", str(len(body)).encode())
    for name, value in CORS.items() if cors else ():
        request.setHeader(name, value)
    request.write(body)
    request.finish()


def refuse(request: Request, code: int, errcode: str, error: str, *, cors: bool) -> None:
    """Answer with a Matrix error."""
    answer_json(request, code, {"errcode": errcode, "error": error}, cors=cors)
