# SPDX-License-Identifier: Apache-2.0
"""A guard without admin rights on homeservers of every make: Synapse, and those that a variable names (`MAKES`)."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from lotusguard.check.everything import check
from lotusguard.sandbox.demo.sandbox import Refused
from tests.calls import counted, published
from tests.conftest import StartSandbox, until
from tests.homeserver import Homeserver
from tests.real.homeservers import MAKES
from tests.residence.helpers import NEVER
from tests.residence.residents import (
    HEARD_WITHIN,
    LIMIT,
    NO_LOOKUPS,
    PATIENCE,
    QUALITY,
    SCREEN_SHARE,
    Residents,
    latency_of,
    say,
)  # fmt: skip
from tests.synapse import Guarded

SYNAPSE = "SYNAPSE"
NAMED = [make for make in MAKES if os.environ.get(make)]
ENCRYPTED = [{"type": "m.room.encryption", "state_key": "", "content": {"algorithm": "m.megolm.v1.aes-sha2"}}]
MICROPHONE = 2
DEEP = 5000
"""Levels; more than Python's parser follows."""
DIGITS = 5000
"""More than Python accepts."""


@pytest.fixture(scope="module", params=[SYNAPSE, *NAMED])
def homeserver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homeserver]:
    """One homeserver of each make."""
    if request.param == SYNAPSE:
        yield request.getfixturevalue("synapse")
        return
    started = MAKES[request.param](tmp_path_factory.mktemp(request.param.lower()), os.environ[request.param])
    started.start()
    yield started
    started.stop()


@pytest_twisted.async_yield_fixture
async def residents(homeserver: Homeserver, start_sandbox: StartSandbox) -> AsyncIterator[Residents]:
    """A guard that hears of everything, or does not know it."""
    settings = {"synapse_api": homeserver.url, "guard_reconcile_interval": NEVER, **NO_LOOKUPS}
    sandbox = await start_sandbox(**settings, guard_admin_token="")
    yield await Residents.of(Guarded(homeserver, sandbox))


@pytest_twisted.ensureDeferred
async def test_limit_rights_and_bans_hold_as_soon_as_they_change(residents: Residents) -> None:
    room_id = await residents.room()
    await residents.set_limit(room_id, 1)
    bob = await residents.guarded.enter(residents.bob, room_id)
    with pytest.raises(Refused, match="full"):
        await residents.guarded.enter(residents.carol, room_id)
    bob.publish("SCREEN_SHARE")
    await residents.put(room_id, QUALITY, {"allow_screenshare": False})
    await until(lambda: not published(bob), PATIENCE)
    await residents.put(room_id, QUALITY, {"allow_screenshare": True})
    await until(lambda: bob.grant.may_publish(SCREEN_SHARE), PATIENCE)
    await residents.homeserver.change_membership(residents.alice, room_id, "ban", residents.bob)
    await until(lambda: not bob.connected, PATIENCE)
    with pytest.raises(Refused, match="not a member"):
        await residents.guarded.enter(residents.bob, room_id)
    await residents.guarded.enter(residents.carol, room_id)


@pytest_twisted.ensureDeferred
async def test_changes_take_effect_at_once(residents: Residents) -> None:
    """``docs/resident.md`` has the figures."""
    room_id = await residents.room()
    latency = await latency_of(residents, room_id, await residents.guarded.enter(residents.bob, room_id))
    say(f"{type(residents.homeserver).__name__}, the guard is in the room: {latency}")
    assert latency.median < HEARD_WITHIN


