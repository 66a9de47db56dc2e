# SPDX-License-Identifier: Apache-2.0
"""Control of the stand-in SFU's clients over HTTP, so that a human can curl participants in and out. Sandbox."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from lotusguard.sandbox.livekit.participant import JoinRefused
from lotusguard.sandbox.wire import Asked, Reply

if TYPE_CHECKING:
    from lotusguard.sandbox.livekit.server import FakeLiveKit


class SfuControl:
    """``POST /sandbox/join {"token", "publish"?}``, ``/sandbox/leave {"room", "identity"}``,
    ``/sandbox/publish {"room", "identity", "source", "type"?}``, ``/sandbox/unpublish {…, "track_sid"}`` and
    ``GET /sandbox/rooms``. LiveKit has none of it.
    """

    def __init__(self, sfu: FakeLiveKit) -> None:
        self._sfu = sfu

    def answer(self, asked: Asked) -> Reply:
        """Do what is asked; what is missing or refused is told in one line of JSON."""
        verb = asked.path.rpartition("/")[2]
        try:
            if asked.method == "GET" and verb == "rooms":
                return _json(200, self._rooms())
            if asked.method != "POST" or verb not in ("join", "leave", "publish", "unpublish"):
                return _json(404, {"error": "try POST join, leave, publish, unpublish or GET rooms"})
            return getattr(self, f"_{verb}")(json.loads(asked.body))  # type: ignore[no-any-return]
        except JoinRefused as refused:
            return _json(refused.status, {"error": str(refused)})
        except (ValueError, TypeError) as error:
            return _json(400, {"error": str(error)})
        except KeyError as error:
            return _json(400, {"error": f"{error} is missing"})

    def _join(self, wish: dict[str, Any]) -> Reply:
        participant = self._sfu.connect(wish["token"], wish.get("publish"))
        joined = json_format.MessageToDict(participant.info())
        return _json(200, {"room": participant.room.name, "participant": joined})

    def _leave(self, wish: dict[str, Any]) -> Reply:
        self._sfu.disconnect(wish["room"], wish["identity"])
        return _json(200, {})

    def _publish(self, wish: dict[str, Any]) -> Reply:
        track = self._sfu.publish_track(wish["room"], wish["identity"], wish["source"], wish.get("type"))
        if track is None:
            return _json(403, {"error": "NOT_ALLOWED"})
        return _json(200, json_format.MessageToDict(track))

    def _unpublish(self, wish: dict[str, Any]) -> Reply:
        self._sfu.unpublish(wish["room"], wish["identity"], wish["track_sid"])
        return _json(200, {})

    def _rooms(self) -> dict[str, Any]:
        return {
            alias: [json_format.MessageToDict(who.info()) for who in room.participants.values()]
            for alias, room in self._sfu.rooms.items()
        }


def _json(status: int, value: Any) -> Reply:
    return Reply(status, json.dumps(value, indent=1).encode() + b"\n", [("Content-Type", "application/json")])
