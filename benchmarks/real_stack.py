# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.real_stack``: figures from the real Synapse, lk-jwt-service and LiveKit. Benchmarks.

It needs the same as ``tests/real``: LIVEKIT_SERVER and LK_JWT_SERVICE, or both programs on PATH. With names of
measurements as arguments (``joins changes members call``) it makes only those. See ``docs/real-stack.md``.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from lotusguard.rules.identity import room_alias
from tests.real.callers import Call
from tests.real.processes import eventually, http
from tests.real.stack import Stack, executable
from tests.real.timings import (
    ban_holder_of_tokens,
    demote,
    promote,
    remove_publisher,
    session_length,
    silent_audience,
)

FORBIDDEN = {"allow_screenshare": False}
JOINS, CHANGES, DEFAULT_CHANGES, RECONNECTIONS = 100, 12, 8, 20
CALL_OF, CALL_SECONDS = 20, 30.0


def main() -> None:
    livekit_server = executable("LIVEKIT_SERVER", "livekit-server")
    lk_jwt_service = executable("LK_JWT_SERVICE", "lk-jwt-service")
    if livekit_server is None or lk_jwt_service is None:
        raise SystemExit("LIVEKIT_SERVER and LK_JWT_SERVICE must name executables")
    with TemporaryDirectory() as place:
        stack = Stack(Path(place), livekit_server, lk_jwt_service)
        try:
            stack.start()
            for name, measure in MEASUREMENTS.items():
                if name in sys.argv[1:] or not sys.argv[1:]:
                    measure(stack)
        finally:
            stack.stop()


def say(name: str, seconds: Sequence[float], unit: str = "ms") -> None:
    """One row of the table: count, median, 95th percentile, worst."""
    scale = 1000 if unit == "ms" else 1
    ordered = [scale * one for one in sorted(seconds)]
    p95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    figures = " | ".join(
        f"{figure:.{0 if unit == 'ms' else 1}f}" for figure in (statistics.median(ordered), p95, ordered[-1])
    )
    line(f"| {name} | {len(ordered)} | {figures} | {unit} |")


def line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def joins(stack: Stack) -> None:
    """How long a token takes, from lk-jwt-service itself and through the guard, in turns."""
    stack.run_guard()
    users = stack.users(*["somebody"] * 5)
    free, capped, full = stack.room(), stack.room(100, allow_screenshare=False), stack.room(1)
    for user in users:
        for room_id in (free, capped, full):
            stack.join(user, room_id)
    stack.enter(stack.moderator, full)
    asked: list[tuple[str, str, str, int]] = [
        ("token from lk-jwt-service itself", stack.upstream_url, free, 200),
        ("token through the guard, room without a policy", stack.guard_url, free, 200),
        ("token through the guard, limit and forbidden source", stack.guard_url, capped, 200),
        ("refusal by the guard, room full", stack.guard_url, full, 403),
    ]
    taken: dict[str, list[float]] = {name: [] for name, *_ in asked}
    for turn in range(JOINS):
        user = users[turn % len(users)]
        for name, base, room_id, status in asked:
            member = {"id": str(uuid4()), "claimed_user_id": user, "claimed_device_id": "PHONE"}
            token = stack.openid_token(user)
            body = {"room_id": room_id, "slot_id": "m.call#ROOM", "openid_token": token, "member": member}
            began = time.perf_counter()
            answer = http("POST", f"{base}/get_token", body)
            taken[name].append(time.perf_counter() - began)
            assert answer.status == status, (name, answer.status, answer.body)
    for name, seconds in taken.items():
        say(name, seconds)


def changes(stack: Stack) -> None:
    """How long after a new policy was sent a running screen share ends for the others."""
    stack.run_guard(pushed=True, guard_reconcile_interval=3600, guard_policy_ttl=600)
    say("screen share gone after a change: pushed by the module in Synapse", [pushed(stack) for _ in range(CHANGES)])
    stack.run_guard(guard_reconcile_interval=3600, guard_policy_ttl=0.001)
    say("… at a webhook (another publishes a track), policy not cached", [by_webhook(stack) for _ in range(CHANGES)])
    say(
        "a source revoked that an older token still permits, by webhook",
        [revoked_at_join(stack) for _ in range(CHANGES)],
    )
    stack.run_guard(guard_reconcile_interval=3, guard_policy_ttl=0.001)
    say("… by reconciling every 3 s, policy not cached", [alone(stack) for _ in range(CHANGES)])
    stack.run_guard()
    say("… with the defaults (3 s, TTL 10 s)", [alone(stack) for _ in range(DEFAULT_CHANGES)])


def sharing(stack: Stack) -> tuple[str, Call, Call]:
    alice, bob = stack.users("alice", "bob")
    room_id = stack.room()
    listener, speaker = stack.enter(alice, room_id), stack.enter(bob, room_id, new=True)
    speaker.publish("SCREEN_SHARE")
    eventually(lambda: listener.tracks_of(speaker) == ["SCREEN_SHARE"])
    eventually(lambda: any(one["tracks"] for one in stack.participants(room_id)))
    return room_id, listener, speaker