@pytest_twisted.ensureDeferred
async def test_power_levels_decide_who_may_speak_as_soon_as_they_change(residents: Residents) -> None:
    room_id = await residents.room()
    await residents.put(room_id, "io.lotus.call_permissions", {"microphone": 10})
    await until(lambda: residents.sandbox.guard.policies.last_known(room_id).permissions, PATIENCE)
    bob = await residents.guarded.enter(residents.bob, room_id)
    assert not bob.grant.may_publish(MICROPHONE)
    await residents.homeserver.set_level(residents.alice, room_id, residents.bob, 10)
    await until(lambda: bob.grant.may_publish(MICROPHONE), PATIENCE)
    await residents.homeserver.set_level(residents.alice, room_id, residents.bob, 0)
    await until(lambda: not bob.grant.may_publish(MICROPHONE), PATIENCE)


@pytest_twisted.ensureDeferred
async def test_somebody_who_joins_the_room_may_join_its_call_at_once(residents: Residents) -> None:
    room_id = await residents.room()
    dave = await residents.homeserver.register("dave")
    with pytest.raises(Refused, match="not a member"):
        await residents.guarded.enter(dave, room_id)
    await residents.homeserver.change_membership(dave, room_id, "join")
    assert await residents.guarded.enter(dave, room_id)
    await residents.homeserver.change_membership(dave, room_id, "leave")
    await until(lambda: not residents.sandbox.guard.residence.is_joined(room_id, dave.user_id), PATIENCE)


@pytest_twisted.ensureDeferred
async def test_redacted_limit_is_no_limit(residents: Residents) -> None:
    room_id = await residents.room()
    event_id = await residents.homeserver.set_state(residents.alice, room_id, LIMIT, {"max_users": 1})
    await residents.limit_is(room_id, 1)
    await residents.homeserver.redact(residents.alice, room_id, event_id)
    await residents.limit_is(room_id, None)


@pytest_twisted.ensureDeferred
async def test_moderators_command_the_guard(residents: Residents) -> None:
    room_id = await residents.room()
    bob = await residents.guarded.enter(residents.bob, room_id)
    carol = await residents.guarded.enter(residents.carol, room_id)
    bob.publish("MICROPHONE")
    await residents.command(room_id, "!call", "In the call: ")
    await residents.command(room_id, "!call limit 4", f"I cannot change the limit: {LIMIT} needs power level")
    await residents.homeserver.set_level(residents.alice, room_id, residents.account, 50)
    await residents.command(room_id, "!call limit 4", "At most 4 people")
    await residents.limit_is(room_id, 4)
    assert await residents.homeserver.state(residents.alice, room_id, LIMIT) == {"max_users": 4}
    await residents.command(room_id, f"!call mute {residents.bob.user_id}", f"{residents.bob.user_id} was muted")
    assert [track.muted for track in bob.tracks.values()] == [True]
    await residents.command(room_id, f"!call remove {residents.bob.user_id}", f"{residents.bob.user_id} was removed")
    await until(lambda: not bob.connected, PATIENCE)
    with pytest.raises(Refused, match="removed"):
        await residents.guarded.enter(residents.bob, room_id)
    await residents.command(room_id, "!call end", "The call was ended")
    await until(lambda: not carol.connected, PATIENCE)
    await residents.homeserver.say(residents.bob, room_id, "!call end")
    await residents.said(room_id, f"{residents.bob.user_id}: this needs power level 50, yours is 0.")
    await residents.command(room_id, "!call leave", "I leave this room")
    await until(lambda: not residents.sandbox.guard.residence.is_resident(room_id), PATIENCE)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest_twisted.ensureDeferred
async def test_reaction_of_a_moderator_admits_from_the_lobby(residents: Residents, encrypted: bool) -> None:
    room_id = await residents.room(**({"initial_state": ENCRYPTED} if encrypted else {}))
    await residents.put(room_id, "io.lotus.lobby", {"enabled": True})
    await until(lambda: residents.sandbox.guard.policies.last_known(room_id).lobby is not None, PATIENCE)
    asked = Deferred.fromCoroutine(residents.guarded.ask_token(residents.bob, room_id))
    event_id = await residents.said(room_id, f"{residents.bob.user_id} asks to join")
    await residents.homeserver.react(residents.carol, room_id, event_id, "✅")
    await residents.homeserver.react(residents.alice, room_id, event_id, "✅")
    answer = await asked
    assert answer.code == 200, answer.body
    bob = residents.sandbox.livekit.connect(json.loads(answer.body)["jwt"])
    await until(lambda: counted(residents.sandbox, "lobby_waiting") == 0, PATIENCE)
    assert bob.connected


