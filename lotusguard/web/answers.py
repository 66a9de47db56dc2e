# SPDX-License-Identifier: Apache-2.0
"""The guard's own answers: always JSON. The answer to each error is decided here, for every listener."""

from __future__ import annotations

import json
from math import ceil
from typing import Any

from attrs import evolve, frozen
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.server import Request

from lotusguard.clients.lk_jwt_service import VIA, UpstreamFailed
from lotusguard.guard.joins.patience import InLobby
from lotusguard.guard.lobby import LobbyStopped
from lotusguard.rules.refusals import JoinRefused, Refusal
from lotusguard.rules.requests import TokenRoute, Unreadable, WrongOrigin

log = Logger()

CORS = {
    b"Access-Control-Allow-Origin": b"*",
    b"Access-Control-Allow-Methods": b"POST",
    b"Access-Control-Allow-Headers": b"Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token",
}
"""The headers that lk-jwt-service sends with every answer of its JSON routes."""
RETRIED = frozenset((502, 503, 504))
"""Statuses without CORS headers: the browser then hides the answer from Element Call, which asks again for half a
minute. With the headers any error is final."""
DEFAULT_RETRY_AFTER = 5.0
"""Seconds, for a 429 whose reason names no time."""


@frozen
class Reply:
    """A Matrix error.

    :ivar retry_after_ms: for 429, when asking again may help.
    """

    code: int
    errcode: str
    error: str
    retry_after_ms: int | None = None


class AnsweredRequest(Request):
    """A request, as far as its answer depends on it.

    :ivar token_route: the token route that its path is, on a listener that serves one there.
    :ivar early_head: whether a 200 head was sent before the answer was known; see ``web/held.py``.
    """

    channel: Any
    token_route: TokenRoute | None = None
    early_head: bool = False


