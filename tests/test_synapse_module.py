# SPDX-License-Identifier: Apache-2.0
"""The Synapse module: what it makes of events, how it tells the guard, and the whole way inside a real Synapse."""

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
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock, deferLater
from twisted.web.http_headers import Headers

from lotusguard.rules import policy
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
    from lotusguard.synapse_module import PolicyPush, PolicyPushConfig, changes_policy

VOICE_LIMIT, ROOM_QUALITY = synapse_module.POLICY_EVENTS
URL, TOKEN = "http://127.0.0.1:8072", "operatorsSecret"


# -- configuration ---------------------------------------------------------------------------------------


def test_the_events_are_those_that_the_guard_reads() -> None:
    assert set(synapse_module.POLICY_EVENTS) == {policy.VOICE_LIMIT, policy.ROOM_QUALITY}


def test_a_token_is_taken_as_it_is_or_from_a_file(tmp_path: Path) -> None:
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
def test_a_wrong_configuration_is_refused_in_one_line_that_names_the_key(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PolicyPush.parse_config(config)
    text = refused.value.msg
    assert text.startswith(key)
    assert "expected" in text
    assert list(refused.value.path or ()) == [key]
    assert "\n" not in text
    assert TOKEN not in text
    assert "secret" not in text


def test_nothing_but_synapse_and_twisted_is_needed() -> None:
    """Synapse's environment may have just this one file of ours."""
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
"""Makes every event another one: contents do not count for event IDs."""


def event(kind: str, content: dict[str, Any], *, version: Any = RoomVersions.V11, **more: Any) -> EventBase:
    """An event as Synapse hands it to its modules; without a ``state_key`` it is no state."""
    given = {"type": kind, "content": content, "room_id": "!room:real.test", "sender": "@alice:real.test", **more}
    given |= {"depth": next(_depths), "origin_server_ts": 1, "auth_events": [], "prev_events": []}
    given |= {"hashes": {}, "signatures": {}}
    return make_event_from_dict(given, version)


@pytest.mark.parametrize("kind", [VOICE_LIMIT, ROOM_QUALITY])
def test_our_state_events_with_the_empty_key_change_the_policy_and_no_others_do(kind: str) -> None:
    assert changes_policy(event(kind, {"max_users": 2}, state_key=""), {})
    assert changes_policy(event(kind, {}, state_key=""), {})
    assert not changes_policy(event(kind, {}, state_key="@alice:real.test"), {})
    assert not changes_policy(event(kind, {}), {})
    assert not changes_policy(event("m.room.topic", {}, state_key=""), {})
    assert not changes_policy(event("m.room.message", {"body": kind}), {})


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


# -- telling the guard, by a clock -----------------------------------------------------------------------


class Inside:
    """As much of Synapse as the module sees, and the guard it tells.

    :ivar tries: for each request its time, URI, Authorization and body; as yet unanswered ones in ``open``.
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
        """The room's cap changed. The module is done with it when this returns."""
        new = event(VOICE_LIMIT, {"max_users": 2}, state_key="", room_id=room_id)
        assert Deferred.fromCoroutine(self.on_new_event(new, {})).called

    def run(self, seconds: float) -> None:
        self.clock.pump([0] + [0.05] * round(seconds / 0.05))


class Response:
    """An answer of which only the status is looked at."""

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


def test_the_guard_is_told_the_room_and_the_token_after_synapse_went_on(inside: Inside) -> None:
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


def test_changes_while_the_guard_is_being_told_make_one_more_telling(inside: Inside) -> None:
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


def test_a_guard_that_is_away_is_tried_for_ten_seconds_and_then_left_alone(
    inside: Inside, caplog: pytest.LogCaptureFixture
) -> None:
    inside.answer = refused
    inside.changed()
    inside.run(1)
    inside.changed()  # told by the tries that are still to come
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


def test_a_guard_that_never_answers_is_waited_for_two_seconds_a_try(
    inside: Inside, caplog: pytest.LogCaptureFixture
) -> None:
    inside.changed()
    inside.run(60)
    times = [one[0] for one in inside.tries]
    assert all(later - earlier >= synapse_module.TIMEOUT for earlier, later in itertools.pairwise(times))
    assert times[-1] <= synapse_module.GIVE_UP
    assert all(asked.called for asked in inside.open)
    assert "TimeoutError" in caplog.text


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_guard_that_is_ill_is_told_again(inside: Inside, code: int, caplog: pytest.LogCaptureFixture) -> None:
    inside.answer = lambda: succeed(Response(code if len(inside.tries) < 3 else 202))
    inside.changed()
    inside.run(60)
    assert len(inside.tries) == 3
    assert caplog.records == []


@pytest.mark.parametrize(("code", "hint"), [(401, "token"), (403, "token"), (404, "url"), (400, "url"), (301, "url")])
def test_a_refusal_is_final_and_says_which_key_to_look_at(
    inside: Inside, code: int, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    inside.answer = lambda: succeed(Response(code))
    inside.changed()
    inside.run(60)
    assert len(inside.tries) == 1
    assert str(code) in caplog.text
    assert f"the {hint} must be" in caplog.text
    assert TOKEN not in caplog.text


def test_more_rooms_than_can_be_told_of_at_once_are_left_out_and_said_once(
    inside: Inside, caplog: pytest.LogCaptureFixture
) -> None:
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


# -- inside a real Synapse -------------------------------------------------------------------------------


async def sharing(guarded: Guarded) -> tuple[User, str, Participant]:
    """A room's admin who shares their screen in its call."""
    alice = await guarded.synapse.user("alice")
    room_id = await guarded.synapse.create_room(alice)
    alices: Participant = await guarded.enter(alice, room_id)
    assert alices.publish("MICROPHONE")
    assert alices.publish("SCREEN_SHARE")
    return alice, room_id, alices


async def pushed(set_guarded: MakeGuarded, synapse: Synapse, **settings: object) -> Guarded:
    """A guard that would notice nothing for an hour if it were not told."""
    given = {"guard_admin_port": synapse.guard_port, "guard_policy_ttl": 3600}
    return await set_guarded(**{**given, **settings})


def sources_of(participant: Participant) -> list[int]:
    return sorted(track.source for track in participant.tracks.values())


@pytest_twisted.ensureDeferred
async def test_what_the_rooms_admin_forbids_stops_in_the_call(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse)
    alice, room_id, alices = await sharing(guarded)
    await synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False})
    await until(lambda: sources_of(alices) == [2])