@pytest_twisted.ensureDeferred
async def test_in_an_encrypted_room_everything_but_commands_works_and_is_said_once(residents: Residents) -> None:
    room_id = await residents.room(initial_state=ENCRYPTED)
    await residents.said(room_id, "I cannot read commands")
    await residents.set_limit(room_id, 1)
    await residents.guarded.enter(residents.bob, room_id)
    with pytest.raises(Refused, match="full"):
        await residents.guarded.enter(residents.carol, room_id)
    await residents.sandbox.guard.stopService()
    await residents.start_guard()
    assert residents.sandbox.guard.residence.is_resident(room_id)
    await residents.set_limit(room_id, 2)
    assert len(await residents.notices(room_id)) == 1


@pytest_twisted.ensureDeferred
async def test_command_is_not_done_again_by_a_guard_that_starts_anew(residents: Residents) -> None:
    room_id = await residents.room()
    await residents.command(room_id, "!call help", "Commands:")
    await residents.sandbox.guard.stopService()
    await residents.start_guard()
    assert residents.sandbox.guard.residence.is_resident(room_id)  # and not only after old answers of the homeserver
    await residents.command(room_id, "!call", "No limit.")
    assert len([one for one in await residents.notices(room_id) if one.startswith("Commands:")]) == 1


@pytest_twisted.ensureDeferred
async def test_guard_that_is_removed_enforces_nothing_until_it_is_invited_again(residents: Residents) -> None:
    room_id = await residents.room()
    await residents.set_limit(room_id, 1)
    await residents.guarded.enter(residents.bob, room_id)
    await residents.homeserver.change_membership(residents.alice, room_id, "kick", residents.account)
    await until(lambda: not residents.sandbox.guard.residence.is_resident(room_id), PATIENCE)
    carol = await residents.guarded.enter(residents.carol, room_id)
    await residents.invite(room_id)
    carol.publish("SCREEN_SHARE")
    await residents.put(room_id, QUALITY, {"allow_screenshare": False})
    await until(lambda: not published(carol), PATIENCE)


@pytest_twisted.ensureDeferred
async def test_homeserver_that_restarts_in_mid_sync_loses_no_change(residents: Residents) -> None:
    room_ids = [await residents.room() for _ in range(3)]
    await residents.set_limit(room_ids[0], 1)
    await residents.guarded.enter(residents.bob, room_ids[0])
    await residents.homeserver.stopped()
    await until(lambda: not residents.sandbox.guard.residence.alive, PATIENCE)
    asked = counted(residents.sandbox, "dependency_calls_total", dependency="matrix", outcome="ok")
    await residents.homeserver.started()
    await residents.put(room_ids[0], LIMIT, {"max_users": 2})  # before the guard has called again, or after
    await until(lambda: residents.sandbox.guard.residence.alive, PATIENCE)
    await residents.limit_is(room_ids[0], 2)
    await residents.guarded.enter(residents.carol, room_ids[0])
    read_again = counted(residents.sandbox, "dependency_calls_total", dependency="matrix", outcome="ok") - asked
    assert read_again < len(room_ids)  # it continues where it stopped: no room is read again
    assert residents.sandbox.guard.residence.is_joined(room_ids[1], residents.bob.user_id)


