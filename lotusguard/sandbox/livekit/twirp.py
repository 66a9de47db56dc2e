# SPDX-License-Identifier: Apache-2.0
"""Twirp as LiveKit's RoomService uses it: protobuf or JSON, errors always in JSON. Sandbox.

Read from the generated ``livekit_room.twirp.go`` and from ``utils/xtwirp``; the JSON is protojson with
``DiscardUnknown`` in, ``UseProtoNames`` and ``EmitUnpopulated`` out.
"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from livekit.protocol import room as pb

from lotusguard.sandbox.go.http import marshal
from lotusguard.sandbox.wire import Asked, Refusal, Reply

PREFIX = "/twirp/livekit.RoomService/"
REQUESTS: dict[str, type[Message]] = {
    "CreateRoom": pb.CreateRoomRequest,
    "ListRooms": pb.ListRoomsRequest,
    "DeleteRoom": pb.DeleteRoomRequest,
    "ListParticipants": pb.ListParticipantsRequest,
    "GetParticipant": pb.RoomParticipantIdentity,
    "RemoveParticipant": pb.RoomParticipantIdentity,
    "MutePublishedTrack": pb.MuteRoomTrackRequest,
    "UpdateParticipant": pb.UpdateParticipantRequest,
}
"""The implemented methods with their request messages."""

STATUS = {
    "bad_route": 404,
    "failed_precondition": 412,
    "internal": 500,
    "invalid_argument": 400,
    "malformed": 400,
    "not_found": 404,
    "unauthenticated": 401,
    "unavailable": 503,
}


def error(code: str, msg: str, meta: dict[str, str] | None = None) -> Refusal:
    """A Twirp error; its status follows from the code."""
    body: dict[str, Any] = {"code": code, "msg": msg}
    if meta:
        body["meta"] = meta
    return Refusal(Reply(STATUS[code], marshal(body).encode(), [("Content-Type", "application/json")]))


def read(asked: Asked, method: str) -> tuple[Message, bool]:
    """The request message, and whether it came as JSON.

    :raises Refusal: with Twirp's answer to what is no request.
    """
    invalid = {"twirp_invalid_route": f"{asked.method} {asked.path}"}
    if asked.method != "POST":
        raise error("bad_route", f'unsupported method "{asked.method}" (only POST is allowed)', invalid)
    if method not in REQUESTS:
        raise error("bad_route", f'no handler for path "{asked.path}"', invalid)
    given = asked.header("Content-Type") or ""
    content_type = given.partition(";")[0].strip().lower()
    message = REQUESTS[method]()
    if content_type == "application/protobuf":
        try:
            message.ParseFromString(asked.body)
        except DecodeError:
            raise error("malformed", "the protobuf request could not be decoded") from None
        return message, False
    if content_type == "application/json":
        try:
            value, _end = _DECODER.raw_decode(asked.body.decode().lstrip())
            if not isinstance(value, dict):
                raise ValueError("not an object")
            json_format.ParseDict(value, message, ignore_unknown_fields=True)
        except (ValueError, RecursionError, json_format.ParseError):
            raise error("malformed", "the json request could not be decoded") from None
        return message, True
    raise error("bad_route", f'unexpected Content-Type: "{given}"', invalid)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Unlike encoding/json, protojson refuses duplicate keys."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate field")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_once_each)


def reply(message: Message, *, as_json: bool) -> Reply:
    """The answer, in the format that the request came in."""
    if not as_json:
        return Reply(200, message.SerializeToString(), [("Content-Type", "application/protobuf")])
    body = json.dumps(emitted(message), ensure_ascii=False, separators=(",", ":")).encode()
    return Reply(200, body, [("Content-Type", "application/json")])


def emitted(message: Message) -> dict[str, Any]:
    """The message as a JSON object with every field: zero values, and null for messages that are not set."""
    values: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for field in message.DESCRIPTOR.fields:
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            values[field.name] = [emitted(inner) for inner in getattr(message, field.name)]
        elif message.HasField(field.name):
            values[field.name] = emitted(getattr(message, field.name))
        elif field.containing_oneof is None:
            values[field.name] = None
    return values