@pytest_twisted.ensureDeferred
async def test_a_new_cap_holds_for_the_next_join(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse)
    alice, room_id, _ = await sharing(guarded)
    bob = await synapse.user("bob")
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 1})
    await guarded.cap_becomes(room_id, 1)
    assert (await guarded.ask_token(bob, room_id)).code == 403
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
    await guarded.cap_becomes(room_id, 2)
    assert (await guarded.ask_token(bob, room_id)).code == 200


@pytest_twisted.ensureDeferred
async def test_a_redacted_policy_is_one_no_more(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse, guard_restore=True)
    alice, room_id, alices = await sharing(guarded)
    forbidding = await synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False})
    await until(lambda: sources_of(alices) == [2])
    await synapse.redact(alice, room_id, forbidding)
    await until(lambda: alices.publish("SCREEN_SHARE"))


@pytest_twisted.ensureDeferred
async def test_a_wrong_token_is_logged_and_not_shown(set_guarded: MakeGuarded, synapse: Synapse) -> None:
    guarded = await pushed(set_guarded, synapse, guard_admin_token="another")
    alice, room_id, alices = await sharing(guarded)
    await synapse.set_state(alice, room_id, ROOM_QUALITY, {"allow_screenshare": False})
    await until(lambda: f"policy of {room_id} changed: it answers 403" in synapse.log())
    assert ADMIN_TOKEN not in synapse.log()
    assert sources_of(alices) == [2, 3]


class DeafGuard:
    """Where the guard should be, connections are taken and nothing is ever said."""

    def __init__(self, synapse: Synapse) -> None:
        self._held = ExitStack()
        self._door = self._held.enter_context(socket.socket())
        self._door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._door.bind(("127.0.0.1", synapse.guard_port))
        self._door.listen()

    def __enter__(self) -> DeafGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def told_of(self, room_id: str) -> bytes:
        """Wait for Synapse to tell of that room. :return: its request."""
        self._door.settimeout(10)
        while True:
            connection = self._held.enter_context(self._door.accept()[0])
            asked = b""
            while not asked.endswith(b"}"):
                asked += connection.recv(65536)
            if json.loads(asked.partition(b"\r\n\r\n")[2])["room_id"] == room_id:
                return asked

    def forget(self) -> None:
        """Throw away those tellings that have come already."""
        self._door.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                self._held.enter_context(self._door.accept()[0])


@pytest_twisted.ensureDeferred
async def test_synapse_waits_for_no_guard(synapse: Synapse) -> None:
    """It goes on trying to tell of an event that its clients have seen already."""
    alice = await synapse.user("alice")
    room_id = await synapse.create_room(alice)
    polling = Deferred.fromCoroutine(synapse.saw(alice, VOICE_LIMIT, await synapse.saw(alice)))
    with DeafGuard(synapse) as deaf:
        await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
        await polling
        deaf.forget()
        assert deaf.told_of(room_id).startswith(b"POST /policy-changed HTTP/1.1\r\n")
    assert (await synapse.ask("GET", "/_matrix/client/versions"))[0] == 200


@pytest_twisted.ensureDeferred
async def test_a_guard_that_comes_back_is_told_what_changed_meanwhile(synapse: Synapse) -> None:
    alice = await synapse.user("alice")
    room_id = await synapse.create_room(alice)
    polling = Deferred.fromCoroutine(synapse.saw(alice, VOICE_LIMIT, await synapse.saw(alice)))
    await synapse.set_state(alice, room_id, VOICE_LIMIT, {"max_users": 2})
    await polling
    with DeafGuard(synapse) as deaf:
        assert f"Bearer {ADMIN_TOKEN}".encode() in deaf.told_of(room_id)
