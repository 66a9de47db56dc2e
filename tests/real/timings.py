# SPDX-License-Identifier: Apache-2.0
"""Scenarios that the tests check and the benchmark measures: bans, reconnections, changed rights. Tests."""

from __future__ import annotations

import time
from collections.abc import Sequence

from attrs import frozen

from tests.real.callers import Call, Refused
from tests.real.processes import eventually
from tests.real.signalling import signalling
from tests.real.stack import Stack

SPEAKERS = 50
"""The power level that may speak in the rooms of these tests."""


@frozen
class Removal:
    """How long it took, in seconds from the moderator's request, until a user was removed.

    :ivar ended: until their session ended.
    :ivar last_frame: until the last of their frames reached another participant.
    """

    ended: float
    last_frame: float


def remove_publisher(stack: Stack, action: str = "ban", late_frames: float = 4.0) -> Removal:
    """Ban or kick a user who publishes sound and video, or let them leave the Matrix room.

    :param late_frames: seconds for which frames are awaited that must not arrive.
    """
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    listener, speaker = stack.enter(alice, room_id, listen=True), stack.enter(bob, room_id, new=True)
    for source in ("MICROPHONE", "CAMERA"):
        speaker.publish(source)
        listener.hears(speaker, source)
    identity = speaker.identity
    began = time.time()
    if action == "leave":
        stack.leave(bob, room_id)
    else:
        stack.moderate(action, bob, room_id)
    ended = speaker.removed() - began
    time.sleep(late_frames)
    frames = listener.look()["last_frame"]
    assert listener.ended is None
    listener.leave()
    last_frame = max(at for name, at in frames.items() if name.startswith(f"{identity}/"))
    return Removal(ended, last_frame - began)


@frozen
class Banned:
    """A user who was banned in a call, and the tokens that they still have."""

    user: str
    room_id: str
    tokens: Sequence[str]
    """The one that they were given, and the one that LiveKit gave them in its place."""


def ban_holder_of_tokens(stack: Stack) -> Banned:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    stack.enter(alice, room_id)
    first = str(stack.ask_token(bob, room_id).content["jwt"])
    with signalling(stack.sfu_url, first) as connection:
        refreshed = connection.refreshed_token()
    speaker = stack.connect(bob, first)
    stack.moderate("ban", bob, room_id)
    speaker.removed()
    return Banned(bob, room_id, (first, refreshed))


def session_length(stack: Stack, user: str, token: str) -> float | None:
    """Join with a token of a user who may not stay.

    :return: seconds for which they were connected; ``None`` if they were removed before their client was connected.
    """
    try:
        call = stack.connect(user, token)
    except Refused:
        return None
    ended_at = call.removed()
    call.leave()
    return max(0.0, ended_at - call.connected_at)


@frozen
class Audience:
    """A call in which only users from a power level on may publish a microphone."""

    room_id: str
    user: str
    listener: Call
    speaker: Call


def silent_audience(stack: Stack, **needed: int) -> Audience:
    """A call of the moderator, who listens, and of a user who may not publish a microphone."""
    (bob,) = stack.users("bob")
    room_id = stack.room()
    stack.set_state(room_id, "io.lotus.call_permissions", {"microphone": SPEAKERS, **needed})
    listener = stack.enter(stack.moderator, room_id, listen=True)
    return Audience(room_id, bob, listener, stack.enter(bob, room_id))


def promote(stack: Stack, call: Audience) -> float:
    """Let the user speak. :return: seconds until their client knows."""
    before = call.speaker.look()["rights_changed_at"]
    began = time.time()
    stack.set_level(call.room_id, call.user, SPEAKERS)
    eventually(lambda: call.speaker.may_publish("MICROPHONE"), 10.0, "the new right")
    changed_at = call.speaker.look()["rights_changed_at"]
    assert changed_at != before
    return float(changed_at) - began


def demote(stack: Stack, call: Audience) -> float:
    """Take the right to speak from a user who speaks. :return: seconds until the listener loses the track."""
    began = time.time()
    stack.set_level(call.room_id, call.user, 0)
    name = f"{call.speaker.identity}/MICROPHONE"
    gone: dict[str, float] = eventually(
        lambda: gone if name in (gone := call.listener.look()["gone"]) else None, 10.0, "the end of the track"
    )
    return gone[name] - began