def since(began: float, listener: Call, speaker: Call) -> float:
    gone: dict[str, float] = eventually(lambda: listener.look()["gone"], 30.0, "the end of the screen share")
    for one in (speaker, listener):
        one.leave()
    return min(gone.values()) - began


def pushed(stack: Stack) -> float:
    room_id, listener, speaker = sharing(stack)
    began = time.time()
    stack.set_state(room_id, "io.lotus.room_quality", FORBIDDEN)
    return since(began, listener, speaker)


def by_webhook(stack: Stack) -> float:
    room_id, listener, speaker = sharing(stack)
    stack.set_state(room_id, "io.lotus.room_quality", FORBIDDEN)
    began = time.time()
    listener.publish("MICROPHONE")
    return since(began, listener, speaker)


def alone(stack: Stack) -> float:
    room_id, listener, speaker = sharing(stack)
    listed = {"names": [room_alias(room_id)]}  # LiveKit counts participants up to 5 s late
    eventually(lambda: stack.sfu_call("ListRooms", listed).content["rooms"][0]["num_participants"] == 2)
    stack.set_state(room_id, "io.lotus.room_quality", FORBIDDEN)
    return since(time.time(), listener, speaker)


def revoked_at_join(stack: Stack) -> float:
    (alice,) = stack.users("alice")
    room_id = stack.room()
    wide = stack.ask_token(alice, room_id).content["jwt"]
    stack.set_state(room_id, "io.lotus.room_quality", FORBIDDEN)
    speaker = stack.connect(alice, wide)
    began = time.time()
    eventually(lambda: speaker.look()["may_publish"] == ["CAMERA", "MICROPHONE"], 10.0, "the revocation")
    took = time.time() - began
    speaker.leave()
    return took


def members(stack: Stack) -> None:
    """How long after a ban a publisher is gone, how long they stay when they reconnect, and how fast rights change."""
    stack.run_guard(pushed=True, guard_reconcile_interval=3600, guard_policy_ttl=600)
    removals = [remove_publisher(stack, late_frames=2.0) for _ in range(CHANGES)]
    say("banned while publishing: session ended", [removal.ended for removal in removals])
    say("… last frame at a third participant", [removal.last_frame for removal in removals])
    banned = ban_holder_of_tokens(stack)
    for name, token in zip(("first", "refreshed"), banned.tokens, strict=True):
        lengths = [session_length(stack, banned.user, token) for _ in range(RECONNECTIONS)]
        connected = [length for length in lengths if length is not None]
        say(f"banned, reconnects with the {name} token: connected for", connected)
        line(f"| … removed before the client was connected | {len(lengths) - len(connected)} | | | | |")
    promoted, demoted = [], []
    for _ in range(CHANGES):
        audience = silent_audience(stack)
        promoted.append(promote(stack, audience))
        audience.speaker.publish("MICROPHONE")
        audience.listener.hears(audience.speaker, "MICROPHONE")
        demoted.append(demote(stack, audience))
        audience.speaker.leave()
        audience.listener.leave()
    say("promoted by power level: the client may publish", promoted)
    say("demoted by power level: the track is gone", demoted)


def call(stack: Stack) -> None:
    """Processor time of the guard while nothing happens, and during a call with microphones in a room with a policy."""
    stack.run_guard()
    assert stack.guard is not None
    share: dict[str, list[float]] = {}

    def watch(name: str, seconds: float) -> None:
        before, began = programs(stack), time.perf_counter()
        time.sleep(seconds)
        passed = time.perf_counter() - began
        for program, used in programs(stack).items():
            share.setdefault(f"{program}, {name}", []).append(100 * (used - before[program]) / passed)

    watch("no call", CALL_SECONDS / 3)
    room_id = stack.room(50, allow_screenshare=False)
    before = programs(stack)
    calls = [stack.enter(user, room_id, new=True) for user in stack.users(*["somebody"] * CALL_OF)]
    for one in calls:
        one.publish("MICROPHONE")
    joined = programs(stack)["guard"] - before["guard"]
    for _ in range(3):
        watch(f"a call of {CALL_OF}", CALL_SECONDS / 3)
    assert all(one.ended is None for one in calls)
    each = 1000 * joined / CALL_OF
    line(f"| guard, {CALL_OF} joins and their microphones, each | {CALL_OF} | {each:.1f} | | | ms of processor time |")
    for name, percent in share.items():
        say(name, percent, "% of one core")
    line(f"| guard, resident memory | 1 | {memory(stack):.0f} | | | MB |")


def programs(stack: Stack) -> dict[str, float]:
    assert stack.guard is not None
    running: dict[str, Any] = {"guard": stack.guard, "LiveKit": stack.sfu}
    return {name: program.cpu_seconds() for name, program in running.items()}


def memory(stack: Stack) -> float:
    assert stack.guard is not None
    assert stack.guard.process is not None
    pages = int(Path(f"/proc/{stack.guard.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


MEASUREMENTS: dict[str, Callable[[Stack], None]] = {
    "joins": joins,
    "changes": changes,
    "members": members,
    "call": call,
}


if __name__ == "__main__":
    main()