@pytest_twisted.ensureDeferred
async def test_changes_made_while_the_guard_was_away_are_heard_behind_many_messages(
    residents: Residents, tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = {"guard_state_dir": tmp_path_factory.mktemp("state")}
    await residents.sandbox.guard.stopService()
    await residents.start_guard(**state)
    room_id = await residents.room()
    await residents.set_limit(room_id, 1)
    await residents.sandbox.guard.stopService()
    await residents.put(room_id, LIMIT, {"max_users": 2})
    await residents.homeserver.change_membership(residents.bob, room_id, "leave")
    for number in range(60):
        await residents.homeserver.say(residents.carol, room_id, f"{number}")
    await residents.start_guard(**state)
    await residents.limit_is(room_id, 2)
    await until(lambda: residents.sandbox.guard.residence.is_joined(room_id, residents.carol.user_id), PATIENCE)
    assert not residents.sandbox.guard.residence.is_joined(room_id, residents.bob.user_id)
    with pytest.raises(Refused, match="not a member"):
        await residents.guarded.enter(residents.bob, room_id)


@pytest_twisted.ensureDeferred
async def test_readiness_says_that_only_rooms_it_is_in_are_enforced(residents: Residents) -> None:
    await residents.room()
    answer = await residents.sandbox.operator("GET", "/readyz")
    report: dict[str, Any] = json.loads(answer.body)
    assert (answer.code, report["rooms"]["admin_api"], report["rooms"]["sync"]) == (200, "no", "alive"), report
    assert any("only the rooms that its account is in" in reason for reason in report["reasons"])


@pytest_twisted.ensureDeferred
async def test_check_finds_nothing_wrong_with_the_homeserver(residents: Residents) -> None:
    report = await check(residents.sandbox.settings, reactor, patience=PATIENCE, longest=PATIENCE)
    found = {finding.asked: finding for finding in report.findings if finding.about == "synapse"}
    assert found["reachable"].state == "fine", found
    assert found["access token"].state == "warning", found
    assert "invited" in found["access token"].reason
    assert found["OpenID"].state == "fine", found


@pytest.mark.parametrize(
    ("value", "how"),
    [(b"[" * DEEP + b"]" * DEEP, {}), (b"7" * DIGITS, {"room_version": "5"})],
    ids=["deep", "long_number"],
)
@pytest_twisted.ensureDeferred
async def test_events_that_python_cannot_parse_keep_nothing_from_being_heard(
    residents: Residents, value: bytes, how: dict[str, Any]
) -> None:
    room_id = await residents.room(**how)
    message = b'{"msgtype": "m.text", "body": "hello", "x": ' + value + b"}"
    path = f"/_matrix/client/v3/rooms/{room_id}/send/m.room.message/odd"
    code = await residents.homeserver.send_bytes("PUT", path, residents.bob.token, message)
    assert code in (200, 400)  # Dendrite passes on what is deep
    await residents.set_limit(room_id, 1)
    await residents.command(room_id, "!call", "Limit: 1")


@pytest_twisted.ensureDeferred
async def test_new_room_after_an_upgrade_is_enforced_once_the_guard_is_invited(residents: Residents) -> None:
    old = await residents.room(room_version="10")
    await residents.set_limit(old, 1)
    new = await residents.homeserver.upgrade(residents.alice, old, "11")
    for user in (residents.bob, residents.carol):
        await residents.homeserver.change_membership(user, new, "join")
    assert not residents.sandbox.guard.residence.is_resident(new)
    await residents.invite(new)
    await residents.set_limit(new, 1)  # upgrading copies no settings of calls
    for room_id in (old, new):
        await residents.guarded.enter(residents.bob, room_id)
        with pytest.raises(Refused, match="full"):
            await residents.guarded.enter(residents.carol, room_id)


@pytest_twisted.ensureDeferred
async def test_place_in_the_stream_that_the_homeserver_does_not_know_is_refused(residents: Residents) -> None:
    code, _ = await residents.homeserver.ask("GET", "/_matrix/client/v3/sync?since=unknown", residents.account.token)
    assert code in (400, 404)  # what leads to a full sync
