# SPDX-License-Identifier: Apache-2.0
"""Media clients for the tests: LiveKit's own SDK with synthetic frames, many participants in one process. Tests.

Commands come as JSON lines on stdin, answers with the same ``id`` go to stdout; see `callers` for the other end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from livekit import rtc

WIDTH, HEIGHT, FRAMES_PER_SECOND = 320, 180, 10
SAMPLE_RATE, SAMPLES = 48_000, 480
AUDIBLE = ("MICROPHONE", "SCREEN_SHARE_AUDIO")
SOURCES = {
    "CAMERA": rtc.TrackSource.SOURCE_CAMERA,
    "MICROPHONE": rtc.TrackSource.SOURCE_MICROPHONE,
    "SCREEN_SHARE": rtc.TrackSource.SOURCE_SCREENSHARE,
    "SCREEN_SHARE_AUDIO": rtc.TrackSource.SOURCE_SCREENSHARE_AUDIO,
}
"""The SDK's sources by LiveKit's names for them."""
NAMES = {number: name for name, number in SOURCES.items()}


class Caller:
    """One participant: a room connection, what it publishes and what it has received."""

    def __init__(self, *, listen: bool) -> None:
        self.room = rtc.Room()
        self.listen = listen
        self.gone: dict[str, float] = {}
        """When a track of another participant ended, by ``identity/SOURCE``."""
        self.frames: Counter[str] = Counter()
        """Frames received, by ``identity/SOURCE``."""
        self.last_frame: dict[str, float] = {}
        """When the last frame was received, by ``identity/SOURCE``."""
        self.ended: str | None = None
        self.ended_at: float | None = None
        self.rights_changed_at: float | None = None
        self.reconnects = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.room.on("track_unpublished", self._unpublished)
        self.room.on("disconnected", self._disconnected)
        self.room.on("reconnecting", self._reconnecting)
        self.room.on("participant_permissions_changed", self._rights_changed)
        self.room.on("track_subscribed", self._subscribed)

    def _unpublished(self, publication: rtc.RemoteTrackPublication, participant: rtc.RemoteParticipant) -> None:
        self.gone[f"{participant.identity}/{NAMES[publication.source]}"] = time.time()

    def _disconnected(self, reason: int) -> None:
        self.ended = rtc.DisconnectReason.Name(reason)  # type: ignore[arg-type]
        self.ended_at = time.time()

    def _rights_changed(self, participant: rtc.Participant, *_: Any) -> None:
        if participant is self.room.local_participant:
            self.rights_changed_at = time.time()

    def _reconnecting(self) -> None:
        self.reconnects += 1

    def _subscribed(self, track: rtc.Track, publication: Any, participant: rtc.RemoteParticipant) -> None:
        if self.listen:
            self.run(self._receive(track, f"{participant.identity}/{NAMES[publication.source]}"))

    async def _receive(self, track: rtc.Track, name: str) -> None:
        stream: Any = (rtc.AudioStream if track.kind == rtc.TrackKind.KIND_AUDIO else rtc.VideoStream)(track)
        async for _ in stream:
            self.frames[name] += 1
            self.last_frame[name] = time.time()
        await stream.aclose()

    def run(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # -- commands ----------------------------------------------------------------------------------------

    async def publish(self, source: str, video: bool | None = None, patience: float = 10.0) -> None:
        """Publish synthetic frames under a source's label.

        :param video: whether the track really is video; by default what its label says.
        :param patience: seconds to wait for LiveKit to accept it.
        """
        track: Any
        if source in AUDIBLE and not video:
            sound = rtc.AudioSource(SAMPLE_RATE, 1)
            track, pump = rtc.LocalAudioTrack.create_audio_track(source, sound), self._noise(sound)
        else:
            picture = rtc.VideoSource(WIDTH, HEIGHT)
            track, pump = rtc.LocalVideoTrack.create_video_track(source, picture), self._pictures(picture)
        options = rtc.TrackPublishOptions(source=SOURCES[source], simulcast=False)
        self.run(pump)
        published = self.room.local_participant.publish_track(track, options)
        await asyncio.wait_for(published, patience)

    async def _noise(self, source: rtc.AudioSource) -> None:
        samples = bytes(range(256)) * (SAMPLES * 2 // 256) + bytes(SAMPLES * 2 % 256)
        while self.ended is None:
            await source.capture_frame(rtc.AudioFrame(samples, SAMPLE_RATE, 1, SAMPLES))

    async def _pictures(self, source: rtc.VideoSource) -> None:
        grey = 0
        while self.ended is None:
            grey = (grey + 8) % 256
            pixels = bytes([grey, 128, 255 - grey, 255]) * (WIDTH * HEIGHT)
            source.capture_frame(rtc.VideoFrame(WIDTH, HEIGHT, rtc.VideoBufferType.RGBA, pixels))
            await asyncio.sleep(1 / FRAMES_PER_SECOND)

    def look(self) -> dict[str, Any]:
        return {
            "identity": self.room.local_participant.identity,
            "ended": self.ended,
            "ended_at": self.ended_at,
            "rights_changed_at": self.rights_changed_at,
            "reconnects": self.reconnects,
            "gone": self.gone,
            "frames": self.frames,
            "last_frame": self.last_frame,
            "others": {
                identity: sorted(NAMES[track.source] for track in other.track_publications.values())
                for identity, other in self.room.remote_participants.items()
            },
            "may_publish": self._may_publish(),
        }

    def _may_publish(self) -> list[str]:
        permissions = self.room.local_participant.permissions if self.room.isconnected() else None
        if permissions is None or not permissions.can_publish:
            return []
        return sorted(NAMES[number] for number in permissions.can_publish_sources or NAMES)

    async def leave(self) -> None:
        if self.ended is None:
            await self.room.disconnect()
            self.ended = self.ended or "LEFT"
        for task in list(self.tasks):
            task.cancel()


class Participants:
    """All participants of this process, by the names that the test gave them."""

    def __init__(self) -> None:
        self.callers: dict[str, Caller] = {}

    async def join(self, who: str, url: str, token: str, listen: bool = False) -> dict[str, Any]:
        caller = Caller(listen=listen)
        began = time.time()
        await caller.room.connect(url, token, rtc.RoomOptions(auto_subscribe=listen, connect_timeout=10.0))
        self.callers[who] = caller
        now = time.time()
        return {**caller.look(), "seconds": now - began, "connected_at": now}

    async def publish(self, who: str, source: str, **how: Any) -> dict[str, Any]:
        await self.callers[who].publish(source, **how)
        return self.callers[who].look()

    async def look(self, who: str) -> dict[str, Any]:
        return self.callers[who].look()

    async def leave(self, who: str) -> dict[str, Any]:
        await self.callers.pop(who).leave()
        return {}

    async def all_leave(self) -> dict[str, Any]:
        await asyncio.gather(*(self.leave(who) for who in list(self.callers)))
        return {}


async def main() -> None:
    participants = Participants()
    lines: asyncio.StreamReader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    at_work: set[asyncio.Task[None]] = set()
    while line := await lines.readline():
        task = asyncio.ensure_future(answer(participants, json.loads(line)))
        at_work.add(task)
        task.add_done_callback(at_work.discard)
    await participants.all_leave()


async def answer(participants: Participants, asked: dict[str, Any]) -> None:
    number = asked.pop("id")
    do: Callable[..., Awaitable[dict[str, Any]]] = getattr(participants, asked.pop("do"))
    try:
        told = {"id": number, "told": await do(**asked)}
    except (rtc.ConnectError, rtc.participant.PublishTrackError, TimeoutError) as refused:
        told = {"id": number, "refused": f"{type(refused).__name__}: {refused}"}
    except Exception as error:  # the test gets every error
        told = {"id": number, "error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
