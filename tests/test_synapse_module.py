# SPDX-License-Identifier: Apache-2.0
"""The Synapse module: which events it reports, how it tells the guard, and how that works inside a real Synapse."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock, deferLater
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from lotusguard.rules.state import POLICY_TYPES, POWER_LEVELS, ROOM_QUALITY, VOICE_LIMIT
from lotusguard.sandbox.demo.sandbox import ADMIN_TOKEN
from lotusguard.sandbox.livekit.participant import Participant
from tests.conftest import until
from tests.synapse import Guarded, MakeGuarded, Synapse, User

pytest.importorskip("synapse", reason="matrix-synapse is not installed: its module was not tried")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Synapse's own
    from synapse.api.room_versions import RoomVersions
    from synapse.events import EventBase, make_event_from_dict
    from synapse.module_api.errors import ConfigError

    from lotusguard import synapse_module
    from lotusguard.synapse_module import PolicyPush, PolicyPushConfig, changed_member, changes_policy

URL, TOKEN = "http://127.0.0.1:8072", "operatorsSecret"


# -- configuration ---------------------------------------------------------------------------------------


def test_the_events_are_those_that_the_guard_reads() -> None:
    assert set(synapse_module.POLICY_EVENTS) == {*POLICY_TYPES, POWER_LEVELS}


def test_the_token_is_configured_directly_or_by_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    wanted = PolicyPushConfig("https://[::1]:8072/guard", TOKEN)
    assert PolicyPush.parse_config({"url": "https://[::1]:8072/guard/", "token": TOKEN}) == wanted
    assert PolicyPush.parse_config({"url": "https://[::1]:8072/guard", "token_path": str(file)}) == wanted
    assert TOKEN not in repr(wanted)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"token": TOKEN}, "url"),
        ({"token": TOKEN, "url": ""}, "url"),
        ({"token": TOKEN, "url": "127.0.0.1:8072"}, "url"),
        ({"token": TOKEN, "url": "http://127.0.0.1:x"}, "url"),
        ({"token": TOKEN, "url": "http://me:secret@127.0.0.1"}, "url"),
        ({"token": TOKEN, "url": f"{URL}/?to=guard"}, "url"),
        ({"token": TOKEN, "url": "http://gu ard"}, "url"),
        ({"token": TOKEN, "url": 8072}, "url"),
        ({"url": URL}, "token"),
        ({"url": URL, "token": ""}, "token"),
        ({"url": URL, "token": None}, "token"),
        ({"url": URL, "token": f"{TOKEN}\r\nX-Evil: 1"}, "token"),
        ({"url": URL, "token": TOKEN, "token_path": "/nowhere"}, "token"),
        ({"url": URL, "token_path": "/nowhere/token"}, "token_path"),
        ({"url": URL, "token_path": "/dev/null"}, "token_path"),
        ({"url": URL, "token": TOKEN, "tokens": 1}, "tokens"),
    ],
)
def test_wrong_configuration_is_rejected_in_one_line_that_names_the_key(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PolicyPush.parse_config(config)
    text = refused.value.msg
    assert text.startswith(key)
    assert "expected" in text
    assert list(refused.value.path or ()) == [key]
    assert "\n" not in text
    assert TOKEN not in text
    assert "secret" not in text


def test_the_module_needs_nothing_but_synapse_and_twisted() -> None:
    """Synapse's environment may hold this one file only."""
    program = (
        "import sys, synapse.module_api.errors, twisted.web.client\n"
        "before = set(sys.modules)\n"
        "import lotusguard.synapse_module\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=60)
    assert done.stdout.strip() == "['lotusguard', 'lotusguard.synapse_module']"


# -- which events count ----------------------------------------------------------------------------------


_depths = itertools.count(1)
"""Event IDs do not depend on contents; the depth makes each event a different one."""


def event(kind: str, content: dict[str, Any], *, version: Any = RoomVersions.V11, **more: Any) -> EventBase:
    """An event as Synapse passes it to its modules; without a ``state_key`` it is not a state event."""
    given = {"type": kind, "content": content, "room_id": "!room:real.test", "sender": "@alice:real.test", **more}
    given |= {"depth": next(_depths), "origin_server_ts": 1, "auth_events": [], "prev_events": []}
    given |= {"hashes": {}, "signatures": {}}
    return make_event_from_dict(given, version)


@pytest.mark.parametrize("kind", synapse_module.POLICY_EVENTS)
def test_only_our_state_events_with_an_empty_key_change_the_policy(kind: str) -> None:
    assert changes_policy(event(kind, {"max_users": 2}, state_key=""), {})
    assert changes_policy(event(kind, {}, state_key=""), {})
    assert not changes_policy(event(kind, {}, state_key="@alice:real.test"), {})
    assert not changes_policy(event(kind, {}), {})
    assert not changes_policy(event("m.room.topic", {}, state_key=""), {})
    assert not changes_policy(event("m.room.message", {"body": kind}), {})


@pytest.mark.parametrize(
    ("membership", "reported"), [("join", True), ("leave", True), ("ban", True), ("invite", False), ("knock", False)]
)
def test_users_who_join_leave_or_are_banned_are_reported(membership: str, reported: bool) -> None:
    user = "@bob:real.test"
    new = event("m.room.member", {"membership": membership}, state_key=user)
    assert changed_member(new) == (user if reported else None)
    assert not changes_policy(new, {})


def test_other_events_change_no_membership() -> None:
    assert changed_member(event("m.room.message", {"membership": "leave"})) is None
    assert changed_member(event("m.room.member", {}, state_key="@bob:real.test")) is None


@pytest.mark.parametrize("version", [RoomVersions.V10, RoomVersions.V11])
def test_redacting_the_event_in_force_changes_the_policy(version: Any) -> None:
    """From room version 11 on the redacted event's ID is in the content."""
    older = event(VOICE_LIMIT, {"max_users": 3}, state_key="", version=version)
    newer = event(VOICE_LIMIT, {"max_users": 2}, state_key="", version=version)

    def redaction_of(redacted: EventBase) -> EventBase:
        if version is RoomVersions.V10:
            return event("m.room.redaction", {}, version=version, redacts=redacted.event_id)
        return event("m.room.redaction", {"redacts": redacted.event_id}, version=version)

    state = {(VOICE_LIMIT, ""): newer}
    assert changes_policy(redaction_of(newer), state)
    assert not changes_policy(redaction_of(older), state)
    assert not changes_policy(redaction_of(newer), {})


# -- telling the guard -----------------------------------------------------------------------


class Inside:
    """What the module uses of Synapse, and the guard it tells.

    :ivar tries: for each request its time, URI, Authorization and body; the Deferreds of the answers are in ``open``.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self.tries: list[tuple[float, bytes, Any, Any]] = []
        self.open: list[Deferred[Any]] = []
        self.answer: Callable[[], Deferred[Any]] = Deferred
        self.module = PolicyPush(PolicyPushConfig(URL, TOKEN), self, reactor=self.clock, agent=self)  # type: ignore[arg-type]

    def register_third_party_rules_callbacks(self, *, on_new_event: Any) -> None:
        self.on_new_event = on_new_event

    def delayed_background_call(self, msec: float, f: Callable[..., Any], *args: object, desc: str) -> None:
        self.clock.callLater(msec / 1000, lambda: Deferred.fromCoroutine(f(*args)))

    async def sleep(self, seconds: float) -> None:
        await deferLater(self.clock, seconds)

    def request(self, method: bytes, uri: bytes, headers: Headers, body: Any) -> Deferred[Any]:
        content = json.loads(body._inputFile.getvalue())
        self.tries.append((self.clock.seconds(), method + b" " + uri, headers.getRawHeaders("authorization"), content))
        self.open.append(self.answer())
        return self.open[-1]

    def changed(self, room_id: str = "!room:real.test") -> None:
        """The room's limit changed."""
        self.happened(event(VOICE_LIMIT, {"max_users": 2}, state_key="", room_id=room_id))

    def member(self, name: str, membership: str, room_id: str = "!room:real.test") -> None:
        """Somebody's membership changed."""
        state_key = f"@{name}:real.test"
        self.happened(event("m.room.member", {"membership": membership}, state_key=state_key, room_id=room_id))

    def happened(self, new: EventBase) -> None:
        """A new event. The module does not let Synapse wait."""
        assert Deferred.fromCoroutine(self.on_new_event(new, {})).called

    @property
    def told(self) -> list[tuple[str, str | None]]:
        """Rooms and users of which the guard was told."""
        return [(one[3]["room_id"].split(":")[0], one[3].get("user")) for one in self.tries]

    def run(self, seconds: float) -> None:
        self.clock.pump([0] + [0.05] * round(seconds / 0.05))


class Response:
    """An answer; only its status matters."""

    length = 0

    def __init__(self, code: int) -> None:
        self.code = code
        self.taken = False

    def deliverBody(self, protocol: Any) -> None:
        self.taken = True


def refused() -> Deferred[Any]:
    failed: Deferred[Any] = Deferred()
    failed.errback(ConnectionRefusedError())
    return failed


@pytest.fixture
def inside() -> Inside:
    return Inside()


def test_the_guard_is_told_without_delaying_synapse(inside: Inside) -> None:
    inside.changed()
    assert inside.tries == []
    inside.run(0)
    assert [one[1:] for one in inside.tries] == [
        (b"POST http://127.0.0.1:8072/policy-changed", [f"Bearer {TOKEN}"], {"room_id": "!room:real.test"})
    ]
    response = Response(202)
    inside.open[0].callback(response)
    inside.run(30)
    assert response.taken
    assert len(inside.tries) == 1


def test_changes_during_a_request_are_reported_by_one_more_request(inside: Inside) -> None:
    inside.changed()
    inside.run(0)
    for _ in range(5):
        inside.changed()
    inside.changed("!other:real.test")
    inside.run(0)
    assert [one[3]["room_id"] for one in inside.tries] == ["!room:real.test", "!other:real.test"]
    inside.open[0].callback(Response(202))
    assert len(inside.tries) == 3
    inside.open[2].callback(Response(202))
    inside.changed()
    inside.run(0)
    assert len(inside.tries) == 4


def test_report_is_retried_for_ten_seconds_while_the_guard_is_down(
    inside: Inside, caplog: pytest.LogCaptureFixture
) -> None:
    inside.answer = refused
    inside.changed()
    inside.run(1)
    inside.changed()  # reported by the attempts that follow
    inside.run(60)
    assert [round(one[0], 1) for one in inside.tries] == [0, 0.2, 0.8, 1.8, 3.8, 7.8]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "!room:real.test" in caplog.text
    assert "refused" in caplog.text
    assert TOKEN not in caplog.text
    inside.answer = lambda: succeed(Response(202))
    inside.changed()
    inside.run(0)
    assert len(inside.tries) == 7


def test_a_request_that_is_not_answered_times_out(inside: Inside, caplog: pytest.LogCaptureFixture) -> None:
    inside.changed()
    inside.run(60)
    times = [one[0] for one in inside.tries]
    assert all(later - earlier >= synapse_module.TIMEOUT for earlier, later in itertools.pairwise(times))
    assert times[-1] <= synapse_module.GIVE_UP
    assert all(asked.called for asked in inside.open)
    assert "TimeoutError" in caplog.text


@pytest.mark.parametrize("code", [500, 503, 429])
def test_report_is_retried_after_an_error_of_the_guard(
    inside: Inside, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    inside.answer = lambda: succeed(Response(code if len(inside.tries) < 3 else 202))
    inside.changed()
    inside.run(60)
    assert len(inside.tries) == 3
    assert caplog.records == []


@pytest.mark.parametrize(("code", "hint"), [(401, "token"), (403, "token"), (404, "url"), (400, "url"), (301, "url")])
def test_a_refusal_is_final_and_logged_with_the_key_to_correct(
    inside: Inside, code: int, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    inside.answer = lambda: succeed(Response(code))
    inside.changed()
    inside.run(60)
    assert len(inside.tries) == 1
    assert str(code) in caplog.text
    assert f"the {hint} must be" in caplog.text
    assert TOKEN not in caplog.text


def test_rooms_beyond_the_limit_are_dropped_with_one_warning(inside: Inside, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(synapse_module.ROOMS_AT_ONCE + 50):
        inside.changed(f"!{number}:real.test")
    inside.run(0)
    assert len(inside.tries) == synapse_module.ROOMS_AT_ONCE
    assert len(caplog.records) == 1
    for asked in inside.open:
        asked.callback(Response(202))
    inside.changed("!late:real.test")
    inside.run(0)
    assert inside.tries[-1][3] == {"room_id": "!late:real.test"}


def test_a_user_who_leaves_is_named(inside: Inside) -> None:
    inside.answer = lambda: succeed(Response(202))
    inside.member("bob", "leave")
    inside.member("carol", "ban")
    inside.run(0)
    assert inside.told == [("!room", "@bob:real.test"), ("!room", "@carol:real.test")]


def test_a_burst_of_leaves_is_reported_as_one_change_of_the_room(inside: Inside) -> None:
    inside.answer = lambda: succeed(Response(202))
    for number in range(synapse_module.MOST_USERS + 1):
        inside.member(f"user{number}", "leave")
    inside.run(0)
    assert inside.told == [("!room", None)]


def test_a_changed_policy_includes_the_members_who_changed(inside: Inside) -> None:
    inside.answer = lambda: succeed(Response(202))
    inside.member("bob", "leave")
    inside.changed()
    inside.member("carol", "leave")
    inside.run(0)
    assert inside.told == [("!room", None)]


def test_a_leave_during_the_last_attempt_is_not_lost(inside: Inside) -> None:
    inside.answer = lambda: succeed(Response(404))
    inside.member("bob", "leave")
    waiting: Deferred[Any] = Deferred()
    inside.answer = lambda: waiting
    inside.run(0)
    inside.member("carol", "ban")
    inside.answer = lambda: succeed(Response(202))
    waiting.callback(Response(404))
    inside.run(0)
    assert inside.told[0] == ("!room", "@bob:real.test")
    assert ("!room", "@carol:real.test") in inside.told[1:]


def test_a_join_is_reported_once_and_not_for_each_new_display_name(inside: Inside) -> None:
    inside.answer = lambda: succeed(Response(202))
    for membership in ("join", "join", "leave", "join", "join"):
        inside.member("bob", membership)
        inside.run(0)
    assert len(inside.told) == 3


def test_joins_leave_room_for_more_urgent_changes(inside: Inside) -> None:
    for number in range(2 * synapse_module.ROOMS_AT_ONCE):
        inside.member("bob", "join", f"!{number}:real.test")
    inside.member("bob", "ban", "!banned:real.test")
    inside.run(0)
    assert len(inside.told) == synapse_module.ROOMS_AT_ONCE_FOR_JOINS + 1
    assert inside.told[-1] == ("!banned", "@bob:real.test")


# -- inside a real Synapse -------------------------------------------------------------------------------


async def sharing(guarded: Guarded) -> tuple[User, str, Participant]:
    """A room's admin who shares their screen in its call."""
    alice = await guarded.synapse.user("alice")
    room_id = await guarded.synapse.room_of(alice)
    alices: Participant = await guarded.enter(alice, room_id)
    assert alices.publish("MICROPHONE")
    assert alices.publish("SCREEN_SHARE")
    return alice, room_id, alices


async def pushed(set_guarded: MakeGuarded, synapse: Synapse, **settings: object) -> Guarded:
    """A guard that notices changes within the hour only if it is told."""
    given = {"guard_admin_port": synapse.guard_port, "guard_policy_ttl": 3600}
    return await set_guarded(**{**given, **settings})


def sources_of(participant: Participant) -> list[int]:
    return sorted(track.source for track in participant.tracks.values())


@pytest_twisted.ensureDeferred
async def test_a_forbidden_screen_share_ends_in_the_running_call(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse)
    alice, room_id, alices = await sharing(guarded)
    await synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False})
    await until(lambda: sources_of(alices) == [2])


@pytest_twisted.ensureDeferred
async def test_a_new_limit_applies_to_the_next_join(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse)
    alice, room_id, _ = await sharing(guarded)
    bob = await synapse.user("bob")
    await synapse.change_membership(bob, room_id, "join")
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    await guarded.limit_becomes(room_id, 1)
    assert (await guarded.ask_token(bob, room_id)).code == 403
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
    await guarded.limit_becomes(room_id, 2)
    assert (await guarded.ask_token(bob, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_redacted_policy_is_no_longer_enforced(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse, guard_restore=True)
    alice, room_id, alices = await sharing(guarded)
    forbidding = await synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False})
    await until(lambda: sources_of(alices) == [2])
    await synapse.redact(alice, room_id, forbidding)
    await until(lambda: alices.publish("SCREEN_SHARE"))


@pytest_twisted.ensureDeferred
async def test_a_refused_token_is_logged_without_the_token(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse, guard_admin_token="another")
    alice, room_id, alices = await sharing(guarded)
    await synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False})
    await until(lambda: f"the guard that {room_id} changed: it answers 403" in synapse.log())
    assert ADMIN_TOKEN not in synapse.log()
    assert sources_of(alices) == [2, 3]


