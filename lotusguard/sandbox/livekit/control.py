# SPDX-License-Identifier: Apache-2.0
"""Routes that move the stand-in SFU's clients, for use with curl. Sandbox."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format

from lotusguard.sandbox.livekit.participant import JoinRefused
from lotusguard.sandbox.livekit.sfu import Sfu
from lotusguard.sandbox.wire import Asked, Reply


class SfuControl:
    """``POST /sandbox/join {"token", "publish"?}``, ``/sandbox/leave {"room", "identity"}``,
    ``/sandbox/publish {"room", "identity", "source", "type"?}``, ``/sandbox/unpublish {…, "track_sid"}`` and
    ``GET /sandbox/rooms``. LiveKit has no such routes.
    """

    def __init__(self, sfu: Sfu) -> None:
        self._sfu = sfu

    def answer(self, asked: Asked) -> Reply:
        """Carry out the request; errors are one line of JSON."""
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

    def _join(self, body: dict[str, Any]) -> Reply:
        participant = self._sfu.connect(body["token"], body.get("publish"))
        joined = json_format.MessageToDict(participant.info())
        return _json(200, {"room": participant.room.name, "participant": joined})

    def _leave(self, body: dict[str, Any]) -> Reply:
        self._sfu.disconnect(body["room"], body["identity"])
        return _json(200, {})

    def _publish(self, body: dict[str, Any]) -> Reply:
        track = self._sfu.publish_track(body["room"], body["identity"], body["source"], body.get("type"))
        if track is None:
            return _json(403, {"error": "NOT_ALLOWED"})
        return _json(200, json_format.MessageToDict(track))

    def _unpublish(self, body: dict[str, Any]) -> Reply:
        self._sfu.unpublish(body["room"], body["identity"], body["track_sid"])
        return _json(200, {})

    def _rooms(self) -> dict[str, Any]:
        return {
            alias: [json_format.MessageToDict(who.info()) for who in room.participants.values()]
            for alias, room in self._sfu.rooms.items()
        }


def _json(status: int, value: Any) -> Reply:
    return Reply(status, json.dumps(value, indent=1).encode() + b"\n", [("Content-Type", "application/json")])