class Rejected(Exception):
    """A request is answered with an error before it reaches its route's work."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.error)
        self.reply = reply


class LoopFound(Exception):
    """A request has been through a guard already: ``GUARD_UPSTREAM`` leads back to one."""


UNREADABLE = Reply(400, "M_NOT_JSON", "Error reading request")
NOT_A_PATH = Reply(400, "M_UNRECOGNIZED", "The request target is not a path.")
MANY_HOSTS = Reply(400, "M_UNRECOGNIZED", "There is more than one Host.")
BAD_ROOM = Reply(400, "M_BAD_JSON", 'A JSON object {"room_id": "!…"} is expected.')
BAD_MODERATION = Reply(
    400,
    "M_BAD_JSON",
    'A JSON object {"room_id": "!…", "user": "@…", "action": "admit", "deny", "remove" or "mute"} is expected.',
)
BAD_QUESTION = Reply(
    400, "M_INVALID_PARAM", "`since` and `until` are seconds since the epoch; `kind` is join or removal."
)
NO_BEARER = Reply(401, "M_UNAUTHORIZED", "The bearer token is missing or wrong.")
OPERATORS_ONLY = Reply(403, "M_FORBIDDEN", "The operators' token is needed here.")
WRONG_ORIGIN = Reply(403, "M_FORBIDDEN", "The user does not belong to the homeserver that asks.")
NO_ROUTE = Reply(404, "M_UNRECOGNIZED", "There is nothing here.")
NOBODY_TO_MODERATE = Reply(404, "M_NOT_FOUND", "That user is not waiting, or not in the call.")
TOO_LARGE = Reply(413, "M_TOO_LARGE", "The request is too large.")
UNREACHABLE = Reply(502, "M_UNKNOWN", "lk-jwt-service, which issues tokens for calls, cannot be reached.")
NOT_ANSWERED = Reply(502, "M_UNKNOWN", "The request could not be answered.")
NOT_MODERATED = Reply(502, "M_UNKNOWN", "LiveKit did not do it.")
LOOP = Reply(502, "M_UNKNOWN", "The guard's address of lk-jwt-service leads back to a guard.")
NO_ROOM_FOR_BODY = Reply(503, "M_LIMIT_EXCEEDED", "Too many large requests at once.")
NOT_IN_TIME = Reply(504, "M_UNKNOWN", "lk-jwt-service, which issues tokens for calls, did not answer in time.")
REFUSALS = {
    Refusal.FULL: Reply(403, "M_FORBIDDEN", "This voice channel is full."),
    Refusal.NOT_A_MEMBER: Reply(403, "M_FORBIDDEN", "You are not a member of this room."),
    Refusal.HOMESERVER_NOT_ALLOWED: Reply(403, "M_FORBIDDEN", "Calls here are not open to users of your homeserver."),
    Refusal.OTHER_SERVER: Reply(401, "M_UNAUTHORIZED", "The request could not be authorised."),
    Refusal.JOIN_LEVEL: Reply(403, "M_FORBIDDEN", "You may not join calls in this room."),
    Refusal.NOT_STARTED: Reply(403, "M_FORBIDDEN", "This call has not been started yet."),
    Refusal.REMOVED: Reply(403, "M_FORBIDDEN", "You were removed from this call."),
    Refusal.NOT_ADMITTED: Reply(403, "M_FORBIDDEN", "You were not admitted to this call."),
    Refusal.NOBODY_ADMITTED: Reply(403, "M_FORBIDDEN", "Nobody admitted you in time."),
    Refusal.TOO_MANY_SLOTS: Reply(429, "M_LIMIT_EXCEEDED", "This room has too many calls."),
    Refusal.TOO_MANY_LOOKUPS: Reply(429, "M_LIMIT_EXCEEDED", "You ask for too many calls at once."),
    Refusal.LOBBY_FULL: Reply(429, "M_LIMIT_EXCEEDED", "Too many people are waiting to join this call."),
    Refusal.SEAT_PENDING: Reply(503, "M_UNKNOWN", "Other requests for this call are still being decided."),
}


def reply_to(error: BaseException) -> Reply | None:
    """The reply to an error; ``None`` for one that nobody expected."""
    match error:
        case Rejected():
            return error.reply
        case JoinRefused():
            return _refused(error)
        case Unreadable():
            return UNREADABLE
        case WrongOrigin():
            return WRONG_ORIGIN
        case UpstreamFailed():
            return NOT_IN_TIME if error.code == 504 else UNREACHABLE
        case LoopFound():
            return LOOP
    return None


def _refused(error: JoinRefused) -> Reply:
    reply = REFUSALS[error.refusal]
    if reply.code != 429:
        return reply
    seconds = DEFAULT_RETRY_AFTER if error.retry_after is None else error.retry_after
    return evolve(reply, retry_after_ms=ceil(seconds * 1000))


def answer_failure(request: AnsweredRequest, failure: Failure) -> None:
    """Answer a request whose handler failed. Every listener's Klein has this as its error handler."""
    if request.channel is None:
        return  # the caller has disconnected
    if failure.check(LobbyStopped) and not request.startedWriting:
        request.channel.forceAbortClient()  # without an answer, Element Call asks the next guard
        return
    if isinstance(failure.value, InLobby):
        _tell_to_wait(request, failure.value)
        return
    reply = None if failure.value is None else reply_to(failure.value)
    if reply is None:
        log.failure("a request could not be answered", failure)
        reply = NOT_ANSWERED
    if request.startedWriting and not request.early_head:
        request.channel.forceAbortClient()
        return
    if reply is LOOP:
        request.setHeader(b"Via", VIA)  # tells the guard before us what it reached
    refuse(request, reply)


def _tell_to_wait(request: AnsweredRequest, waiting: InLobby) -> None:
    """Answer a client that polls."""
    content = {
        "status": "waiting", "id": waiting.entry_id, "color": waiting.colour,
        "retry_after_ms": ceil(waiting.retry_after * 1000),
    }  # fmt: skip
    route = request.token_route
    answer_json(request, 202, content, cors=route is not None and route.cors)


def refuse(request: AnsweredRequest, reply: Reply) -> None:
    """Answer with a Matrix error."""
    content: dict[str, Any] = {"errcode": reply.errcode, "error": reply.error}
    if reply.retry_after_ms is not None:
        content["retry_after_ms"] = reply.retry_after_ms
    route = request.token_route
    cors = route is not None and route.cors and reply.code not in RETRIED
    answer_json(request, reply.code, content, cors=cors)


def answer_json(request: AnsweredRequest, code: int, content: Any, *, cors: bool = False) -> None:
    """Answer with JSON and finish."""
    answer_body(request, code, json.dumps(content).encode() + b"\n", cors=cors)


def answer_body(request: AnsweredRequest, code: int, body: bytes, *, cors: bool = False) -> None:
    """Answer with what is JSON already and finish."""
    if request.early_head:  # the status is gone; the body says it
        request.write(body)
        request.finish()
        return
    request.setResponseCode(code)
    request.setHeader(b"Content-Type", b"application/json")
    request.setHeader(b"Content-Length", str(len(body)).encode())
    for name, value in CORS.items() if cors else ():
        request.setHeader(name, value)
    request.write(body)
    request.finish()