class SilentGuard:
    """Accepts connections where the guard should be, and never answers."""

    def __init__(self, synapse: Synapse) -> None:
        self._held = ExitStack()
        self._listener = self._held.enter_context(socket.socket())
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", synapse.guard_port))
        self._listener.listen()

    def __enter__(self) -> SilentGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def told_of(self, room_id: str) -> bytes:
        """Wait for Synapse to tell of that room. :return: its request."""
        self._listener.settimeout(10)
        while True:
            connection = self._held.enter_context(self._listener.accept()[0])
            asked = b""
            while not asked.endswith(b"}"):
                asked += connection.recv(65536)
            if json.loads(asked.partition(b"\r\n\r\n")[2])["room_id"] == room_id:
                return asked

    def forget(self) -> None:
        """Drop the requests that have come already."""
        self._listener.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                self._held.enter_context(self._listener.accept()[0])


@pytest_twisted.ensureDeferred
async def test_synapse_does_not_wait_for_the_guard(synapse: Synapse) -> None:
    """Clients see the event while the module still tries to report it."""
    alice = await synapse.user("alice")
    room_id = await synapse.create_room(alice)
    polling = Deferred.fromCoroutine(synapse.saw(alice, VOICE_LIMIT, await synapse.saw(alice)))
    with SilentGuard(synapse) as silent:
        await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
        await polling
        silent.forget()
        assert silent.told_of(room_id).startswith(b"POST /policy-changed HTTP/1.1\r\n")
    assert (await synapse.ask("GET", "/_matrix/client/versions"))[0] == 200


@pytest_twisted.ensureDeferred
async def test_a_guard_that_comes_back_learns_what_changed_while_it_was_down(synapse: Synapse) -> None:
    alice = await synapse.user("alice")
    room_id = await synapse.create_room(alice)
    polling = Deferred.fromCoroutine(synapse.saw(alice, VOICE_LIMIT, await synapse.saw(alice)))
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
    await polling
    with SilentGuard(synapse) as silent:
        assert f"Bearer {ADMIN_TOKEN}".encode() in silent.told_of(room_id)


class RecordingGuard(Resource):
    """Accepts every report. :ivar told: the bodies."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, str]] = []

    def render_POST(self, request: Request) -> bytes:
        assert request.content is not None
        self.told.append(json.loads(request.content.read()))
        request.setResponseCode(202)
        return b"{}"


@pytest_twisted.ensureDeferred
async def test_the_real_synapse_reports_who_was_kicked_and_banned(synapse: Synapse) -> None:
    alice, bob = await synapse.user("alice"), await synapse.user("bob")
    guard = RecordingGuard()
    endpoint = serverFromString(reactor, f"tcp:{synapse.guard_port}:interface=127.0.0.1")
    port = await endpoint.listen(Site(guard))
    try:
        room_id = await synapse.create_room(alice, preset="public_chat")
        for action, by in (("join", bob), ("kick", alice), ("ban", alice)):
            before = len(guard.told)
            await synapse.change_membership(by, room_id, action, bob if by is alice else None)
            change = {"room_id": room_id, "user": bob.user_id}
            await until(lambda before=before, change=change: change in guard.told[before:])  # type: ignore[misc]
    finally:
        await port.stopListening()
